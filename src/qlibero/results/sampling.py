"""Which question an interval answers: what would be drawn anew if the evaluation were repeated.

    these      these tasks and initial states, with new seeds: pairs are the units
    new_inits  new initial states of these tasks: (suite, task, init) is the unit; with one seed the same as `these`
    new_tasks  new tasks like these: (suite, task) is the unit, and ten tasks are ten units

Units of several pairs are clusters. Their design effect D, the variance of Δ between clusters over that between pairs
(Kish 1965; the ratio estimator's linearisation), turns counts into effective ones, b/D, r/D and n/D, which Tango's
interval then takes with Student's quantile of clusters − 1 degrees of freedom (Rao and Scott, Biometrics 48 (1992)
577, for proportions). D is never below 1, so a cluster interval is never narrower than that of independent pairs, and
no luck makes its width zero. Against the mean of several references a pair's difference is a fraction, and its
variance less than that of a whole flip: that is a D below 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, get_args

from scipy.special import stdtr, stdtrit

from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError
from qlibero.results.statistics import CONFIDENCE, Interval, mcnemar_exact, normal_quantile, tango, tango_z

Estimand = Literal["these", "new_inits", "new_tasks"]
DEFAULT_ESTIMAND: Estimand = "new_inits"
Step = tuple[EpisodeKey, float]  # an episode and outcome of the arm − (mean) outcome of the reference, in [−1, 1]

UNIT: dict[Estimand, Callable[[EpisodeKey], object]] = {
    "these": lambda key: key,
    "new_inits": lambda key: (key.suite, key.task, key.init),
    "new_tasks": lambda key: (key.suite, key.task),
}


def check_estimand(estimand: str) -> Estimand:
    """The estimand itself, or a UserError that lists them."""
    if estimand not in get_args(Estimand):
        raise UserError(f"estimand {estimand}: write one of {', '.join(get_args(Estimand))}")
    return estimand


@dataclass(frozen=True)
class Sample:
    """What the pairs amount to as evidence about Δ. `broken` and `repaired` are sums of losses and of gains, whole
    numbers against a single reference; `clusters` is None where pairs are the units; `design_effect` is D."""

    pairs: int
    broken: float
    repaired: float
    clusters: int | None = None
    design_effect: float = 1.0

    @property
    def delta(self) -> float | None:
        return (self.repaired - self.broken) / self.pairs if self.pairs else None

    @property
    def interval(self) -> Interval | None:
        """95 %, for Δ; None without pairs, (−1, 1) from a single cluster, which says nothing about others."""
        if not self.pairs:
            return None
        if self.clusters == 1:
            return -1.0, 1.0
        return tango(*self._effective, quantile=self._quantile)

    def noninferiority_p(self, margin: float) -> float | None:
        """One-sided p-value of H0: Δ ≤ −margin; it is below 0.025 exactly where the interval lies above −margin."""
        return self._above(-margin)

    @property
    def difference_p(self) -> float | None:
        """Two-sided p-value of Δ = 0: McNemar's exact test for whole flips of independent pairs, else the score's."""
        if self.clusters is None and self.design_effect == 1:
            return mcnemar_exact(int(self.broken), int(self.repaired)) if self.pairs else None
        p = self._above(0.0)
        return None if p is None else 2 * min(p, 1 - p)

    def _above(self, delta: float) -> float | None:
        if not self.pairs:
            return None
        if self.clusters == 1:
            return 1.0
        z = tango_z(*self._effective, delta)
        return 1 - (NormalDist().cdf(z) if self.clusters is None else float(stdtr(self.clusters - 1, z)))

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
    flips, squares = broken + repaired, sum(d * d for d in differences)
    fraction = squares / flips if flips else 1.0
    clusters: dict[object, list[float]] = defaultdict(list)
    for key, step in steps:
        clusters[UNIT[estimand](key)].append(step)
    if len(clusters) == n:
        return Sample(n, broken, repaired, None, fraction)
    if len(clusters) == 1:
        return Sample(n, broken, repaired, 1, fraction)
    delta = (repaired - broken) / n
    between = sum((sum(of) - delta * len(of)) ** 2 for of in clusters.values()) * len(clusters) / (len(clusters) - 1)
    within = squares - n * delta * delta
    ratio = between / within if within > 1e-12 else 1.0
    return Sample(n, broken, repaired, len(clusters), fraction * max(1.0, ratio))


def population(estimand: Estimand, tasks: int) -> str:
    """What the answer is about, in words."""
    these = "this task" if tasks == 1 else f"these {tasks} tasks"
    return {
        "these": f"{these} and initial states",
        "new_inits": f"new initial states of {these}",
        "new_tasks": f"new tasks like {these}",
    }[estimand]
