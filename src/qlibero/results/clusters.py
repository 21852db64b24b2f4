"""Intervals that treat tasks as clusters, and the paired sign-flip test.

500 episodes of a suite are 10 tasks × 50 initial states, not 500 exchangeable draws. "These 10 tasks" is
answered by the pair intervals of `statistics.py`; "tasks like these" by the intervals here, which resample
whole tasks (Miller, arXiv 2411.00640). With few tasks the percentile bootstrap is too narrow (coverage about
90 % at 10), so the t interval stands beside it and is the one to read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from qlibero.results.statistics import CONFIDENCE, Interval

RESAMPLES = 9_999
SEED = 20260421  # fixed: the same run always prints the same interval


def task_t_interval(task_deltas: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Mean of the per-task Δ ± t_{G−1}·s/√G; None with fewer than two tasks."""
    deltas = np.asarray(task_deltas, dtype=np.float64)
    if len(deltas) < 2:
        return None
    half = stdtrit(len(deltas) - 1, 0.5 + confidence / 2) * deltas.std(ddof=1) / np.sqrt(len(deltas))
    return float(deltas.mean() - half), float(deltas.mean() + half)


def task_bootstrap(differences: Sequence[int], pairs: Sequence[int], confidence: float = CONFIDENCE) -> Interval | None:
    """Percentile bootstrap of Δ over whole tasks: `differences` holds repaired − broken per task, `pairs` its pairs."""
    difference, weight = np.asarray(differences, dtype=np.float64), np.asarray(pairs, dtype=np.float64)
    if len(difference) < 2:
        return None
    drawn = np.random.default_rng(SEED).integers(len(difference), size=(RESAMPLES, len(difference)))
    deltas = difference[drawn].sum(axis=1) / weight[drawn].sum(axis=1)
    low, high = np.quantile(deltas, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p-value that paired differences are symmetric about 0, on their mean.

    Exact up to 13 pairs (all sign patterns), otherwise 9,999 seeded random patterns with the usual +1.
    """
    d = np.asarray(differences, dtype=np.float64)
    if len(d) == 0:
        return 1.0
    observed = abs(d.sum())
    slack = 1e-9 * max(np.abs(d).sum(), 1e-300)  # equal sums must count as equal in whatever order they were added
    if len(d) <= 13:
        patterns = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
        return float(np.mean(np.abs(patterns @ d) >= observed - slack))
    random, extreme = np.random.default_rng(SEED), 0
    for block in np.array_split(np.arange(RESAMPLES), 20):  # blocks bound the memory at 2,000 pairs
        signs = random.integers(0, 2, size=(len(block), len(d)), dtype=np.int8) * 2 - 1
        extreme += int(np.count_nonzero(np.abs(signs @ d) >= observed - slack))
    return (extreme + 1) / (RESAMPLES + 1)
