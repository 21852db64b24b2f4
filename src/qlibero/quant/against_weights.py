"""Whether an artifact's codes and scales are those of the weights that they replace.

A hash says that nothing changed since, a schema that it could be so; only the weights say that it is so. Weights and
stored transform make the codes again, by the same function, and nearly all have to be the same: another device or a
rounded copy of the weights moves a code by one here and there, a scale that is wrong moves all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlibero.errors import GuardRefusal
from qlibero.kernels.contract import quantize_weights
from qlibero.quant.artifact import CURE, Artifact, LayerRecord

ALL = 1 << 25
"""Weights of an artifact up to which every code is made again; all would take a full-size policy minutes."""
ROWS = 32
"""Output channels of a larger artifact's linears that are made again, spread over each."""
MOVED = 0.1
"""Share of a layer's codes that may differ, by one."""
SCALES_WITHIN = 0.016
"""Two steps of bfloat16."""


@torch.no_grad()
def require_of_weights(model: nn.Module, artifact: Artifact) -> None:
    """GuardRefusal for the first linear of `artifact` whose stored codes are not those of `model`'s weights.

    Linears on the meta device are passed over: their weights were not read, because the artifact replaces them.
    """
    every = sum(layer.out_features * layer.in_features for layer in artifact.layers) <= ALL
    for layer in artifact.layers:
        weight = model.get_submodule(layer.name).weight
        if weight.device.type == "meta" or tuple(weight.shape) != (layer.out_features, layer.in_features):
            continue  # another model's shape has an error of its own, see `apply`
        rows = _rows(layer, artifact, every)
        codes, scales = _made_again(weight, artifact, layer, rows)
        apart = (codes.cpu().int() - artifact.codes(layer.name)[rows].int()).abs()
        moved = float((apart > 0).float().mean())
        ratio = (scales.cpu() / artifact.scales(layer.name)[rows] - 1).abs().max()
        if int(apart.max()) > 1 or moved > MOVED or not float(ratio) <= SCALES_WITHIN:
            raise GuardRefusal(
                f"{artifact.path or 'the artifact'}: {layer.name} is not made from this policy's weights "
                f"({moved:.0%} of its codes differ, by up to {int(apart.max())}; scales by up to {float(ratio):.0%}): "
                f"{CURE}"
            )


def _rows(layer: LayerRecord, artifact: Artifact, every: bool) -> Tensor:
    """Indices of the rows to make again; all of them where a rotation of the outputs mixes rows."""
    n = layer.out_features
    if every or n <= ROWS or artifact.tensor(f"{layer.name}.output_rotation") is not None:
        return torch.arange(n)
    return torch.linspace(0, n - 1, ROWS).long()


def _made_again(weight: Tensor, artifact: Artifact, layer: LayerRecord, rows: Tensor) -> tuple[Tensor, Tensor]:
    spec, w = artifact.spec, weight.detach()[rows.to(weight.device)]
    if factors := artifact.corrections.get(layer.name):
        each = torch.tensor(factors).repeat_interleave(layer.out_features // len(factors))[rows]
        w = w * each[:, None].to(w)
    transformed = artifact.transform(layer.group).to(w.device).weights(w.float())
    rotation = artifact.tensor(f"{layer.name}.output_rotation")
    if rotation is not None:
        g, b, _ = rotation.shape
        transformed = torch.bmm(rotation.to(w.device).double(), transformed.view(g, b, -1)).reshape(w.shape)
    return quantize_weights(
        transformed.float(), layer.weight_bits, spec.group_size, search=spec.weight_search, clip=spec.weight_clip
    )
