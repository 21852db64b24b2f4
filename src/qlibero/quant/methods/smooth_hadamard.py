"""Smoothing, then one signed Hadamard transform over the whole width: what DuQuant's two rotations and its permutation
do, in one pass, with nothing to store but a number per channel.

The signs are drawn once per input, so that channels which agree do not pile up in one coefficient. The arithmetic is
fixed to the last bit, see `kernels/hadamard.py`.
"""

from __future__ import annotations

import torch

from qlibero.config.quantization import Quant
from qlibero.kernels.hadamard import fold
from qlibero.quant.methods import GroupData
from qlibero.quant.methods.smoothquant import smoothing
from qlibero.quant.transform import Transform
from qlibero.registry import MethodPlugin

PLUGIN = MethodPlugin(
    "smooth_hadamard", "smoothing, then a signed Hadamard over the whole width", factors=("hadamard",), order=7
)


def fit(data: GroupData, spec: Quant) -> Transform:
    """The signed smoothing, to be followed by H."""
    inverse = 1.0 / smoothing(data, spec)
    generator = torch.Generator().manual_seed(data.seed)
    signs = torch.randint(0, 2, (len(inverse),), generator=generator) * 2.0 - 1.0
    return Transform(hadamard=fold(inverse, signs.to(inverse.device)))
