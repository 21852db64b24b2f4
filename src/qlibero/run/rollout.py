"""Continuous batching over the episodes in flight.

Simulators run in their own processes and ask for actions when they have executed the last ones; whoever waits is served
next, in batches of one arm. Nothing runs in lock step, every planned episode is run to its end (taking "the first n to
finish" would favour the short, successful ones), and the arms of one scene follow each other, each scene beginning with
another, so that whatever drifts on the host hits all arms alike. What an episode computes depends on its key alone
(contracts 1 and 2): order, worker and company decide only when it is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from qlibero.policies.base import Observation, Policy
from qlibero.results.records import EpisodeRecord
from qlibero.run.calls import MAX_CALLS, POLL_S, PolicyCall
from qlibero.run.episode import PlannedEpisode, RunningEpisode
from qlibero.run.pace import Chunks, Pace
from qlibero.run.videos import scratch_path
from qlibero.sim.pool import Assignment, Died, Finished, Observed, SimulatorPool

OnRecord = Callable[[EpisodeRecord, np.ndarray | None], None]
OnCall = Callable[[str, Sequence[Observation], np.ndarray, np.ndarray, float], None]


@dataclass(frozen=True)
class RolloutSettings:
    """What the episodes of a run have in common. `max_steps` is in control steps, without the settle steps; by
    suite where it differs.

    `videos`: a directory in which each finished episode leaves what it saw, at `scratch_path`.
    """

    protocol: str
    max_steps: int | Mapping[str, int]
    replan_steps: int
    retries: int
    videos: Path | None = None
    paces: Mapping[str, Pace] = field(default_factory=dict)
    """Of arms that act at a pace of their own."""

    def cap(self, suite: str) -> int:
        """Most control steps of an episode of that suite."""
        return self.max_steps if isinstance(self.max_steps, int) else self.max_steps[suite]

    def pace(self, arm: str) -> Pace:
        return self.paces.get(arm) or Pace(self.replan_steps)


def as_run(record: EpisodeRecord, settings: RolloutSettings, kernels: str, versions: dict[str, str]) -> EpisodeRecord:
    """The record of an episode that ends now, with what was in force."""
    return replace(
        record,
        protocol=settings.protocol,
        kernels=kernels,
        versions=versions,
        max_steps=settings.cap(record.suite),
        replan_steps=settings.pace(record.arm).replan_steps,
        latency_steps=settings.pace(record.arm).latency_steps,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


class _Queue:
    """Episodes waiting for a simulator, grouped by task: building a task's scene is slow, staying in it free."""

    def __init__(self, plan: Sequence[PlannedEpisode]):
        self.groups: dict[tuple[int, str, int], deque[tuple[PlannedEpisode, int]]] = {}
        for episode in plan:
            self.put(episode, attempt=1)
        self.current: dict[int, tuple[int, str, int]] = {}

    def put(self, episode: PlannedEpisode, attempt: int) -> None:
        group = (episode.block, episode.key.suite, episode.key.task)
        self.groups.setdefault(group, deque()).append((episode, attempt))

    def next_for(self, worker: int) -> tuple[PlannedEpisode, int] | None:
        """The worker's own task first, then the largest group nobody works on, then the largest at all."""
        waiting = [group for group, episodes in self.groups.items() if episodes]
        if not waiting:
            return None
        block = min(group[0] for group in waiting)
        waiting = [group for group in waiting if group[0] == block]
        own = self.current.get(worker)
        if own not in waiting:
            taken = {group for other, group in self.current.items() if other != worker}
            own = max(waiting, key=lambda group: (group not in taken, len(self.groups[group])))
            self.current[worker] = own
        return self.groups[own].popleft()


def first_tasks(plan: Sequence[PlannedEpisode], workers: int) -> list[tuple[str, int]]:
    """Suite and task with which each worker of `run_episodes` will begin, for those that will have something to do."""
    queue = _Queue(plan)
    first = (queue.next_for(worker) for worker in range(workers))
    return [(following[0].key.suite, following[0].key.task) for following in first if following is not None]


