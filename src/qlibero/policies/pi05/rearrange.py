"""The same network with the sums of one layer in another order, on any machine and in any library.

The hidden channels of a gated MLP have no order of their own: with the rows of `gate_proj` and `up_proj` and the
columns of `down_proj` permuted alike it is the same function, and `down_proj` adds up its terms otherwise. The first
layer of the expert runs in every flow step, so what it rounds differently reaches every action; its copy is 25 MB at
full size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from qlibero.policies.pi05.layers import GatedMLP
from qlibero.policies.pi05.model import Pi05Model
from qlibero.policies.surgery import swap_modules

MLP = "paligemma_with_expert.gemma_expert.model.layers.0.mlp"


@torch.no_grad()
def rearranged(model: Pi05Model, seed: int) -> Pi05Model:
    """A twin whose expert's first MLP has its channels in the order that `seed` draws; every other tensor is shared."""
    mlp = model.expert.layers[0].mlp
    order = torch.from_numpy(np.random.Generator(np.random.Philox(key=seed)).permutation(mlp.down_proj.in_features))
    order = order.to(mlp.down_proj.weight.device)
    twin = GatedMLP.__new__(GatedMLP)
    nn.Module.__init__(twin)
    for name, dimension in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        setattr(twin, name, _linear(getattr(mlp, name).weight.index_select(dimension, order)))
    return swap_modules(model, {MLP: twin}).eval()


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
