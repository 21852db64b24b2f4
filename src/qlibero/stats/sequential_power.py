"""What a group-sequential test will cost and find, by exact enumeration instead of simulation.

Between two looks the numbers of broken and repaired pairs grow by a trinomial; the joint distribution of both, on the
paths that have not stopped yet, is carried from look to look by convolution. So size, power and expected pairs are
exact up to rounding and 1e-9 of tail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.special import gammaln, ndtri, xlogy

from qlibero.stats.group_sequential import critical_values, declared_looks, evidence, hopeless

_TAIL = 7.0  # standard deviations of a count that are followed
_MOST_FLIPS = 150  # in all pairs, as far as `pairs_needed` enumerates


@dataclass(frozen=True)
class Prospect:
    """Chances of the four ways a test ends (they add up to 1) and the pairs it takes on average."""

    noninferior: float
    inferior: float
    futile: float
    undecided: float
    expected_pairs: float


def prospect(
    looks: tuple[int, ...],
    *,
    margin: float,
    discordance: float,
    delta: float = 0.0,
    alpha: float = 0.025,
    futility: float | None = 0.1,
) -> Prospect:
    """How a test with these looks ends when a share `discordance` of the pairs flips and the arm truly differs by
    `delta` (|delta| ≤ discordance)."""
    critical = critical_values(looks, alpha)
    shares = (discordance - delta) / 2, (discordance + delta) / 2
    going, before = np.ones((1, 1)), 0  # [broken, repaired] of the paths that go on
    noninferior = inferior = futile = expected = 0.0
    for n, bar in zip(looks, critical, strict=True):
        size = _most(n, max(shares))
        going = _convolved(going, _trinomial(n - before, shares), size)
        broken, repaired = np.indices(going.shape)
        up, down = evidence((broken, repaired), (broken, repaired), n, margin)
        passes = up >= bar
        fails = (down >= bar) & ~passes
        stops = passes | fails
        noninferior += going[passes].sum()
        inferior += going[fails].sum()
        if futility is not None and n < looks[-1]:
            counts = broken, repaired
            gives_up = hopeless(counts, counts, n, looks[-1], margin, critical[-1], futility) & ~stops
            futile += going[gives_up].sum()
            stops |= gives_up
        expected += n * going[stops].sum()
        going[stops] = 0.0
        before = n
    undecided = going.sum()
    expected += before * undecided
    return Prospect(*(float(x) for x in (noninferior, inferior, futile, undecided, expected)))


def pairs_needed(
    *,
    margin: float,
    discordance: float,
    looks: int,
    block: int,
    alpha: float = 0.025,
    futility: float | None = 0.1,
    power: float = 0.8,
) -> int:
    """Pairs to declare, in whole blocks, for "non-inferior" with `power` at truly equal arms.

    Too many flips to enumerate in a second are scaled from fewer: how much more looks take than one look at the end
    hardly depends on ψ.
    """
    goal = float(ndtri(power) - ndtri(alpha))
    fixed = goal**2 * discordance / margin**2
    if fixed * discordance > _MOST_FLIPS:
        smaller = 0.99 * margin * math.sqrt(_MOST_FLIPS) / goal
        needed = partial(pairs_needed, margin=margin, discordance=smaller, block=block, alpha=alpha, power=power)
        cost = needed(looks=looks, futility=futility) / needed(looks=1, futility=None)
        return block * math.ceil(cost * fixed / block)

    def found(blocks: int) -> float:
        declared = declared_looks(blocks * block, looks, block)
        chances = prospect(declared, margin=margin, discordance=discordance, alpha=alpha, futility=futility)
        return chances.noninferior

    # power ≈ Φ(a·√n − z_α), so each guess gives the next; then to the smallest that does
    spent = -float(ndtri(alpha))
    blocks, tried = math.ceil(1.06 * fixed / block), set[int]()
    while blocks not in tried:
        tried.add(blocks)
        now = min(max(found(blocks), 1e-3), 1 - 1e-9)
        blocks = max(1, math.ceil(blocks * (goal / (float(ndtri(now)) + spent)) ** 2))
    while found(blocks) < power:
        blocks += 1
    while blocks > 1 and found(blocks - 1) >= power:
        blocks -= 1
    return blocks * block


def _most(n: int, share: float) -> int:
    """The largest count followed among n pairs."""
    return min(n, math.ceil(n * share + _TAIL * math.sqrt(n * share) + _TAIL)) + 1


def _trinomial(n: int, shares: tuple[float, float]) -> np.ndarray:
    broken, repaired = np.indices((_most(n, max(shares)),) * 2)
    rest = n - broken - repaired
    possible = rest >= 0
    rest = np.maximum(rest, 0)
    log = gammaln(n + 1) - gammaln(broken + 1) - gammaln(repaired + 1) - gammaln(rest + 1)
    log += xlogy(broken, shares[0]) + xlogy(repaired, shares[1]) + xlogy(rest, 1 - sum(shares))
    return np.where(possible, np.exp(log), 0.0)


def _convolved(first: np.ndarray, second: np.ndarray, size: int) -> np.ndarray:
    """The full 2-D convolution, cut to (size, size)."""
    shape = tuple(a + b - 1 for a, b in zip(first.shape, second.shape, strict=True))
    product = np.fft.irfft2(np.fft.rfft2(first, shape) * np.fft.rfft2(second, shape), shape)
    return np.maximum(product[:size, :size], 0.0)
