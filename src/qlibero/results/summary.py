"""One arm in numbers: successes with their interval, errors, latency percentiles. What `run` prints last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qlibero.documents import JsonObject
from qlibero.results.machines import is_mixed, machines_of
from qlibero.results.records import EpisodeRecord
from qlibero.stats.proportions import Interval, wilson


def counts(records: Iterable[EpisodeRecord]) -> tuple[int, int, int]:
    """(successes, finished episodes, errors). An error is no episode: it is neither success nor failure."""
    outcomes = [r.outcome for r in records]
    errors = outcomes.count("error")
    return outcomes.count("success"), len(outcomes) - errors, errors


@dataclass(frozen=True)
class Calls:
    """Times of policy calls in ms with their weights: an episode's share of the batch, so that a batch counts once."""

    ms: np.ndarray
    weights: np.ndarray

    @property
    def count(self) -> float:
        return float(self.weights.sum())

    @property
    def mean(self) -> float:
        return float(np.average(self.ms, weights=self.weights))

    def percentile(self, *p: float) -> list[float]:
        """Weighted percentiles, linear between the middles of the weights: numpy's own where all weights are equal."""
        order, share = np.argsort(self.ms, kind="stable"), np.array(p) / 100
        places = np.cumsum(self.weights[order]) - self.weights[order] / 2
        wanted = places[0] + share * (places[-1] - places[0])
        return [float(x) for x in np.interp(wanted, places, self.ms[order])]

    def __len__(self) -> int:
        return len(self.ms)


def policy_calls(records: Iterable[EpisodeRecord]) -> Calls:
    """Every policy call; warm-up calls belong to no episode."""
    found = [(ms, 1 / size) for r in records for ms, size in zip(r.policy_ms, _sizes(r), strict=True)]
    return _calls(found)


def phase_calls(records: Iterable[EpisodeRecord]) -> dict[str, Calls]:
    """The same per phase (`preprocess`, `vision`, `prefix`, `flow`, …), in order of first appearance."""
    phases: dict[str, list[tuple[float, float]]] = {}
    for r in records:
        for phase, values in r.phases_ms.items():
            sizes = _sizes(r) if len(values) == len(r.policy_ms) else [1] * len(values)
            phases.setdefault(phase, []).extend((ms, 1 / size) for ms, size in zip(values, sizes, strict=True))
    return {phase: _calls(found) for phase, found in phases.items()}


def _calls(found: list[tuple[float, float]]) -> Calls:
    array = np.array(found, dtype=np.float64).reshape(-1, 2)
    return Calls(array[:, 0], array[:, 1])


def _sizes(record: EpisodeRecord) -> list[int]:
    """How many episodes shared each call; records of earlier versions do not say."""
    same = len(record.batch_sizes) == len(record.policy_ms)
    return record.batch_sizes if same else [1] * len(record.policy_ms)


def calls(records: Iterable[EpisodeRecord]) -> float:
    """How many policy calls there were."""
    return policy_calls(records).count


class Percentiles(NamedTuple):
    """Of the time of a policy call, in ms."""

    p50: float
    p95: float
    p99: float


def percentiles(found: Calls) -> Percentiles | None:
    """None without calls."""
    return Percentiles(*(round(x, 3) for x in found.percentile(50, 95, 99))) if len(found) else None


@dataclass(frozen=True)
class ArmSummary:
    """`episodes` are the finished ones, `wilson95` their success rate's interval (None without one), `machines` how
    many come from which kind, where they come from machines that answer differently."""

    successes: int
    episodes: int
    errors: int
    wilson95: Interval | None
    latency_ms: Percentiles | None
    machines: dict[str, int] | None

    def to_json(self) -> JsonObject:
        return {
            "successes": self.successes,
            "episodes": self.episodes,
            "errors": self.errors,
            "wilson95": self.wilson95 and [round(x, 6) for x in self.wilson95],
            "latency_ms": self.latency_ms and self.latency_ms._asdict(),
            **({"machines": self.machines} if self.machines else {}),
        }


def summarize_arm(records: Sequence[EpisodeRecord]) -> ArmSummary:
    k, n, errors = counts(records)
    interval, machines = wilson(k, n) if n else None, machines_of(records) if is_mixed(records) else None
    return ArmSummary(k, n, errors, interval, percentiles(policy_calls(records)), machines)
