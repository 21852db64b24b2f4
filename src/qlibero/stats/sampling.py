"""Which question an interval answers: what would be drawn anew if the evaluation were repeated.

    these      these tasks and initial states, with new seeds: pairs are the units
    new_inits  new initial states of these tasks: the initial state is the unit; with one seed the same as `these`
    new_tasks  new tasks like these: (suite, task) is the unit, and ten tasks are ten units

Units of several pairs are clusters. Their design effect D, the variance of Δ between clusters over that between pairs
(Kish 1965; the ratio estimator's linearisation), turns counts into effective ones, b/D, r/D and n/D, which Tango's
interval then takes with Student's quantile of clusters − 1 degrees of freedom (Rao and Scott, Biometrics 48 (1992)
577, for proportions). D is never below 1, so a cluster interval is never narrower than that of independent pairs, and
no luck makes its width zero. Flips come in clumps then, and few of them are skewed: at the lower end half an effective
pair more counts against the arm, at the upper end one more in its favour. Against the mean of several references a
pair's difference is a fraction, and `scores.py` takes the place of Tango's statistic.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from scipy.special import stdtr, stdtrit

from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError
from qlibero.stats.proportions import (
    CONFIDENCE,
    Interval,
    bisect,
    favoured,
    mcnemar_exact,
    normal_quantile,
    tango,
    tango_z,
)
from qlibero.stats.scores import score_zs

IN_FAVOUR, AGAINST = 1.0, 0.5  # effective pairs more that "inferior" and "non-inferior" of clusters must stand
EDGE = 1e-9  # a mean of −1 or 1 leaves nothing to vary

Estimand = Literal["these", "new_inits", "new_tasks"]
DEFAULT_ESTIMAND: Estimand = "new_inits"
Step = tuple[EpisodeKey, float]  # an episode and outcome of the arm − (mean) outcome of the reference, in [−1, 1]

UNIT: dict[Estimand, Callable[[EpisodeKey], object]] = {
    "these": lambda key: key,
    "new_inits": lambda key: key.initial_state,
    "new_tasks": lambda key: (key.suite, key.task),
}


def check_estimand(estimand: str) -> Estimand:
    """The estimand itself, or a UserError that lists them."""
    for known in UNIT:
        if estimand == known:
            return known
    raise UserError(f"estimand {estimand}: write one of {', '.join(UNIT)}")


@dataclass(frozen=True)
class Sample:
    """What the pairs amount to as evidence about Δ. `broken` and `repaired` are sums of losses and of gains, whole
    numbers against a single reference; `clusters` is None where pairs are the units; `design_effect` is D ≥ 1;
    `fractions` counts each difference against the mean of several references, and is empty against one."""

    pairs: int
    broken: float
    repaired: float
    clusters: int | None = None
    design_effect: float = 1.0
    fractions: tuple[tuple[float, int], ...] = ()

    @property
    def delta(self) -> float | None:
        return (self.repaired - self.broken) / self.pairs if self.pairs else None

    @property
    def interval(self) -> Interval | None:
        """95 %, for Δ; None without pairs, (−1, 1) from a single cluster, which says nothing about others."""
        delta = self.delta
        if delta is None:
            return None
        if self.clusters == 1:
            return -1.0, 1.0
        if self.clusters is None and not self.fractions:
            return tango(self.broken, self.repaired, self.pairs)
        return (
            bisect(lambda d: self._z(d, -AGAINST) > self._quantile, -1 + EDGE, delta),
            bisect(lambda d: self._z(d, IN_FAVOUR) > -self._quantile, delta, 1 - EDGE),
        )

    def noninferiority_p(self, margin: float) -> float | None:
        """One-sided p-value of H0: Δ ≤ −margin; it is below 0.025 exactly where the interval lies above −margin."""
        return self._p(-margin, -AGAINST) if self.pairs else None

    @property
    def difference_p(self) -> float | None:
        """Two-sided p-value of Δ = 0: McNemar's exact test for whole flips of independent pairs, else the score's."""
        if self.clusters is None and not self.fractions:
            return mcnemar_exact(int(self.broken), int(self.repaired)) if self.pairs else None
        if not self.pairs or self.clusters == 1:
            return 1.0 if self.pairs else None
        return min(1.0, 2 * min(self._p(0.0, -AGAINST), 1 - self._p(0.0, IN_FAVOUR)))

    def _p(self, delta: float, correction: float) -> float:
        """One-sided, of H0: Δ ≤ `delta`."""
        if self.clusters == 1:
            return 1.0
        z = self._z(delta, correction)
        return 1 - (NormalDist().cdf(z) if self.clusters is None else float(stdtr(self.clusters - 1, z)))

    def _z(self, delta: float, correction: float) -> float:
        """The statistic of H0: Δ = `delta`; of clusters with `correction` effective pairs more in the arm's favour."""
        if not self.fractions:
            broken, repaired, n = self._effective
            if self.clusters is not None:
                broken, repaired = map(float, favoured(broken, repaired, n, correction))
            return tango_z(float(broken), float(repaired), n, delta)
        values, counts = np.array([(-1, 0), *self.fractions, (1, 0)]).T
        return float(score_zs(values, counts[None, :], delta)[0]) / math.sqrt(self.design_effect)

    @property
    def _effective(self) -> tuple[float, float, float]:
        d = self.design_effect
        return self.broken / d, self.repaired / d, self.pairs / d

    @property
    def _quantile(self) -> float:
        upper = 0.5 + CONFIDENCE / 2
        return normal_quantile() if self.clusters is None else float(stdtrit(self.clusters - 1, upper))


def sample(steps: Sequence[Step], estimand: Estimand = DEFAULT_ESTIMAND) -> Sample:
    """The evidence in `steps` for the question `estimand`."""
    n, differences = len(steps), [step for _, step in steps]
    broken, repaired = -sum(d for d in differences if d < 0), sum(d for d in differences if d > 0)
    whole = all(d in (-1, 0, 1) for d in differences)
    fractions = () if whole else tuple(sorted(Counter(round(d, 9) for d in differences).items()))
    clusters: dict[object, list[float]] = defaultdict(list)
    for key, step in steps:
        clusters[UNIT[estimand](key)].append(step)
    if len(clusters) in (n, 1):
        return Sample(n, broken, repaired, None if len(clusters) == n else 1, 1.0, fractions)
    sums, sizes = np.array([(sum(of), len(of)) for of in clusters.values()]).T
    d = design_effect(sums, sizes, sum(d * d for d in differences))
    return Sample(n, broken, repaired, len(clusters), float(d), fractions)


def design_effect(sums: np.ndarray, sizes: np.ndarray, squares: np.ndarray | float) -> np.ndarray:
    """D of clusters with `sums` (…, clusters) of differences over `sizes` pairs; `squares` (…) are summed over all."""
    clusters, n = sums.shape[-1], sizes.sum(axis=-1)
    delta = sums.sum(axis=-1) / n
    between = ((sums - delta[..., None] * sizes) ** 2).sum(axis=-1) * clusters / (clusters - 1)
    within = squares - n * delta * delta
    return np.where(within > 1e-12, np.maximum(1.0, between / np.maximum(within, 1e-12)), 1.0)


def population(estimand: Estimand, tasks: int) -> str:
    """What the answer is about, in words."""
    these = "this task" if tasks == 1 else f"these {tasks} tasks"
    return {
        "these": f"{these} and initial states",
        "new_inits": f"new initial states of {these}",
        "new_tasks": f"new tasks like {these}",
    }[estimand]
