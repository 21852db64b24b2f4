"""One episode in flight: what the engine must remember between two answers of its simulator.

An episode never sees the batch, the worker or the other episodes: everything it adds to a policy call (observation,
noise) and everything it leaves in the ledger is its own.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qlibero.episode_key import EpisodeKey
from qlibero.policies.base import Chunk, Observation
from qlibero.results.records import EpisodeRecord
from qlibero.run.noise import call_noise
from qlibero.run.pace import Chunks


@dataclass(frozen=True)
class PlannedEpisode:
    """An episode of one arm. `block` orders groups of episodes that a sequential test wants finished first."""

    arm: str
    key: EpisodeKey
    block: int = 0


@dataclass
class RunningEpisode:
    planned: PlannedEpisode
    attempt: int
    chunks: Chunks
    calls: int = 0
    observation: Observation | None = None
    policy_ms: list[float] = field(default_factory=list)
    phases_ms: dict[str, list[float]] = field(default_factory=dict)
    batch_sizes: list[int] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def noise(self, shape: tuple[int, int]) -> np.ndarray:
        return call_noise(self.planned.key, self.calls, shape)

    def record_call(self, chunk: Chunk, policy_ms: float, batch_size: int) -> None:
        """Book one policy call; `policy_ms` is the latency of its batch of `batch_size` episodes."""
        self.calls += 1
        self.observation = None
        self.policy_ms.append(round(policy_ms, 3))
        self.batch_sizes.append(batch_size)
        for phase, ms in chunk.phases_ms.items():
            self.phases_ms.setdefault(phase, []).append(round(ms, 3))

    def record(
        self, success: bool, steps: int, fingerprint: str, trajectory: np.ndarray, sim_ms: float, render_ms: float
    ) -> EpisodeRecord:
        """Ledger line of a finished episode. `trajectory` is (steps, 10) float32: executed action 7, eef position 3."""
        return self._record(
            outcome="success" if success else "failure",
            steps=steps,
            fingerprint=fingerprint,
            action_digest=action_digest(trajectory[:, :7]),
            success_step=steps if success else None,
            sim_ms=round(sim_ms, 1),
            render_ms=round(render_ms, 1),
        )

    def error_record(self, reason: str) -> EpisodeRecord:
        """The ledger line of an episode no attempt could finish: a third outcome, neither success nor failure."""
        return self._record(outcome="error", error=reason, steps=0, fingerprint="", action_digest="")

    def _record(self, **outcome: Any) -> EpisodeRecord:
        key = self.planned.key
        return EpisodeRecord(
            suite=key.suite,
            task=key.task,
            init=key.init,
            inits=key.inits,
            seed=key.seed,
            arm=self.planned.arm,
            attempt=self.attempt,
            replans=self.calls,
            policy_ms=self.policy_ms,
            phases_ms=self.phases_ms,
            batch_sizes=self.batch_sizes,
            wall_s=round(time.monotonic() - self.started, 3),
            **outcome,
        )


def action_digest(actions: np.ndarray) -> str:
    """sha256 of the executed actions, (steps, 7) as little-endian float32: equal digests mean equal action streams."""
    return hashlib.sha256(np.ascontiguousarray(actions, dtype="<f4").tobytes()).hexdigest()
