"""Which demonstration observations fit nothing, so that errors can be measured and choices made on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlibero.config.quantization import Quant
from qlibero.errors import UserError
from qlibero.policies.base import Observation
from qlibero.quant.observations import Demonstrations, read_demonstrations

EVERY = 3
"""One observation in so many is held out."""
MOST = 64
"""Observations that are asked, spread over those there are."""
FEWEST = 32
PHASES = ("start", "middle", "end")


def held_out(count: int) -> list[bool]:
    """Which of `count` observations are held out: every third; the second of two; not the only one."""
    return [count > 1 and i % EVERY == min(count, EVERY) - 1 for i in range(count)]


def unseen(quants: Sequence[Quant]) -> tuple[Demonstrations, list[str], bool]:
    """Observations of the arms' calibration file that none of them was fitted on, at most `MOST`, their phases, and
    True; False and any of the file's, where fewer than `FEWEST` are left."""
    sources = {quant.calibration.path for quant in quants if quant.calibration and quant.calibration.path}
    if len(sources) != 1:
        said = "names no calibration data" if not sources else f"names {len(sources)} calibration files"
        raise UserError(f"quant.calibration.path: the experiment {said}; a probe needs one file of demonstrations")
    everything = read_demonstrations(sources.pop())
    left = dict.fromkeys(range(len(everything.observations)))
    for quant in quants:
        if quant.calibration is None:
            continue
        drawn = everything.indices(quant.calibration.samples, quant.calibration.seed)
        for i, held in zip(drawn, held_out(len(drawn)), strict=True):
            if not held:
                left.pop(i, None)
    fresh = len(left) >= FEWEST
    kept = list(left) if fresh else list(range(len(everything.observations)))
    chosen = [kept[i] for i in np.unique(np.linspace(0, len(kept) - 1, min(MOST, len(kept))).astype(int))]
    phases = phase_of(everything.observations)
    kept_ones = tuple(everything.observations[i] for i in chosen)
    return Demonstrations(kept_ones, everything.source, everything.sha256), [phases[i] for i in chosen], fresh


def phase_of(observations: Sequence[Observation]) -> list[str]:
    """Of each observation `start`, `middle` or `end`: its third among the neighbours with one instruction, which are
    moments of a demonstration in their order."""
    phases: list[str] = []
    start = 0
    for i, observation in enumerate(observations):
        if i + 1 == len(observations) or observations[i + 1].prompt != observation.prompt:
            count = i + 1 - start
            phases += [PHASES[min(2, 3 * k // count)] for k in range(count)]
            start = i + 1
    return phases
