"""The invertible change of a layer's input that makes it easier to round, and its counterpart on the weights.

Online the input x becomes x' = x·T; offline the weights W (out × in) become W' = W·T^-T, so that x'·W'^T =
x·W^T for any invertible T. T is a product of these factors, in this order:

    scale (K,)        multiply each channel      smoothquant
    first (G, B, B)   multiply each block of B   duquant's R1, smoothing folded into its rows; hadamard
    order (K,)        gather channels            duquant's zigzag permutation
    second (G, B, B)  multiply each block of B   duquant's R2; weight_pca's rotation
    hadamard (K,)     multiply each channel, then one Walsh-Hadamard transform: smooth_hadamard, alone

W' is computed in float64 from the factors *as stored*, inverse included, so invariance does not hang on how
orthogonal a rounded rotation is. That is why blocks can be kept in bfloat16, half the bytes, at no loss. The
online side runs in float32, in one order, and is the same code for every backend: equal codes in `fake` and
in a kernel are a consequence, not a hope.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn

from qlibero.errors import GuardRefusal
from qlibero.kernels.contract import live_bytes, quantize_activations
from qlibero.kernels.hadamard import block, walsh_hadamard
from qlibero.kernels.tiled import CHANNELS, tile, untile

FACTORS = ("scale", "first", "order", "second", "hadamard")


@dataclass(frozen=True)
class Transform:
    """The factors of T; None is the identity. `order` is int32. G may be 1: one block shared by all."""

    scale: Tensor | None = None
    first: Tensor | None = None
    order: Tensor | None = None
    second: Tensor | None = None
    hadamard: Tensor | None = None

    def stored(self) -> Transform:
        """This transform as it is kept and run: scale float32, blocks and signed factors bfloat16."""
        narrow = (None if kept is None else kept.bfloat16() for kept in (self.first, self.second, self.hadamard))
        first, second, hadamard = narrow
        return Transform(None if self.scale is None else self.scale.float(), first, self.order, second, hadamard)

    def to(self, device: torch.device) -> Transform:
        """The same factors on `device`."""
        return Transform(**{name: value.to(device) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The factors that are there, by name, as an artifact stores them."""
        return {name: getattr(self, name) for name in FACTORS if getattr(self, name) is not None}

    def forward(self, x: Tensor) -> Tensor:
        """x (M, K) of any float dtype -> x·T in that dtype (float64 for fitting and tests, float32 online)."""
        return apply_factors(x, self.scale, self.first, self.order, self.second, self.hadamard)

    def weights(self, w: Tensor) -> Tensor:
        """w (N, K) -> W·T^-T (N, K) in float64."""
        w = w.double()
        if self.scale is not None:
            w = w / self.scale.double()
        if self.first is not None:
            w = block_product(w, _inverse_transpose(self.first))
        if self.order is not None:
            w = w.index_select(1, self.order)
        if self.second is not None:
            w = block_product(w, _inverse_transpose(self.second))
        if self.hadamard is not None:
            w = walsh_hadamard(w / self.hadamard.double()) / block(w.shape[1])
        return w

    def unweights(self, w: Tensor) -> Tensor:
        """The inverse of `weights`: w' (N, K) -> W'·T^T, so that weight-only layers need nothing online. float64."""
        w = w.double()
        if self.hadamard is not None:
            w = walsh_hadamard(w) * self.hadamard.double()
        if self.second is not None:
            w = block_product(w, self.second.double().transpose(1, 2))
        if self.order is not None:
            w = torch.empty_like(w).index_copy_(1, self.order.long(), w)
        if self.first is not None:
            w = block_product(w, self.first.double().transpose(1, 2))
        if self.scale is not None:
            w = w * self.scale.double()
        return w


def apply_factors(
    x: Tensor,
    scale: Tensor | None,
    first: Tensor | None,
    order: Tensor | None,
    second: Tensor | None,
    hadamard: Tensor | None,
) -> Tensor:
    """x (M, K) times the factors, in x's dtype."""
    if scale is not None:
        x = x * scale.to(x.dtype)
    if first is not None:
        x = block_product(x, first.to(x.dtype))
    if order is not None:
        x = x.index_select(1, order)
    if second is not None:
        x = block_product(x, second.to(x.dtype))
    if hadamard is not None:
        x = walsh_hadamard(x * hadamard.to(x.dtype))
    return x


def block_product(x: Tensor, blocks: Tensor) -> Tensor:
    """x (M, K) times blockdiag(blocks), blocks (G, B, B) with G·B = K, or (1, B, B) for one block shared by all."""
    m, k = x.shape
    g, b, _ = blocks.shape
    if g == 1:
        return (x.reshape(-1, b) @ blocks[0]).view(m, k)
    return torch.bmm(x.reshape(m, g, b).transpose(0, 1), blocks).transpose(0, 1).reshape(m, k)


