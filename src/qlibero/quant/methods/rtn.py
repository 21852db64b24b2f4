"""No transform at all. The floor that every other method has to beat."""

from __future__ import annotations

from qlibero.config.quantization import Quant
from qlibero.quant.methods import GroupData
from qlibero.quant.transform import Transform
from qlibero.registry import MethodPlugin

PLUGIN = MethodPlugin("rtn", "no transform", data_free=True, order=1)


def fit(data: GroupData, spec: Quant) -> Transform:
    """The identity."""
    return Transform()