def run_episodes(
    plan: Sequence[PlannedEpisode],
    policies: Mapping[str, Policy],
    pool: SimulatorPool,
    settings: RolloutSettings,
    on_record: OnRecord,
    needs: Callable[[str], bool] = lambda arm: True,
    on_call: OnCall = lambda arm, observations, noise, actions, seconds: None,
) -> None:
    """Run every planned episode and hand each finished one to `on_record(record, trajectory)`.

    Each policy call goes to `on_call(arm, observations, noise, actions, seconds)` before it is executed; no latency
    counts what that takes. Observations are only valid until it returns.

    A policy on a GPU that can `begin` a call is given a second one behind the first as soon as a whole batch waits;
    simulators are heard meanwhile.

    `policies` maps arm to policy. An episode whose simulator dies or hangs is run again, `settings.retries` times, then
    recorded as an error. An arm that `needs` says no to starts no further episode; those in flight are finished.
    """
    queue = _Queue(plan)
    running: dict[int, RunningEpisode] = {}
    waiting: deque[int] = deque()

    def start(worker: int) -> None:
        following = queue.next_for(worker)
        while following is not None and not needs(following[0].arm):
            following = queue.next_for(worker)
        if following is None:
            return
        episode, attempt = following
        running[worker] = RunningEpisode(episode, attempt, Chunks(settings.pace(episode.arm)))
        video = settings.videos and scratch_path(settings.videos, episode.arm, episode.key)
        wanted = getattr(policies[episode.arm], "frame_format", None)
        pool.start(worker, Assignment(episode.key, settings.protocol, settings.cap(episode.key.suite), video, wanted))

    calls: deque[PolicyCall] = deque()
    for worker in range(pool.workers):
        start(worker)
    while running:
        for event in pool.wait(POLL_S if calls else 0.0 if waiting else 1.0):
            episode = running[event.worker]
            if isinstance(event, Observed):
                seen = event.observation
                episode.observation = Observation(seen.image, seen.wrist_image, seen.state, event.prompt)
                waiting.append(event.worker)
                continue
            del running[event.worker]
            if isinstance(event, Finished):
                record = episode.record(
                    event.success, event.steps, event.fingerprint, event.trajectory, event.sim_ms, event.render_ms
                )
                on_record(record, event.trajectory)
            elif isinstance(event, Died):
                if event.worker in waiting:
                    waiting.remove(event.worker)
                if episode.attempt <= settings.retries:
                    queue.put(episode.planned, episode.attempt + 1)
                else:
                    on_record(episode.error_record(event.reason), None)
            start(event.worker)
        while waiting:
            arm = running[waiting[0]].planned.arm
            batch = [worker for worker in waiting if running[worker].planned.arm == arm][: policies[arm].batch_size]
            if calls and not (len(calls) < MAX_CALLS and len(batch) == policies[arm].batch_size):
                break
            for worker in batch:
                waiting.remove(worker)
            calls.append(PolicyCall(arm, policies[arm], {worker: running[worker] for worker in batch}))
            if calls[0].ready():
                break
        while calls and calls[0].ready():
            _finish(calls.popleft(), calls, running, pool, on_call)


def _finish(
    call: PolicyCall,
    behind: Sequence[PolicyCall],
    running: Mapping[int, RunningEpisode],
    pool: SimulatorPool,
    on_call: OnCall,
) -> None:
    """Act on an answer. An episode whose simulator died meanwhile has no use for it."""
    chunk = call.chunk()
    for following in behind:
        following.device_is_free()
    on_call(call.arm, call.observations, call.noise, chunk.actions, call.ms / 1e3)
    for (worker, episode), actions in zip(call.episodes.items(), chunk.actions, strict=True):
        if running.get(worker) is episode:
            episode.record_call(chunk, call.ms, len(call.episodes))
            pool.act(worker, episode.chunks.next(actions))
