"""Statistics of paired successes at a fixed number of episodes. Pure functions, no state, no printing.

Notation everywhere: per pair (same scene, same noise) `broken` b = the reference succeeds and the other arm
fails, `repaired` r = the reverse, n = all pairs; Δ = (r − b)/n, so a loss is negative; ψ = (b + r)/n is the
discordance. Intervals are two-sided 95 % unless `confidence` says otherwise. Wald intervals are nowhere: near
100 % they lie.

Sources: Wilson 1927; McNemar 1947 (exact); Tango, Stat. Med. 17 (1998) 891; Newcombe,
Stat. Med. 17 (1998) 2635, method 10; Holm 1979. Clusters are in `sampling.py`, permutations in
`shifts.py`, stopping in `group_sequential.py` and `evalues.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from scipy.special import bdtr, bdtrik, gammaln, xlog1py, xlogy

CONFIDENCE = 0.95
ENUMERABLE_PAIRS = 5000  # beyond, power is approximated
Interval = tuple[float, float]


def normal_quantile(confidence: float = CONFIDENCE) -> float:
    """z of a two-sided interval: 1.959964 at 95 %."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


# one proportion
# ---------------------------------------------------------------------------------------------------


def wilson(k: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson score interval for k of n, for display. Raises ValueError unless 0 ≤ k ≤ n and n > 0."""
    _check_counts(k, n)
    z = normal_quantile(confidence)
    p, shrink = k / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def _check_counts(k: float, n: float) -> None:
    if not 0 <= k <= n + 1e-9 or n == 0:
        raise ValueError(f"{k} of {n} is not a proportion")


# pairs
# ------------------------------------------------------------------------------------------------------------


def mcnemar_exact(broken: int, repaired: int) -> float:
    """Two-sided exact p-value that broken and repaired are equally likely; 1 without discordant pairs.

    Fewer than 6 discordant pairs can never reach 0.05.
    """
    return min(1.0, 2 * float(bdtr(min(broken, repaired), broken + repaired, 0.5)))


def tango_z(broken: float, repaired: float, n: float, delta: float) -> float:
    """Score statistic of H0: Δ = `delta`; positive when the data lie above `delta`. Counts may be effective ones."""
    return float(tango_zs(np.array([broken]), np.array([repaired]), n, delta)[0])


def tango_zs(broken: np.ndarray, repaired: np.ndarray, n: float, delta: float) -> np.ndarray:
    """`tango_z` of many tables of n pairs at once."""
    b, r = broken.astype(np.float64), repaired.astype(np.float64)
    # q is the maximum-likelihood P(broken) given Δ = delta
    linear = -r - b + (2 * n - r + b) * delta
    constant = -b * delta * (1 - delta)
    q = (np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0)) - linear) / (4 * n)
    numerator = np.where(np.abs(r - b - n * delta) < 1e-9, 0.0, r - b - n * delta)
    variance = np.maximum(n * (2 * q + delta * (1 - delta)), 1e-12)  # 0 only where delta is 0 or ±1
    return numerator / np.sqrt(variance)


def favoured(
    broken: np.ndarray | float, repaired: np.ndarray | float, n: float, pairs: float
) -> tuple[np.ndarray, np.ndarray]:
    """(broken, repaired) with so many `pairs` more in the arm's favour, a continuity correction: concordant pairs
    become repaired, where there are none broken ones concordant. A negative number counts against the arm."""
    if pairs < 0:
        repaired, broken = favoured(repaired, broken, n, -pairs)
        return broken, repaired
    b, r = np.asarray(broken, np.float64), np.asarray(repaired, np.float64)
    room = b + r + pairs <= n
    return np.where(room, b, np.maximum(b - pairs, 0)), np.where(room, r + pairs, r)


def tango(broken: float, repaired: float, n: float, confidence: float = CONFIDENCE) -> Interval:
    """Tango's score interval for Δ: the default. ±z²/(n + z²) when no pair is discordant."""
    _check_counts(broken + repaired, n)
    z, estimate = normal_quantile(confidence), (repaired - broken) / n
    return (
        bisect(lambda d: tango_z(broken, repaired, n, d) > z, -1.0, estimate),
        bisect(lambda d: tango_z(broken, repaired, n, d) > -z, estimate, 1.0),
    )


def bisect(above: Callable[[float], bool], low: float, high: float, steps: int = 60) -> float:
    """The point in [low, high] where `above` turns from true to false."""
    for _ in range(steps):
        middle = (low + high) / 2
        if above(middle):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def newcombe(both_succeed: int, broken: int, repaired: int, both_fail: int, confidence: float = CONFIDENCE) -> Interval:
    """Newcombe's method 10 for Δ: conservative, published worked examples; shown beside Tango."""
    a, b, r, d = both_succeed, broken, repaired, both_fail
    n = a + b + r + d
    other, reference = (a + r) / n, (a + b) / n
    other_low, other_high = wilson(a + r, n, confidence)
    reference_low, reference_high = wilson(a + b, n, confidence)
    margins = (a + r) * (b + d) * (a + b) * (r + d)
    agreement: float = a * d - b * r
    if agreement > 0:
        agreement = max(agreement - n / 2, 0)
    phi = agreement / math.sqrt(margins) if margins else 0.0
    down = (other - other_low, reference_high - reference)
    up = (other_high - other, reference - reference_low)
    half = [math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0)) for x, y in (down, up)]
    return other - reference - half[0], other - reference + half[1]