def _inverse_transpose(blocks: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.inv(blocks.double())
    return inverse.transpose(1, 2)


class Fused(Protocol):
    """Transform and quantizer in one computation on a GPU, see `InputTransform.quantize`."""

    def __call__(self, x: Tensor, bits: int = 8, clip: float = 1.0, *, in_tiles: bool = False) -> tuple[Tensor, Tensor]:
        """Codes and scales of x (M, K)."""
        ...


class GatedFused(Protocol):
    """A `Fused` that has `gated = True`."""

    def __call__(
        self, x: Tensor, bits: int = 8, clip: float = 1.0, *, up: Tensor | None = None, in_tiles: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Codes and scales of x (M, K), with `up` of gelu_tanh(x)·up."""
        ...


class InputTransform(nn.Module):
    """A Transform as a module (its factors follow `.to(device)`), shared by the linears that read one input."""

    scale: Tensor | None
    first: Tensor | None
    order: Tensor | None
    second: Tensor | None
    hadamard: Tensor | None

    def __init__(self, transform: Transform, width: int):
        super().__init__()
        for name in FACTORS:
            self.register_buffer(name, getattr(transform, name), persistent=False)
        self.width = width
        self._fused: tuple[torch.device, Fused | None] | None = None

    def factors(self) -> Transform:
        """The same factors as plain data; not after `finalize`."""
        return Transform(self.scale, self.first, self.order, self.second, self.hadamard)

    @property
    def nbytes(self) -> int:
        """Bytes that the online transform occupies: factors, and the fused kernel's own arrangement of them."""
        return live_bytes([*self.buffers(), *_tensors(self._fused)])

    def finalize(self) -> None:
        """Get ready to run: nothing is fitted any more. On CUDA the fused kernel arranges the factors its own
        way; what it does not read itself is let go of, instead of being kept twice."""
        device = next((buffer.device for buffer in self.buffers()), None)
        if device is None or self._fused_on(device) is None:
            return
        read = {t.untyped_storage().data_ptr() for t in _tensors(self._fused)}
        for name, buffer in list(self.named_buffers()):
            if buffer.untyped_storage().data_ptr() not in read:
                setattr(self, name, None)

    def forward(self, x: Tensor) -> Tensor:
        """x (M, K) any float dtype -> (M, K) float32."""
        return apply_factors(x.float(), self.scale, self.first, self.order, self.second, self.hadamard)

    def quantize(self, x: Tensor, bits: int, clip: float, *, in_tiles: bool = False) -> tuple[Tensor, Tensor]:
        """x (M, K) any float dtype -> codes int8 (M, K), or their image (`kernels/tiled.py`), and scales float32 (M,)
        of x·T.

        On CUDA transform and quantizer are one fused computation, for every backend alike, where triton is
        there and the blocks suit it.
        """
        if (fused := self._fused_on(x.device)) is not None:
            return fused(x, bits, clip, in_tiles=in_tiles)
        codes, scales = quantize_activations(self(x), bits, clip)
        return (tile(codes) if in_tiles else codes), scales

    def takes_gated(self, device: torch.device) -> bool:
        """Whether `quantize_gated` saves a pass over the input there; else it is not to be called."""
        return _is_gated(self._fused_on(device))

    def quantize_gated(
        self, gate: Tensor, up: Tensor, bits: int, clip: float, *, in_tiles: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`quantize` of gelu_tanh(gate)·up, each (M, K) with contiguous rows, computed on the way."""
        fused = self._fused_on(gate.device)
        if not _is_gated(fused):
            raise TypeError("this transform takes no gated input: ask `takes_gated` first")
        return fused(gate, bits, clip, up=up, in_tiles=in_tiles)

    def _fused_on(self, device: torch.device) -> Fused | None:
        if device.type != "cuda":
            return None
        if self._fused is None or self._fused[0] != device:
            self._fused = (device, _prologue(self.factors(), self.width, device))
        return self._fused[1]


def _prologue(transform: Transform, width: int, device: torch.device) -> Fused | None:
    try:
        from qlibero.kernels.hadamard_quantizer import HadamardQuantizer
        from qlibero.kernels.triton_prologue import Prologue
    except ImportError:  # a torch without triton: the same factors in torch, slower
        return None
    factors = transform.tensors()
    kind = HadamardQuantizer if "hadamard" in factors else Prologue
    if kind.unfit(factors):
        return None
    fused = kind(factors, width)
    verify_fused(fused, transform, width, device)
    return fused


@torch.no_grad()
def verify_fused(fused: Fused, transform: Transform, width: int, device: torch.device) -> None:
    """Hold a fused transform against torch's, on few rows and on many. Every backend, `fake` included, computes
    its codes with it, so no comparison of backends could see it err.

    A code on the edge of a step may fall to either side, and with a Hadamard transform none may; more than that
    raises GuardRefusal, as does an image (`kernels/tiled.py`) of other codes.
    """
    exact = transform.hadamard is not None
    generator = torch.Generator(device).manual_seed(0)
    loudness = torch.randn(width, generator=generator, device=device).exp()
    for rows in (1, 8, 256):  # whichever way the fused one goes about so many
        x = (torch.randn(rows, width, generator=generator, device=device) * loudness).bfloat16()
        codes, scales = fused(x)
        expected, true_scales = quantize_activations(transform.forward(x.float()))
        apart = (codes.int() - expected.int()).abs()
        same = (
            (torch.equal(scales, true_scales) and not apart.any())
            if exact
            else (
                torch.allclose(scales, true_scales, rtol=1e-4, atol=0)
                and int(apart.max()) <= 1
                and int((apart > 0).sum()) <= max(2, apart.numel() // 1000)
            )
        )
        if same and width % CHANNELS == 0:
            image, again = fused(x, in_tiles=True)
            same = torch.equal(untile(image, rows), codes) and torch.equal(again, scales)
        if not same:
            raise GuardRefusal(
                f"the fused transform of {width} channels gives other codes than torch for {rows} rows on {device}: "
                "its compiler or driver is not to be trusted here; without triton the transform runs in torch"
            )


def _is_gated(fused: Fused | None) -> TypeGuard[GatedFused]:
    return bool(getattr(fused, "gated", False))


def _tensors(fused: tuple[torch.device, Fused | None] | None) -> list[Tensor]:
    """The tensors that the fused kernel of an `InputTransform` holds on to."""
    return [] if fused is None or fused[1] is None else [t for t in vars(fused[1]).values() if isinstance(t, Tensor)]
