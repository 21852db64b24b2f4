"""Block Hadamard: one B × B orthogonal matrix of ±1/sqrt(B), shared by all blocks. Data-free and cheap online.

The rows carry random signs (drawn once per input, folded into the matrix): without them a block whose
channels agree would pile up in the first coefficient, which is the very outlier a rotation is meant to
spread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlibero.config.quantization import Quant
from qlibero.errors import UserError
from qlibero.quant.methods import GroupData
from qlibero.quant.transform import Transform
from qlibero.registry import MethodPlugin

PLUGIN = MethodPlugin(
    "hadamard",
    "one signed Hadamard block, shared by all blocks",
    data_free=True,
    factors=("first",),
    blocks=True,
    order=6,
)


def fit(data: GroupData, spec: Quant) -> Transform:
    """One signed Hadamard block, shared."""
    generator = torch.Generator().manual_seed(data.seed)
    signs = torch.randint(0, 2, (spec.block_size, 1), generator=generator) * 2.0 - 1.0
    return Transform(first=(signs * normalized(spec))[None].float())


def normalized(spec: Quant) -> Tensor:
    """The orthogonal ±1/sqrt(B), (B, B) float64 for B = `spec.block_size`. UserError if that is no power of two."""
    size = spec.block_size
    if size & (size - 1):
        raise UserError(f"quant.block_size is {size}; {spec.method} needs a power of two such as 64")
    orthogonal: Tensor = hadamard(size) / size**0.5
    return orthogonal


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of ±1, (size, size) float64; size a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h