def newcombe_independent(k1: int, n1: int, k2: int, n2: int, confidence: float = CONFIDENCE) -> Interval:
    """Interval for p₁ − p₂ of two *independent* samples (Newcombe, Stat. Med. 17 (1998) 873, method 10).

    For results that cannot be paired; about twice as wide as the paired interval where most pairs agree.
    """
    p1, p2 = k1 / n1, k2 / n2
    low1, high1 = wilson(k1, n1, confidence)
    low2, high2 = wilson(k2, n2, confidence)
    return p1 - p2 - math.hypot(p1 - low1, high2 - p2), p1 - p2 + math.hypot(high1 - p1, p2 - low2)


def noninferiority_p(broken: int, repaired: int, n: int, margin: float) -> float:
    """One-sided p-value of H0: Δ ≤ −margin (Tango score)."""
    return 1 - NormalDist().cdf(tango_z(broken, repaired, n, -margin))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, largest)
    return adjusted


# power
# ------------------------------------------------------------------------------------------------------------


def mcnemar_power(n: int, discordance: float, delta: float, alpha: float = 0.05) -> float:
    """Exact power of exact McNemar with n pairs at discordance ψ and true Δ (|Δ| ≤ ψ), by enumeration."""
    if discordance <= 0:
        return 0.0
    discordant = _plausible(n, discordance)
    one_way = (discordance + abs(delta)) / (2 * discordance)
    # largest c with 2·P[Bin(D, ½) ≤ c] ≤ alpha
    critical = np.floor(np.nan_to_num(bdtrik(alpha / 2, discordant, 0.5), nan=0.0)) + 1
    for _ in range(2):  # bdtrik is exact to rounding only
        critical = np.where(2 * _binomial_cdf(critical, discordant, 0.5) <= alpha, critical, critical - 1)
    rejects = _binomial_cdf(critical, discordant, one_way) + _binomial_cdf(critical, discordant, 1 - one_way)
    return float(np.sum(_binomial_pmf(discordant, n, discordance) * rejects))


def minimum_detectable_difference(n: int, discordance: float, power: float = 0.8) -> float | None:
    """Smallest |Δ| that exact McNemar finds with `power` among n pairs; None if none can be (|Δ| cannot exceed ψ)."""
    if n == 0 or mcnemar_power(n, discordance, discordance) < power:
        return None
    return bisect(lambda d: mcnemar_power(n, discordance, d) < power, 0.0, discordance)


def smallest_one_way_difference(n: int, power: float = 0.8) -> float | None:
    """Smallest |Δ| that n pairs find with `power` if every discordant pair goes the same way (ψ = |Δ|).

    None below 6 pairs.
    """
    if mcnemar_power(n, 1.0, 1.0) < power:
        return None
    return bisect(lambda d: mcnemar_power(n, d, d) < power, 0.0, 1.0)


def detectable_drop(p: float, n: int, n_other: int, power: float = 0.8) -> float | None:
    """Smallest drop from rate `p` that a two-sided 5 % test on two *independent* samples finds with `power`.

    Rate `p` is of `n` episodes. None if not even a drop to 0 is found.
    z·√(p̄q̄/n + p̄q̄/n′) + z_power·√(pq/n + p′q′/n′), Fleiss, 3rd ed., 4.2.
    """

    def missed(drop: float) -> bool:
        other, share = p - drop, 1 / n + 1 / n_other
        pooled = (n * p + n_other * other) / (n + n_other)
        own = p * (1 - p) / n + other * (1 - other) / n_other
        needed = normal_quantile() * math.sqrt(pooled * (1 - pooled) * share)
        return drop < needed + NormalDist().inv_cdf(power) * math.sqrt(own)

    return None if missed(p) else bisect(missed, 0.0, p)


def noninferiority_power(n: int, discordance: float, margin: float) -> float:
    """Chance that n pairs show non-inferiority at `margin` when the arms are truly equal (Δ = 0), by enumeration."""
    discordant = _plausible(n, discordance)[:, None]
    repaired = np.arange(discordant.max() + 1)[None, :]
    broken = np.maximum(discordant - repaired, 0)
    shown = tango_zs(broken, np.minimum(repaired, discordant), n, -margin) > normal_quantile()
    given = (_binomial_pmf(np.minimum(repaired, discordant), discordant, 0.5) * (repaired <= discordant) * shown).sum(
        axis=1
    )
    return float(_binomial_pmf(discordant[:, 0], n, discordance) @ given)


def pairs_for_noninferiority(discordance: float, margin: float, power: float = 0.8) -> int:
    """Pairs, to the next ten, that show non-inferiority at `margin` with `power` when the arms are truly equal."""
    # (z_0.975 + z_power)² ψ / δ²: close enough where the enumeration would take seconds
    approximate = (normal_quantile() + NormalDist().inv_cdf(power)) ** 2 * discordance / margin**2
    if approximate > ENUMERABLE_PAIRS:
        return 10 * math.ceil(approximate / 10)
    low, high = 0, 1
    while noninferiority_power(10 * high, discordance, margin) < power:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if noninferiority_power(10 * middle, discordance, margin) < power else (low, middle)
    return 10 * high


def _plausible(n: int, discordance: float) -> np.ndarray:
    """Counts of discordant pairs that hold all but 1e-9 of the probability."""
    below = _binomial_cdf(np.arange(n + 1), n, discordance)
    return np.arange(np.searchsorted(below, 5e-10), np.searchsorted(below, 1 - 5e-10) + 1)


# scipy.stats has these two as well, and takes seconds to import, which every `qlibero run` would pay
def _binomial_cdf(k: np.ndarray, n: np.ndarray | int, p: float) -> np.ndarray:
    return np.asarray(np.where(k < 0, 0.0, bdtr(np.maximum(k, 0), n, p)))


def _binomial_pmf(k: np.ndarray, n: np.ndarray | int, p: float) -> np.ndarray:
    n = np.asarray(n, dtype=float)
    return np.asarray(np.exp(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) + xlogy(k, p) + xlog1py(n - k, -p)))
