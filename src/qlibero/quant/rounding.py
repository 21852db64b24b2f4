"""What each weight is rounded to: `nearest`, `search`, `gptq`. Each asks for those before it too, and held-out tokens
say which one a layer keeps.

    nearest   scales from the largest weight, each weight to its nearest code
    search    scales of least squared error, each channel's weighted by its mean x'^2 where calibration saw it
    gptq      the codes on `search`'s scales, chosen so that they repair one another's errors (`gptq.py`)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qlibero.config.quantization import Quant
from qlibero.quant.gptq import gptq
from qlibero.quant.number_formats import Grid, grid_of


def candidates(
    weight: Tensor, spec: Quant, bits: int, importance: Tensor | None, hessian: Tensor | None, name: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(rounding, codes (N, K), scales (N,) or (N, G)) of a transformed weight (N, K), from `nearest` to
    `spec.rounding`.

    importance (K,) is the mean of x'^2, hessian (K, K) that of x'·x'^T; without them the search takes all channels for
    equal and there is no GPTQ.
    """

    def candidate(how: str, grid: Grid, codes: Tensor) -> tuple[str, Tensor, Tensor]:
        return how, codes, grid.kept(grouped)

    grouped = spec.scale_group
    grid = grid_of(weight, spec, bits, search=False)
    yield candidate("nearest", grid, grid.codes(weight))
    if spec.rounding == "nearest":
        return
    grid = grid_of(weight, spec, bits, search=True, importance=importance)
    yield candidate("search", grid, grid.codes(weight))
    if spec.rounding == "gptq" and hessian is not None:
        rounded = gptq(weight, hessian, grid.nearest(weight.shape[1]), name)
        nearest = grid.codes(weight)
        strange = astray(rounded.float(), values_of(nearest, grid.kept(1)), weight, 0.95 * FARTHEST)
        yield candidate(
            "gptq", grid, torch.where(strange[:, None], nearest.float(), grid.codes(rounded).float()).to(nearest.dtype)
        )


FARTHEST = 8.0
"""How many times the squared distance of the nearest codes a GPTQ row may lie from its weights."""
ALIKE = 0.5
"""Least cosine of the angle between a GPTQ row and its weights."""


def astray(values: Tensor, nearest: Tensor, weight: Tensor, farthest: float = FARTHEST) -> Tensor:
    """(N,) rows of `values` that lie farther from `weight` than GPTQ is let go; all (N, K) float32.

    Such rows keep their nearest codes, so that whoever has the weights can tell codes that were made from them
    (`against_weights.py`) without the second moments that decided them.
    """
    cost, least = ((x - weight).square().sum(1) for x in (values, nearest))
    alike = nn.functional.cosine_similarity(values, weight, dim=1)
    return (cost > farthest * least + 1e-30) | ((alike < ALIKE) & (weight.abs().amax(1) > 0))


def values_of(codes: Tensor, scales: Tensor) -> Tensor:
    """codes (N, K) and scales (N, G) -> weights (N, K) float32."""
    return (codes.float().view(len(codes), scales.shape[1], -1) * scales.unsqueeze(-1)).view(codes.shape)
