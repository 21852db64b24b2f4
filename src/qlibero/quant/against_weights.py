"""Whether an artifact's codes and scales are those of the weights that they replace.

A hash says that nothing changed since, a schema that it could be so; only the weights say that it is so. Weights,
stored transform and stored importance make scales and nearest codes again, by the same functions, for every row of a
small artifact and a sample of a large one's. Then holds:

* Each row's scales are those found again. Where a near tie of the search went the other way, on another device say,
  the nearest codes on them cost at most 2 % more weighted squared error.
* Codes rounded to nearest, on plain or searched scales, are those found again, but for one in ten that may differ by
  one: another device or a rounded copy of the weights moves codes on the edge of a step.
* GPTQ's codes hang on second moments that are not kept, so they cannot be made again. Each row lies at most `FARTHEST`
  = 8 times as far from its weights (squared) as the nearest codes do, and points their way (cosine at least `ALIKE` =
  0.5); `rounding.py` sees to it that GPTQ's do. That refuses other rows, shifted codes and zeros; codes that some other
  GPTQ, with other data, would have given pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlibero.console import count_text
from qlibero.errors import GuardRefusal
from qlibero.policies.surgery import linear_in
from qlibero.quant.artifact import HINT, Artifact, LayerRecord
from qlibero.quant.number_formats import Grid, grid_of
from qlibero.quant.rounding import astray, values_of

ALL = 1 << 25
"""Weights of an artifact up to which every code is made again; all would take a full-size policy minutes."""
ROWS = 32
"""Output channels of a larger artifact's linears that are made again, spread over each."""
MOVED = 0.1
"""Share of a layer's codes that may differ, by one."""
SCALES_WITHIN = 0.016
"""Two steps of bfloat16."""
NEAR_TIE = 1.02


@torch.no_grad()
def require_of_weights(model: nn.Module, artifact: Artifact) -> None:
    """GuardRefusal for the first linear of `artifact` whose stored codes are not those of `model`'s weights.

    Linears on the meta device are passed over: their weights were not read, because the artifact replaces them.
    """
    every = sum(layer.out_features * layer.in_features for layer in artifact.layers) <= ALL
    for layer in artifact.layers:
        weight = linear_in(model, layer.name).weight
        if weight.device.type == "meta" or tuple(weight.shape) != (layer.out_features, layer.in_features):
            continue  # another model's shape has an error of its own, see `apply`
        rows = _rows(layer, artifact, every)
        transformed, importance, grid = _made_again(weight, artifact, layer, rows)
        if fault := _fault(artifact, layer, rows, transformed, importance, grid):
            raise GuardRefusal(
                f"{artifact.path or 'the artifact'}: {layer.name} is not made from this policy's weights "
                f"({fault}): {HINT}"
            )


def _fault(
    artifact: Artifact, layer: LayerRecord, rows: Tensor, w: Tensor, importance: Tensor, grid: Grid
) -> str | None:
    codes = artifact.codes(layer.name)[rows].to(w.device)
    scales = artifact.scales(layer.name)[rows].view(len(rows), -1).to(w.device)
    again = grid.kept(1).view(len(rows), -1)
    own = grid.on(scales)
    nearest = own.codes(w)
    other = ((scales / again - 1).abs() > SCALES_WITHIN).any(1)
    if bool(other.any()):
        cost, least = (
            ((values_of(x, s) - w).square() * importance.to(w.device)).sum(1)[other]
            for x, s in ((nearest, scales), (grid.codes(w), again))
        )
        if bool((worse := cost > NEAR_TIE * least + 1e-30).any()):
            return f"other, costlier scales in {int(worse.sum())} of {count_text(len(w), 'row')}"
    if layer.rounding == "gptq":
        strange = astray(values_of(codes, scales), values_of(nearest, scales), w)
        return (
            f"elsewhere than the weights in {int(strange.sum())} of {count_text(len(w), 'row')}"
            if bool(strange.any())
            else None
        )
    apart = (codes.float() - nearest.float()).abs()
    moved, farthest = float((apart > 0).float().mean()), float(apart.max())
    if moved > MOVED or (farthest > 1 and codes.dtype == torch.int8):
        return f"{moved:.0%} of its codes differ, by up to {farthest:g}"
    return None


def _rows(layer: LayerRecord, artifact: Artifact, every: bool) -> Tensor:
    """Indices of the rows to make again; all of them where a rotation of the outputs mixes rows."""
    n = layer.out_features
    if every or n <= ROWS or artifact.tensor(f"{layer.name}.output_rotation") is not None:
        return torch.arange(n)
    return torch.linspace(0, n - 1, ROWS).long()


def _made_again(weight: Tensor, artifact: Artifact, layer: LayerRecord, rows: Tensor) -> tuple[Tensor, Tensor, Grid]:
    """The transformed rows (R, K), each channel's importance (K,), and the grid that they are rounded on."""
    spec, w = artifact.spec, weight.detach()[rows.to(weight.device)]
    if factors := artifact.corrections.get(layer.name):
        each = torch.tensor(factors).repeat_interleave(layer.out_features // len(factors))[rows]
        w = w * each[:, None].to(w)
    transformed = artifact.transform(layer.group).to(w.device).weights(w.float())
    rotation = artifact.tensor(f"{layer.name}.output_rotation")
    if rotation is not None:
        g, b, _ = rotation.shape
        transformed = torch.bmm(rotation.to(w.device).double(), transformed.view(g, b, -1)).reshape(w.shape)
    transformed = transformed.float()
    importance = artifact.tensor(f"{layer.group}.importance")
    grid = grid_of(transformed, spec, layer.weight_bits, search=layer.rounding != "nearest", importance=importance)
    if importance is None or not importance.any():  # zeros would make every scale cost the same
        importance = torch.ones(w.shape[1])
    return transformed, importance, grid
