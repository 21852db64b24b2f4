"""The numbers that weights and activations are rounded to: integers, which kernels multiply, and three float formats.

    int     the contract's integers (`kernels/contract.py`)
    fp8     e4m3 activations, one scale a token; weights e4m3 with one scale a row (8 bits), or int4 (4 bits)
    nvfp4   e2m1, a scale in e4m3 for every 16 channels, times one power of two a row (weights) or token (activations)
    mxfp4   e2m1, a scale that is a power of two for every 32 channels (OCP MX 1.0: floor(log2 max|x|) - 2)

Float formats are computed as they are defined, in float64, on any machine: products of e4m3 codes are multiples of
2^-18 below 2^18, so sums of fewer than 2^17 of them are exact, and so is what is called fp8 here (`kernels/fp8.py`
says how far hardware may be from it). nvfp4 and mxfp4 are simulations. NVIDIA's second scale is any fp32 number; a
power of two keeps every product of scales exact in bfloat16, and one a row or token instead of one a tensor keeps an
answer from depending on what else is in its batch, and a row's codes on what other rows were looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from qlibero.config.number_formats import SCALE_GROUP
from qlibero.config.quantization import Quant
from qlibero.errors import UserError, WorkFailed
from qlibero.kernels.contract import EPS, search_ratios, weight_grid
from qlibero.kernels.fp8 import E4M3_MOST, e4m3, quantize_e4m3

E2M1_MOST = 6.0


class Grid(Protocol):
    """The representable values of one layer's weights, scales fixed."""

    def codes(self, w: Tensor) -> Tensor: ...

    def nearest(self, width: int) -> Callable[[Tensor, int], Tensor]: ...

    def kept(self, group_size: int | None) -> Tensor: ...

    def on(self, scales: Tensor) -> Grid: ...


@dataclass(frozen=True)
class FloatGrid:
    """scales fp32 (N, G), bfloat16-representable, times elements of e4m3 or e2m1 (each e2m1 value is an e4m3 value)."""

    scales: Tensor
    element: str

    def codes(self, w: Tensor) -> Tensor:
        """w (N, K) -> elements float8_e4m3fn (N, K)."""
        groups = w.float().reshape(len(w), self.scales.shape[1], -1) / self.scales.unsqueeze(-1)
        return self._rounded(groups).reshape(w.shape).to(torch.float8_e4m3fn)

    def nearest(self, width: int) -> Callable[[Tensor, int], Tensor]:
        scales = self.scales.double().t().contiguous().unbind()
        group = width // len(scales)

        def nearest(values: Tensor, channel: int) -> Tensor:
            scale = scales[channel // group]
            return self._rounded((values / scale).float()).double() * scale

        return nearest

    def kept(self, group_size: int | None) -> Tensor:
        return (self.scales.squeeze(1) if group_size is None else self.scales).contiguous()

    def on(self, scales: Tensor) -> FloatGrid:
        return replace(self, scales=scales)

    def _rounded(self, x: Tensor) -> Tensor:
        return e2m1(x) if self.element == "e2m1" else e4m3(x)


def grid_of(w: Tensor, spec: Quant, bits: int, *, search: bool, importance: Tensor | None = None) -> Grid:
    """The grid of a transformed weight (N, K) under `spec`. Raises like `contract.weight_grid`."""
    if spec.number_format == "int" or (spec.number_format == "fp8" and bits == 4):
        return weight_grid(
            w,
            bits,
            spec.group_size,
            search=search,
            clip=spec.weight_clip,
            importance=importance,
            symmetric=spec.symmetric,
        )
    if not torch.isfinite(w).all():
        raise WorkFailed(f"weights of shape {tuple(w.shape)} contain non-finite values")
    width, group = w.shape[1], spec.scale_group
    if group is not None and width % group:
        raise UserError(f"{spec.number_format} has a scale for every {group} channels, which do not divide {width}")
    groups = w.float().reshape(len(w), 1 if group is None else width // group, -1)
    peak = groups.abs().amax(-1)
    weights = None if importance is None else importance.to(w.device).float().reshape(groups.shape[1], -1)

    most = (peak * spec.weight_clip).clamp_min(EPS).amax(-1, keepdim=True)

    def attempt(ratio: float) -> FloatGrid:
        scales = (peak * ratio).clamp_min(EPS)
        if spec.number_format == "fp8":
            return FloatGrid((scales / torch.full_like(scales, E4M3_MOST)).bfloat16().float(), "e4m3")
        return FloatGrid(_block_scales(scales, spec.number_format, most), "e2m1")

    def error(grid: FloatGrid) -> Tensor:
        squared = (grid.codes(w).float().view(groups.shape) * grid.scales.unsqueeze(-1) - groups) ** 2
        return (squared if weights is None else squared * weights).sum(-1)

    best = attempt(spec.weight_clip)
    lowest = error(best)
    for ratio in search_ratios(bits)[1:] if search else ():
        tried = attempt(spec.weight_clip * ratio)
        found = error(tried)
        better = found < lowest
        lowest = torch.where(better, found, lowest)
        best = FloatGrid(torch.where(better, tried.scales, best.scales), best.element)
    return best


def quantize_floats(x: Tensor, number_format: str, clip: float) -> tuple[Tensor, Tensor]:
    """x (M, K) float32 -> (elements times their block's scales (M, K) float64, one more scale a token (M,) float32)."""
    if number_format == "fp8":
        codes, scales = quantize_e4m3(x, clip)
        return codes.double(), scales
    group = SCALE_GROUP[number_format]
    groups = x.float().reshape(len(x), -1, group)
    peak = (groups.abs().amax(-1) * clip).clamp_min(EPS)
    scales = _block_scales(peak, number_format, peak.amax(-1, keepdim=True))
    rounded = e2m1(groups / scales.unsqueeze(-1)).double() * scales.double().unsqueeze(-1)
    return rounded.reshape(x.shape), torch.ones(len(x), device=x.device)


def _block_scales(peak: Tensor, number_format: str, most: Tensor) -> Tensor:
    """Scales of blocks whose largest magnitudes are `peak` > 0, `most` being the largest of those that share a second
    scale."""
    if number_format == "mxfp4":
        return torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent - 3)  # exact: floor(log2) is exponent - 1
    second = torch.exp2(torch.ceil(torch.log2(most / E2M1_MOST / E4M3_MOST)))
    smallest = 2.0**-9  # e4m3's smallest number: a block of almost nothing still has a scale
    return e4m3((peak / E2M1_MOST / second).clamp_min(smallest)) * second


def e2m1(x: Tensor) -> Tensor:
    """The nearest of ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}, ties to the even mantissa, in x's dtype."""
    size = x.abs().clamp_max(E2M1_MOST)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    return torch.copysign((size / step).round() * step, x)
