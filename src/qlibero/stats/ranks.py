"""How well one number orders another: the area under the ROC curve, and Spearman's rank correlation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri

from qlibero.stats.proportions import CONFIDENCE, Interval

FEWEST = 5  # of either kind; with fewer the interval means nothing


def auc(events: Sequence[float], others: Sequence[float]) -> tuple[float, Interval] | None:
    """Probability that the value of an event exceeds that of another, ties by half, with DeLong's interval (Biometrics
    44 (1988) 837), kept within [0, 1]. None with fewer than 5 of either."""
    m, n = len(events), len(others)
    if min(m, n) < FEWEST:
        return None
    x, y = np.asarray(events, np.float64)[:, None], np.asarray(others, np.float64)[None, :]
    wins = (x > y) + 0.5 * (x == y)
    area = float(wins.mean())
    variance = wins.mean(1).var(ddof=1) / m + wins.mean(0).var(ddof=1) / n
    half = float(ndtri(0.5 + CONFIDENCE / 2) * np.sqrt(variance))
    return area, (max(area - half, 0.0), min(area + half, 1.0))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's ρ, equal values sharing their mean rank; None below three points or where one side never varies."""
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    from scipy.stats import spearmanr  # seconds to import, and only needed here

    return float(spearmanr(x, y).statistic)
