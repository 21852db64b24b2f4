"""Attention temperature matching, QuantVLA's: rounding flattens or sharpens attention.

On each query head a = Std(L_T) / (Std(L_Q) + 1e-6), L = q·kᵀ/√d over live keys; within 5 % of 1 it is taken as 1, else
clipped to [0.8, 1.25] as in QuantVLA's pi0.5 code. Where its code measured the ten action tokens among themselves, all
the keys that a query really sees are measured here. Independent repetitions found no gain.
"""

from __future__ import annotations

import torch

from qlibero.quant.corrections import AttentionSeen
from qlibero.registry import CorrectionPlugin

PLUGIN = CorrectionPlugin(
    "atm", "QuantVLA's attention temperature matching, a factor a query head", scales="query", low=0.8, high=1.25
)
BAND = 0.05
SMALL = 1e-6


def factors(teacher: AttentionSeen, student: AttentionSeen) -> list[float]:
    """One of each query head."""
    a = torch.as_tensor(teacher.logit_std) / (torch.as_tensor(student.logit_std) + SMALL)
    return [1.0 if abs(x - 1) <= BAND else round(x, 6) for x in a.clamp(PLUGIN.low, PLUGIN.high).tolist()]
