"""Output head balancing, QuantVLA's: rounding changes how large an attention's output is.

On each layer b = RMS(Z_T) / (RMS(Z_Q) + 1e-6), Z = what the output projection returns; within 3 % of 1 it is taken as
1, else clipped to exp(±0.30) as in QuantVLA's pi0.5 code. Independent repetitions found no gain.
"""

from __future__ import annotations

import math

from qlibero.quant.corrections import AttentionSeen
from qlibero.registry import CorrectionPlugin

PLUGIN = CorrectionPlugin(
    "ohb", "QuantVLA's output head balancing, a factor an attention", scales="output", low=0.7408, high=1.3499
)
LOG_CLIP, LOG_BAND = 0.30, 0.03
SMALL = 1e-6


def factors(teacher: AttentionSeen, student: AttentionSeen) -> list[float]:
    """One, of the whole output."""
    log = math.log(max(teacher.output_rms, 1e-30) / (student.output_rms + SMALL))
    log = max(-LOG_CLIP, min(LOG_CLIP, log))
    return [1.0 if abs(log) < LOG_BAND else round(math.exp(log), 6)]
