"""Round to nearest: no transform at all. The floor that every other method has to beat."""

from __future__ import annotations

from qlibero.quant.methods import GroupData
from qlibero.quant.spec import QuantSpec
from qlibero.quant.transform import Transform


def fit(data: GroupData, spec: QuantSpec) -> Transform:
    """The identity."""
    return Transform()
