"""How much faster an arm answers, with an interval: per scene, at equal batch size, clustered by scene.

Calls of one episode share a scene, a moment of the machine and often a batch, so thousands of calls are no more
independent than their scenes. Two arms of one latency distribution would be called "1.06× slower" from a ratio of
pooled medians; per scene the machine's drift cancels, as an episode's arms run one after the other.

    per scene and batch size b that both arms had: log(median ms of the arm / median ms of the reference);
    their mean over b weighted by calls; the mean over scenes; percentile bootstrap over scenes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlibero.documents import JsonObject
from qlibero.results.arm_meta import ArmMeta
from qlibero.results.pairing import Arm, Pair
from qlibero.results.records import EpisodeRecord
from qlibero.stats.shifts import SEED

RESAMPLES = 4_000
FEWEST_SCENES = 5  # fewer are no interval
EQUAL = 0.02  # within ±2 % is as fast
SIMULATIONS = {"fake", "int_ref", "simulated"}  # compute a kernel's integers by other means: their time is nobody's


@dataclass(frozen=True)
class Speed:
    """`ratio`: how many times faster the arm answers than the reference (> 1 is faster), with its 95 % interval.

    None without calls at a batch size that both had. `simulation`: the arm computes what a kernel would, not as fast.
    """

    ratio: float | None
    interval: tuple[float, float] | None
    scenes: int
    simulation: bool

    @property
    def claim(self) -> str:
        """`faster`, `slower`, `as fast`, `unclear`, `simulation`, or "" where nothing can be compared."""
        if self.simulation:
            return "simulation"
        if self.ratio is None:
            return ""
        if self.interval is None:
            return "unclear"
        low, high = self.interval
        if 1 / (1 + EQUAL) <= low and high <= 1 + EQUAL:
            return "as fast"
        return "faster" if low > 1 else "slower" if high < 1 else "unclear"

    def to_json(self) -> JsonObject:
        return {
            "ratio": None if self.ratio is None else round(self.ratio, 4),
            "ratio95": None if self.interval is None else [round(x, 4) for x in self.interval],
            "scenes": self.scenes,
            "claim": self.claim,
        }


def speed(pairs: Sequence[Pair], arm: Arm) -> Speed:
    """The arm of `pairs` against their reference."""
    logs = np.array([x for pair in pairs if (x := _log_ratio(pair.reference, pair.other)) is not None])
    if not len(logs):
        return Speed(None, None, 0, is_simulation(arm.meta))
    interval = _bootstrap(logs) if len(logs) >= FEWEST_SCENES else None
    return Speed(math.exp(logs.mean()), interval, len(logs), is_simulation(arm.meta))


def is_simulation(meta: ArmMeta) -> bool:
    """Whether any layer ran on a backend that imitates a kernel's arithmetic and not its speed."""
    return not SIMULATIONS.isdisjoint(meta.executed)


def _log_ratio(reference: EpisodeRecord, other: EpisodeRecord) -> float | None:
    """log(reference's time / arm's time) of one scene; None without a common batch size."""
    left, right = _by_batch(reference), _by_batch(other)
    common = [size for size in left.keys() & right.keys() if min(left[size] + right[size]) > 0]
    if not common:
        return None
    weights = [min(len(left[size]), len(right[size])) for size in common]
    logs = [math.log(np.median(left[size]) / np.median(right[size])) for size in common]
    return float(np.average(logs, weights=weights))


def _by_batch(record: EpisodeRecord) -> dict[int, list[float]]:
    """An episode's call times by the size of the batch; records without sizes are of one call an episode."""
    sizes = record.batch_sizes if len(record.batch_sizes) == len(record.policy_ms) else [1] * len(record.policy_ms)
    found: dict[int, list[float]] = defaultdict(list)
    for size, ms in zip(sizes, record.policy_ms, strict=True):
        found[size].append(ms)
    return found


def _bootstrap(logs: np.ndarray) -> tuple[float, float]:
    random, n = np.random.default_rng(SEED), len(logs)
    means = np.concatenate(
        [
            logs[random.integers(n, size=(len(block), n))].mean(axis=1)
            for block in np.array_split(np.arange(RESAMPLES), 20)
        ]
    )
    # a percentile interval of a mean is too narrow by √((n−1)/n) and Student's share; widened by both about its middle
    low, high = np.quantile(means - logs.mean(), [0.025, 0.975]) * _small_sample(n)
    return math.exp(logs.mean() + low), math.exp(logs.mean() + high)


def _small_sample(n: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 0.975) / 1.959964 * math.sqrt(n / (n - 1)))
