"""A test that is looked at a declared number of times: critical values, evidence, interval and futility at a look.

The looks, in pairs, are fixed before the run. Lan and DeMets' spending function of O'Brien and Fleming's kind says how
much of α may be used up by the time a share t of the pairs has run, α*(t) = 2 − 2Φ(z_{1−α/2}/√t); the critical values
follow from the joint distribution of the statistic at all looks (Armitage, McPherson and Rowe's recursion), so looks
need not be equally spaced. Each direction, "non-inferior" and "inferior", spends an α of its own.

The statistic is Tango's score at the margin. Near ψ = margin its distribution is skewed towards losses, and "inferior"
would be wrong in up to 3.6 % at α = 2.5 %; there one pair more is counted in the arm's favour, a continuity correction
of one step, which brings that below 2.5 % everywhere (docs/statistics.md has the exact sizes). "Non-inferior" would be
wrong in up to 3.1 % of designs of few pairs; there a quarter of a pair more counts against the arm.

Sources: Lan & DeMets, Biometrika 70 (1983) 659; O'Brien & Fleming, Biometrics 35 (1979) 549; Jennison & Turnbull,
"Group Sequential Methods" (2000), ch. 7 (spending), 9 (repeated confidence intervals), 10 (conditional power).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr, ndtri

from qlibero.stats.proportions import Interval, bisect, favoured, tango_zs

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(201)  # the recursion's quadrature: critical values good to 1e-6
_FAR = 8.0  # standard deviations that count as all of the distribution

IN_FAVOUR, AGAINST = 1.0, 0.25  # pairs more that "inferior" and "non-inferior" must stand

Counts = tuple[np.ndarray | int, np.ndarray | int]  # broken, repaired


def declared_looks(pairs: int, looks: int, block: int) -> tuple[int, ...]:
    """Up to `looks` numbers of pairs at which to look, evenly spread over whole blocks of `block`; the last is `pairs`.

    Fewer blocks than looks give a look at every block.
    """
    spread = {max(1, round(k * pairs / looks / block)) * block for k in range(1, looks + 1)}
    return (*sorted(n for n in spread if n < pairs), pairs)


@functools.lru_cache(maxsize=64)
def critical_values(looks: tuple[int, ...], alpha: float) -> tuple[float, ...]:
    """The z that the statistic must reach at each look, one-sided `alpha` over all looks together."""
    times = np.array(looks, dtype=np.float64) / looks[-1]
    spent = 2 * ndtr(ndtri(alpha / 2) / np.sqrt(times))
    found: list[float] = []
    nodes = weighted = np.zeros(0)  # of the statistic times √t, a Brownian motion, on the paths that have not stopped
    for k, (time, share) in enumerate(zip(times, np.diff(spent, prepend=0.0), strict=True)):
        step = np.sqrt(time - (times[k - 1] if k else 0.0))
        bar = _crossing(nodes, weighted, step, share, 12 * np.sqrt(time)) if k else float(-ndtri(share)) * step
        found.append(bar / np.sqrt(time))
        low, high = -_FAR * np.sqrt(time), min(bar, _FAR * np.sqrt(time))
        after = low + (high - low) * (_NODES + 1) / 2
        density = _normal(after[:, None] - nodes[None, :], step) @ weighted if k else _normal(after, step)
        nodes, weighted = after, density * _WEIGHTS * (high - low) / 2
    return tuple(found)


def _crossing(nodes: np.ndarray, weighted: np.ndarray, step: float, share: float, most: float) -> float:
    """Where the next value of the Brownian motion lies above with probability `share`."""
    return bisect(lambda value: float(weighted @ ndtr((nodes - value) / step)) > share, 0.0, most)


def _normal(x: np.ndarray, sd: float) -> np.ndarray:
    density: np.ndarray = np.exp(-0.5 * (x / sd) ** 2) / (sd * np.sqrt(2 * np.pi))
    return density


def evidence(low: Counts, high: Counts, n: int, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """z for "non-inferior" and z for "inferior", each to be compared with the look's critical value.

    `low` and `high` are (broken, repaired) at worst and at best for the arm, where errors leave that open; arrays of
    equal shape or numbers.
    """
    return _above(low, n, -margin), _below(high, n, -margin)


def _above(low: Counts, n: int, delta: float) -> np.ndarray:
    return tango_zs(*favoured(*low, n, -AGAINST), n, delta)


def _below(high: Counts, n: int, delta: float) -> np.ndarray:
    return -tango_zs(*favoured(*high, n, IN_FAVOUR), n, delta)


def repeated_interval(low: Counts, high: Counts, n: int, critical: float) -> Interval:
    """The repeated confidence interval for Δ of a look: all differences its test would not reject.

    Holds at all looks at once with 1 − 2α, so it may be read whenever it is shown; above −margin exactly where
    `evidence` says "non-inferior", below exactly where it says "inferior".
    """
    estimate = [(int(repaired) - int(broken)) / n for broken, repaired in (low, high)]
    return (
        bisect(lambda d: bool(_above(low, n, d) >= critical), -1.0, estimate[0]),
        bisect(lambda d: bool(_below(high, n, d) < critical), min(1.0, estimate[1]), 1.0),
    )


def hopeless(low: Counts, high: Counts, n: int, last: int, margin: float, critical: float, chance: float) -> np.ndarray:
    """Whether neither verdict has `chance` left: conditional power at the last look, of `last` pairs, is below it both
    for "non-inferior" if the arms are truly equal and for "inferior" if the arm truly loses twice the margin.

    ψ is taken from the pairs so far, one flip more. `low` and `high` as in `evidence`; here errors count in favour of
    the verdict in question, so that they end nothing. Non-binding: the critical values do not rely on it.
    """
    time = n / last

    def power(counts: Counts, sign: int) -> np.ndarray:
        broken, repaired = map(np.asarray, counts)
        now = sign * tango_zs(broken, repaired, n, -margin) * np.sqrt(time)
        drift = margin * np.sqrt(last * (n + 2) / (broken + repaired + 1))
        reached: np.ndarray = ndtr((now + drift * (1 - time) - critical) / np.sqrt(1 - time))
        return reached

    return (power(high, 1) < chance) & (power(low, -1) < chance)


def counts_at(steps: Sequence[int], looks: Sequence[int]) -> list[tuple[int, int]]:
    """(broken, repaired) among the first pairs, up to each look."""
    x = np.asarray(steps)
    return [(int((x[:n] == -1).sum()), int((x[:n] == 1).sum())) for n in looks]
