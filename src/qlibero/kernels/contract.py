"""W4A8 defined once, in integers: the quantizers, the epilogue, and what a kernel must be.

Everything that calls itself WxAy in this package computes exactly this (contract 3 of the design):

    s_x[m]  = max(clip · max_k |X[m,k]|, EPS) / limit                 limit = 2^(bits-1) - 1: 127 for A8, 7 for A4
    q_x     = clamp(rint(X / s_x), -limit, limit)                     rint = half to even, / = IEEE division
    s_w[n]  = bf16(max(clip · max_k |W[n,k]|, EPS) / (2^(bits-1)-1))  per output row, or per K-group: s_w[n, g]
    q_w     = clamp(rint(W / s_w), -2^(bits-1), 2^(bits-1) - 1)       [-8, 7] for W4
              asymmetric: s_w = bf16(clip · (max W - min W) / (2^bits - 1)), z = rint(-clip · min W / s_w) and
              q_w = clamp(rint(W / s_w), -z, 2^bits - 1 - z): the zero point is in the codes, which have one bit more
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

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from qlibero.errors import UserError, WorkFailed

EPS = 1e-8  # the least absmax a scale is computed from: all-zero rows get codes 0 and a finite scale
FP32_EXACT = 1 << 24  # every integer of smaller magnitude is an fp32 number, so sums below it are exact in any order


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


class WeightGrid(NamedTuple):
    """The values that a layer's weights can take: scale · {low … high}, per row and K-group; all fp32 (N, G)."""

    scales: Tensor
    low: Tensor
    high: Tensor

    def codes(self, w: Tensor) -> Tensor:
        """w (N, K) -> the nearest codes, int8 (N, K)."""
        groups = w.float().reshape(len(w), self.scales.shape[1], -1)
        low, high = self.low.unsqueeze(-1), self.high.unsqueeze(-1)
        codes = (groups / self.scales.unsqueeze(-1)).round_().clamp_(low, high)
        return codes.reshape(w.shape).to(torch.int8)

    def nearest(self, width: int) -> Callable[[Tensor, int], Tensor]:
        """(values (N,) float64, which of `width` channels) -> the nearest representable values."""
        scales, low, high = (each.double().t().contiguous().unbind() for each in self)
        group = width // len(scales)

        def nearest(values: Tensor, channel: int) -> Tensor:
            g = channel // group
            return (values / scales[g]).round_().clamp_(low[g], high[g]).mul_(scales[g])

        return nearest

    def on(self, scales: Tensor) -> WeightGrid:
        """The same codes with other scales (N, G)."""
        return self._replace(scales=scales)

    def kept(self, group_size: int | None) -> Tensor:
        """The scales as layers have them: (N,), or (N, G) with K-groups."""
        return (self.scales.squeeze(1) if group_size is None else self.scales).contiguous()


def weight_grid(
    w: Tensor,
    bits: int = 4,
    group_size: int | None = None,
    *,
    search: bool = False,
    clip: float = 1.0,
    importance: Tensor | None = None,
    symmetric: bool = True,
) -> WeightGrid:
    """Scales (and zero points) of w (N, K), bf16-representable, as the definitions above have them.

    `clip` scales the range; `search` picks per row (per group) the ratio of `search_ratios`, times `clip`, with the
    least squared error, the larger ratio on ties, each channel's error weighted by `importance` (K,) where it is given.
    Raises UserError when K is not a multiple of group_size, WorkFailed on non-finite weights.
    """
    low, high = map(float, weight_range(bits))
    n, k = w.shape
    if not torch.isfinite(w).all():
        raise WorkFailed(f"weights of shape {(n, k)} contain non-finite values")
    if group_size is not None and (group_size < 1 or k % group_size):
        raise UserError(f"group_size {group_size} does not divide the layer's input width {k}")
    groups = w.float().reshape(n, 1 if group_size is None else k // group_size, -1)
    least, most = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    span, steps = (groups.abs().amax(-1), high) if symmetric else (most - least, high - low)

    def attempt(ratio: float) -> WeightGrid:
        scaled = (span * ratio).clamp_min(EPS)
        scale = (scaled / torch.full_like(scaled, steps)).bfloat16().float()
        if symmetric:
            return WeightGrid(scale, torch.full_like(scale, low), torch.full_like(scale, high))
        zero = (-least * ratio / scale).round_().clamp_(0, steps)
        return WeightGrid(scale, -zero, steps - zero)

    best = attempt(clip)
    if search:
        weights = None if importance is None else importance.to(w.device).float().reshape(groups.shape[1], -1)

        def error(grid: WeightGrid) -> Tensor:
            found = grid.codes(w).float().view(groups.shape) * grid.scales.unsqueeze(-1)
            squared = (found - groups) ** 2
            return (squared if weights is None else squared * weights).sum(-1)

        lowest = error(best)
        for ratio in search_ratios(bits)[1:]:
            tried = attempt(clip * ratio)
            found = error(tried)
            better = found < lowest
            lowest = torch.where(better, found, lowest)
            best = WeightGrid(*(torch.where(better, b, a) for a, b in zip(best, tried, strict=True)))
    return best


def search_ratios(bits: int) -> tuple[float, ...]:
    """Clip ratios that the weight-scale search tries: 1.00, 0.95 … 0.50; below 4 bits, where few codes must not be
    spent on the tails, down to 0.20."""
    return tuple(r / 20 for r in range(20, 9 if bits >= 4 else 3, -1))


def quantize_weights(
    w: Tensor, bits: int = 4, group_size: int | None = None, search: bool = False, clip: float = 1.0, **how: Any
) -> tuple[Tensor, Tensor]:
    """Weights rounded to nearest: codes int8 (N, K) and scales fp32 (N,), or (N, K // group_size). See
    `weight_grid`."""
    grid = weight_grid(w, bits, group_size, search=search, clip=clip, **how)
    return grid.codes(w), grid.kept(group_size)


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
    number_format: str = "int"  # integers, which kernels multiply; others are simulated

    def __post_init__(self) -> None:
        if self.group_size is not None and (self.group_size < 1 or self.k % self.group_size):
            raise UserError(f"group_size {self.group_size} does not divide the layer's input width {self.k}")

    def __str__(self) -> str:
        grouped = f" g{self.group_size}" if self.group_size else ""
        kind = "" if self.number_format == "int" else f"{self.number_format} "
        return f"{self.n}x{self.k} {kind}W{self.weight_bits}A{self.activation_bits}{grouped} {self.device}"


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
    weight_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
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
