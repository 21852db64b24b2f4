"""W4A8 defined once, in integers: the quantizers, the epilogue, and what a kernel must be.

Everything that calls itself WxAy in this package computes exactly this (contract 3 of the design):

    s_x[m]  = max(clip · max_k |X[m,k]|, EPS) / limit                 limit = 2^(bits-1) - 1: 127 for A8, 7 for A4
    q_x     = clamp(rint(X / s_x), -limit, limit)                     rint = half to even, / = IEEE division
    s_w[n]  = bf16(max(clip · max_k |W[n,k]|, EPS) / (2^(bits-1)-1))  per output row, or per K-group: s_w[n, g]
    q_w     = clamp(rint(W / s_w), -2^(bits-1), 2^(bits-1) - 1)       [-8, 7] for W4
    acc     = Σ_k q_x q_w                                             exact integers (one per group)
    y       = (float(acc) · s_x[m]) · s_w[n] + bias[n]                fp32, in this order, then the output dtype
              groups: s_x[m] · Σ_{g ascending} s_w[n,g]·acc_g  (+ bias)

The order of the epilogue is part of the definition: (acc·s_x)·s_w and (acc·s_w)·s_x differ in a third of all fp32
results. So is the division: X·(1/s) changes codes. Weight scales are rounded to bf16 *before* the codes are computed,
because some kernels can store nothing finer; the codes absorb the rounding and every backend then shares the same
numbers.

This file has no opinion on speed and imports no other room. A backend is one file beside it that implements `Kernel`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlibero.errors import UserError, WorkFailed

EPS = 1e-8  # the least absmax a scale is computed from: all-zero rows get codes 0 and a finite scale
FP32_EXACT = 1 << 24  # every integer of smaller magnitude is an fp32 number, so sums below it are exact in any order
SEARCH_RATIOS = tuple(
    r / 20 for r in range(20, 9, -1)
)  # clip ratios tried by the weight-scale search: 1.00, 0.95 … 0.50


def activation_limit(bits: int) -> int:
    """Largest activation code: symmetric, so 127 for 8 bits (-128 is never produced) and 7 for 4."""
    if not 2 <= bits <= 8:
        raise UserError(f"activation_bits is {bits}: integer activations have 2 to 8 bits (16 means not quantized)")
    return (1 << (bits - 1)) - 1


def weight_range(bits: int) -> tuple[int, int]:
    """Smallest and largest weight code in two's complement: (-8, 7) for 4 bits."""
    if not 2 <= bits <= 8:
        raise UserError(f"weight_bits is {bits}: integer weights have 2 to 8 bits (16 means not quantized)")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def quantize_activations(x: Tensor, bits: int = 8, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Per-token dynamic symmetric quantization.

    x: (..., K) of any float dtype, one row per token, after the layer's online transform. Returns codes int8 (..., K)
    and scales fp32 (...). A row with a non-finite input gets a non-finite scale, and its outputs with it: it cannot
    pass unnoticed, and the actions that come of it end their episode.
    """
    limit = float(activation_limit(bits))
    x = x.float()
    peak = x.abs().amax(dim=-1)
    on_cpu = x.device.type == "cpu"
    if clip != 1.0:
        peak = peak * clip
    peak = peak.clamp_min(EPS)
    # A tensor divisor on CUDA, where torch turns division by a Python number into multiplication by its reciprocal and
    # gives other scales in 4 % of rows. On the CPU it divides, and a number saves an operation in every layer.
    scales = peak / limit if on_cpu else peak / torch.full_like(peak, limit)
    codes = (x / scales.unsqueeze(-1)).round_().clamp_(-limit, limit).to(torch.int8)
    return codes, scales


def quantize_weights(
    w: Tensor, bits: int = 4, group_size: int | None = None, search: bool = False, clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Symmetric weight quantization with bf16-representable fp32 scales.

    w: (N, K) float. Returns codes int8 (N, K) and scales fp32 (N,), or (N, K // group_size) with groups along K. `clip`
    scales the absmax; `search` picks per row (per group) the ratio of `SEARCH_RATIOS`, times `clip`, with the least
    squared error, the larger ratio on ties. Raises UserError when K is not a multiple of group_size, WorkFailed on
    non-finite weights.
    """
    low, high = weight_range(bits)
    n, k = w.shape
    if not torch.isfinite(w).all():
        raise WorkFailed(f"weights of shape {(n, k)} contain non-finite values")
    if group_size is not None and (group_size < 1 or k % group_size):
        raise UserError(f"group_size {group_size} does not divide the layer's input width {k}")
    groups = w.float().reshape(n, 1 if group_size is None else k // group_size, -1)
    peak = groups.abs().amax(dim=-1)

    def attempt(ratio: float) -> tuple[Tensor, Tensor]:
        scaled = (peak * ratio).clamp_min(EPS)
        scale = (scaled / torch.full_like(scaled, float(high))).bfloat16().float()
        return scale, (groups / scale.unsqueeze(-1)).round_().clamp_(low, high)

    scales, codes = attempt(clip)
    if search:
        least = ((codes * scales.unsqueeze(-1) - groups) ** 2).sum(-1)
        for ratio in SEARCH_RATIOS[1:]:
            scale, code = attempt(clip * ratio)
            error = ((code * scale.unsqueeze(-1) - groups) ** 2).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            scales = torch.where(better, scale, scales)
            codes = torch.where(better.unsqueeze(-1), code, codes)
    scales = scales.squeeze(1) if group_size is None else scales
    return codes.reshape(n, k).to(torch.int8), scales.contiguous()


def epilogue(acc: Tensor | Iterable[Tensor], s_x: Tensor, s_w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Exact accumulators to outputs, in the contract's order.

    acc: (M, N) int32 or fp32-held integers with s_w (N,); or, with s_w (N, G), G accumulators of (M, N) in ascending
    group order (a (G, M, N) tensor or any iterable, so that they need not all live at once). s_x (M,), bias (N,) or
    None. Returns fp32 (M, N). Each step is its own eager operation: a compiler that fuses the last product with the
    bias sum into an FMA would round once where the contract rounds twice.
    """
    if s_w.dim() == 1:
        assert isinstance(acc, Tensor)
        y = (acc.float() * s_x.unsqueeze(1)).mul_(s_w)
    else:
        groups = iter(acc)
        y = next(groups).float() * s_w[:, 0]
        for g, partial in enumerate(groups, start=1):
            y.add_(partial.float() * s_w[:, g])
        y.mul_(s_x.unsqueeze(1))
    return y if bias is None else y.add_(bias.float())


@dataclass(frozen=True)
class GemmShape:
    """What a kernel is asked to do: (M, K) codes times (N, K) codes, M unknown until the call."""

    n: int
    k: int
    weight_bits: int = 4
    activation_bits: int = 8
    group_size: int | None = None  # None: one weight scale per output row
    device: str = "cpu"  # "cpu" or "cuda"

    def __post_init__(self) -> None:
        if self.group_size is not None and (self.group_size < 1 or self.k % self.group_size):
            raise UserError(f"group_size {self.group_size} does not divide the layer's input width {self.k}")

    def __str__(self) -> str:
        grouped = f" g{self.group_size}" if self.group_size else ""
        return f"{self.n}x{self.k} W{self.weight_bits}A{self.activation_bits}{grouped} {self.device}"


@dataclass(frozen=True)
class Support:
    """Whether a kernel takes a shape here, and if not why not and what would help."""

    ok: bool
    reason: str = ""


class PackedWeight(nn.Module):
    """A layer's weight codes in one kernel's own layout. Buffers follow `.to(device)`; they are never part of a
    state_dict, because the artifact, not the module, is what is saved."""

    def __init__(self, n: int, k: int, weight_bits: int, group_size: int | None, **buffers: Tensor):
        super().__init__()
        self.n, self.k, self.weight_bits, self.group_size = n, k, weight_bits, group_size
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    if TYPE_CHECKING:  # each kernel has buffers of its own

        def __getattr__(self, name: str) -> Tensor: ...

    @property
    def nbytes(self) -> int:
        """Bytes the weight really occupies: each live storage once, a package's own layer with all it keeps."""
        return live_bytes([*self.buffers(), *self.parameters()])


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind these tensors; what several share counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class Kernel:
    """One backend. Stateless: all a layer needs is in its PackedWeight."""

    name: str
    real = True  # False: a reference or simulation that saves neither memory nor time
    # what it takes on any machine, so that a login node can plan for nodes it is not like
    devices: tuple[str, ...] = ("cpu", "cuda")
    weight_bits: tuple[int, ...] = (4, 8)
    grouped = True  # whether it takes a weight scale per K-group
    package: str | None = None  # the extra package whose version a verdict depends on
    #: whether it has `matmul_tiles`, so that quantizers write their codes in its layout (tiled.py) and not in rows
    in_tiles = False
    #: for a kernel that cannot give its accumulator, only an output in this dtype, rounded once per scale
    rounds_to: torch.dtype | None = None

    def supports(self, shape: GemmShape) -> Support:
        """Whether this machine and this shape will do; must not raise."""
        raise NotImplementedError

    def fits(self, shape: GemmShape) -> Support:
        """Whether it could take such a layer on *some* machine: the part of `supports` that leaves this one out."""
        if shape.device not in self.devices:
            return Support(False, f"runs on {' and '.join(self.devices)} only")
        if shape.weight_bits not in self.weight_bits:
            return Support(
                False, f"packs weights of {' or '.join(map(str, self.weight_bits))} bits, not {shape.weight_bits}"
            )
        if shape.group_size and not self.grouped:
            return Support(False, "takes one weight scale per row, not one per K-group")
        return Support(True)

    def pack(self, codes: Tensor, weight_bits: int = 4, group_size: int | None = None) -> PackedWeight:
        """codes: int8 (N, K) on the device the layer will run on."""
        raise NotImplementedError

    def accumulate(self, codes_x: Tensor, packed: PackedWeight) -> Tensor:
        """codes_x int8 (M, K) → exact Σ_k q_x q_w, int32 or fp32-held integers: (M, N), or (G, M, N) with K-groups."""
        raise NotImplementedError

    def matmul(
        self,
        codes_x: Tensor,
        s_x: Tensor,
        packed: PackedWeight,
        s_w: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """(M, N) in out_dtype. Kernels with a fused epilogue override this and must give the very same bits."""
        return epilogue(self.accumulate(codes_x, packed), s_x, s_w, bias).to(out_dtype)

    def matmul_tiles(
        self,
        image: Tensor,
        s_x: Tensor,
        packed: PackedWeight,
        s_w: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """`matmul` of codes that lie as `tiled.py` says, for kernels with `in_tiles`."""
        raise NotImplementedError
