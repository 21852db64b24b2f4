"""Paired differences of a quantity that is no success: the t interval of their mean, and the paired sign-flip test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from qlibero.stats.proportions import CONFIDENCE, Interval

RESAMPLES = 9_999
SEED = 20260421  # fixed: the same run always prints the same interval


def mean_t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Mean ± t_{n−1}·s/√n; None with fewer than two values."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return None
    half = stdtrit(len(x) - 1, 0.5 + confidence / 2) * x.std(ddof=1) / np.sqrt(len(x))
    return float(x.mean() - half), float(x.mean() + half)


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
