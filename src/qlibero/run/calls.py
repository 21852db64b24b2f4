"""A policy call between its beginning and its answer: simulators are heard, and the next batch is prepared, while a GPU
computes.

Which rows share a call, and when it begins, decides no action (contracts 1 and 2): a row depends on itself alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from qlibero.policies.base import Begun, Chunk, Observation, Policy
from qlibero.run.episode import RunningEpisode

MAX_CALLS = 2  # begun and not answered: the device goes from one to the next without a pause
POLL_S = 0.0005  # how long simulators are listened to before the device is asked again


class PolicyCall:
    """One call for episodes of one arm, by worker; begun when it is made. `ms` is known with the answer: the time that
    the call took, not that which it stood behind another."""

    def __init__(self, arm: str, policy: Policy, episodes: Mapping[int, RunningEpisode]):
        self.arm, self.episodes = arm, episodes
        self.noise = np.stack([episode.noise(policy.noise_shape) for episode in episodes.values()])
        self.observations = [e.observation for e in episodes.values() if e.observation is not None]
        self.ms = 0.0
        self._started = time.perf_counter()
        self._begun = _beginning(policy)(self.observations, self.noise)

    def ready(self) -> bool:
        return self._begun.ready()

    def chunk(self) -> Chunk:
        """The answer; waits for it."""
        chunk = self._begun.chunk()
        self.ms = (time.perf_counter() - self._started) * 1e3
        return chunk

    def device_is_free(self) -> None:
        """The call before this one has ended."""
        self._started = time.perf_counter()


@dataclass(frozen=True)
class _Answered:
    answer: Chunk

    def ready(self) -> bool:
        return True

    def chunk(self) -> Chunk:
        return self.answer


def _beginning(policy: Policy) -> Callable[[list[Observation], np.ndarray], Begun]:
    """`begin`, unless the policy has none or an `infer` that was put in front of it (by an instance or a subclass)."""
    for names in (getattr(policy, "__dict__", {}), *map(vars, type(policy).__mro__)):
        if "begin" in names:
            begin: Callable[[list[Observation], np.ndarray], Begun] = getattr(policy, "begin")  # noqa: B009
            return begin
        if "infer" in names:
            break
    return lambda observations, noise: _Answered(policy.infer(observations, noise))
