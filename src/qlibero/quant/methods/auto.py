"""Per input the cheapest transform that costs no accuracy: each of the others is fitted, rounded and measured on
held-out tokens, and of those within `WITHIN_DB` of the best the one with the least online work is kept.

An input's noise is the mean over the linears that read it of noise to signal energy of their outputs. What was measured
is in the artifact (`calibration.auto`) and in `inspect`.
"""

from __future__ import annotations

from collections.abc import Mapping

from qlibero.registry import MethodPlugin

PLUGIN = MethodPlugin(
    "auto",
    "for each input the cheapest of rtn, smoothquant, smooth_hadamard and duquant that is as good",
    chooses=("rtn", "smoothquant", "smooth_hadamard", "duquant"),
    order=8,
)
WITHIN_DB = 0.25
"""How much worse than the best on held-out tokens a cheaper transform may be."""


def choose(decibels: Mapping[str, float]) -> str:
    """decibels: method -> signal over noise of an input's linears, cheapest first."""
    best = max(decibels.values())
    return next(method for method, db in decibels.items() if db >= best - WITHIN_DB)
