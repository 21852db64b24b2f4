"""One file per method. Each turns what calibration saw of a shared input into a `Transform`, and knows nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qlibero.config.quantization import Quant
from qlibero.quant.transform import Transform
from qlibero.registry import MethodPlugin, get


@dataclass(frozen=True)
class GroupData:
    """What is known of one shared input when its transform is fitted.

    weights: the (N, K) float32 weights that read it; peak, mean, rms: (K,) greatest, mean and root mean square |x|
    per channel over all calibration tokens; tokens: (T, K) float32 kept tokens; seed: of this group's random draws.
    """

    weights: tuple[Tensor, ...]
    peak: Tensor
    mean: Tensor
    rms: Tensor
    tokens: Tensor
    seed: int


def fit(data: GroupData, spec: Quant) -> Transform:
    """The transform of `spec.method` for this input, as it is kept, on the device of the data."""
    made: Transform = get(MethodPlugin, spec.method).load().fit(data, spec)
    return made.stored().to(data.peak.device)


def output_rotation(weight: Tensor, spec: Quant) -> Tensor | None:
    """A rotation of the outputs, (N/B, B, B) float32, where the spec asks for one."""
    if not spec.row_rotation:
        return None
    rotation: Tensor = get(MethodPlugin, spec.method).load().output_rotation(weight, spec)
    return rotation
