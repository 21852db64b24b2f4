"""The transform of the code this project grew from, kept to reproduce its numbers. It is not DuQuant.

Data-free, from the weights alone: channels ordered by mean squared weight and interleaved (largest, smallest,
second largest, …), then each block of B turned into the principal axes of its weights. It concentrates energy
where DuQuant spreads it. Two things differ from the original on purpose: linears that share an input share
its transform (fitted on their stacked weights), and activations are quantized per token like everybody's
here, because the original's static scale per input channel cannot be computed by an integer product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlibero.config.quantization import Quant
from qlibero.quant.methods import GroupData
from qlibero.quant.transform import Transform
from qlibero.registry import MethodPlugin

PLUGIN = MethodPlugin(
    "weight_pca",
    "principal axes of the weights, as the openpi_duquant code did",
    data_free=True,
    factors=("order", "second"),
    blocks=True,
    rotates_outputs=True,
    order=4,
)


def fit(data: GroupData, spec: Quant) -> Transform:
    """The interleaving permutation and one PCA rotation per block."""
    w = torch.cat([weight.double() for weight in data.weights])
    ranked = torch.argsort(w.square().mean(0), descending=True, stable=True)
    order = torch.empty_like(ranked)
    half = (len(ranked) + 1) // 2
    order[0::2], order[1::2] = ranked[:half], ranked[half:].flip(0)
    blocks = w[:, order].view(len(w), -1, spec.block_size).permute(1, 2, 0)
    return Transform(order=order.int(), second=_left_axes(blocks).float())


def output_rotation(weight: Tensor, spec: Quant) -> Tensor:
    """The original's second rotation, of the outputs: weight (N, K) -> R (N/B, B, B) float32, with W' = R·W
    and y = y'·R. Narrow outputs use one block of their own width."""
    n = weight.shape[0]
    block = spec.block_size if n % spec.block_size == 0 else n
    return _left_axes(weight.double().view(-1, block, weight.shape[1])).float()


def _left_axes(blocks: Tensor) -> Tensor:
    """U of each block's singular value decomposition, (G, B, M) -> (G, B, B), from the small Gram matrix."""
    axes: Tensor = torch.linalg.eigh(blocks @ blocks.transpose(1, 2)).eigenvectors
    return axes.flip(-1)
