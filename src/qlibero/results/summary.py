"""One arm in numbers: successes with their interval, errors, latency percentiles. What `run` prints last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qlibero.results.machines import is_mixed, machines_of
from qlibero.results.records import EpisodeRecord
from qlibero.results.statistics import wilson

PERCENTILES = (50, 95, 99)


def counts(records: Iterable[EpisodeRecord]) -> tuple[int, int, int]:
    """(successes, finished episodes, errors). An error is no episode: it is neither success nor failure."""
    outcomes = [r.outcome for r in records]
    errors = outcomes.count("error")
    return outcomes.count("success"), len(outcomes) - errors, errors


def policy_calls_ms(records: Iterable[EpisodeRecord]) -> np.ndarray:
    """Milliseconds of every policy call of an episode, as it waits for it; warm-up calls belong to none."""
    return np.array([ms for r in records for ms in r.policy_ms], dtype=np.float64)


def phase_calls_ms(records: Iterable[EpisodeRecord]) -> dict[str, np.ndarray]:
    """The same per phase (`preprocess`, `vision`, `prefix`, `flow`, …), in order of first appearance."""
    phases: dict[str, list[float]] = {}
    for r in records:
        for phase, values in r.phases_ms.items():
            phases.setdefault(phase, []).extend(values)
    return {phase: np.array(values, dtype=np.float64) for phase, values in phases.items()}


def percentiles(values: np.ndarray | Sequence[float]) -> dict[str, float] | None:
    """{"p50": …, "p95": …, "p99": …}, linear interpolation; None without values."""
    if len(values) == 0:
        return None
    return {f"p{p}": round(float(x), 3) for p, x in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def summarize_arm(records: Sequence[EpisodeRecord]) -> dict[str, Any]:
    """{"successes": k, "episodes": n, "errors": e, "wilson95": [lo, hi] | None, "latency_ms": {…} | None}, and
    "machines", {kind: episodes}, where they come from machines that answer differently."""
    k, n, errors = counts(records)
    return {
        "successes": k,
        "episodes": n,
        "errors": errors,
        "wilson95": [round(x, 6) for x in wilson(k, n)] if n else None,
        "latency_ms": percentiles(policy_calls_ms(records)),
        **({"machines": machines_of(records)} if is_mixed(records) else {}),
    }
