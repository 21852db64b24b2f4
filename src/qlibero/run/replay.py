"""Videos after the fact: an episode is pure, so its recorded actions replayed give the same episode, now recorded.

For episodes that no run recorded (`run.videos`): of other shards, of earlier calls, or asked for by name. It checks
purity once more, because the replay's fingerprint and outcome must equal the record's. Frames are those that the policy
was shown: rendering every step would cost several times the episode.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qlibero.activity import doing
from qlibero.console import count_text
from qlibero.errors import WorkFailed
from qlibero.results.ledger import read_trajectory
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import video_path
from qlibero.sim.pool import Assignment, Died, Finished, Observed, SimulatorPool

log = logging.getLogger(__name__)

REPLAN_STEPS = 5  # of records that do not say it


def call_every(record: EpisodeRecord) -> int:
    """Control steps from one policy call of an episode to the next, see `pace.Chunks`."""
    return max(record.replan_steps or REPLAN_STEPS, record.latency_steps or 0)


def replay(
    run_dir: Path,
    records: Sequence[EpisodeRecord],
    pool: SimulatorPool,
    protocol: str,
) -> list[Path]:
    """`record` these episodes into their run directory, those whose actions are there; returns the videos."""
    found = ((record, read_trajectory(run_dir, record), video_path(run_dir, record)) for record in records)
    wanted = [(record, rows, path) for record, rows, path in found if rows is not None]
    if not wanted:
        return []
    log.info(
        f"recording {count_text(len(wanted), 'video')} by replaying their actions; Ctrl-C ends it and keeps everything"
    )
    doing("recording videos", 0, len(wanted))
    return record_all(wanted, pool, protocol, lambda done: doing("recording videos", done, len(wanted)))


def record_all(
    episodes: Sequence[tuple[EpisodeRecord, np.ndarray, Path]],
    pool: SimulatorPool,
    protocol: str,
    on_video: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """Replay `(record, trajectory (steps, 10), path.mp4)` and return the videos written; `on_video` hears how many.

    Raises like `replay_all`, and `WorkFailed` when a video cannot be written.
    """
    written: list[Path] = []
    for _, _, path in episodes:
        path.parent.mkdir(parents=True, exist_ok=True)

    def ended(record: EpisodeRecord, path: Path | None) -> None:
        assert path is not None, "every episode here has one"
        if not path.exists():
            raise WorkFailed(f"{path}: the video could not be written (is the disk full?)")
        written.append(path)
        on_video(len(written))

    replay_all(episodes, pool, protocol, ended)
    return written


def replay_all(
    episodes: Sequence[tuple[EpisodeRecord, np.ndarray, Path | None]],
    pool: SimulatorPool,
    protocol: str,
    on_end: Callable[[EpisodeRecord, Path | None], None],
    on_observed: Callable[[EpisodeRecord, Observed], None] = lambda record, event: None,
) -> None:
    """Replay `(record, trajectory (steps, 10), path.mp4 or None)`. `on_observed` sees what the policy was shown before
    each of its calls, and must copy what it keeps; `on_end` hears of every episode that came to its end.

    Raises `WorkFailed` when a replay differs from its record: then the record, or the simulator, is not what it says.
    A simulator that dies costs its episode, nothing else.
    """
    waiting = deque(episodes)
    running: dict[int, tuple[EpisodeRecord, np.ndarray, Path | None]] = {}

    def start(worker: int) -> None:
        if waiting:
            record, _, path = running[worker] = waiting.popleft()
            pool.start(worker, Assignment(record.key, protocol, record.steps, path))

    for worker in range(pool.workers):
        start(worker)
    while running:
        for event in pool.wait(1.0):
            record, trajectory, path = running[event.worker]
            if isinstance(event, Observed):
                on_observed(record, event)
                pool.act(event.worker, trajectory[event.step : event.step + call_every(record), :7])
                continue
            del running[event.worker]
            if isinstance(event, Finished):
                try:
                    _same_episode(record, event)
                except WorkFailed:
                    _forget(path)  # of whatever it shows, it is not this record's
                    raise
                on_end(record, path)
            elif isinstance(event, Died):
                _forget(path)
            start(event.worker)


def _forget(path: Path | None) -> None:
    if path is not None:
        path.unlink(missing_ok=True)


def _same_episode(record: EpisodeRecord, event: Finished) -> None:
    replayed = ("success" if event.success else "failure", event.steps, event.fingerprint)
    recorded = (record.outcome, record.steps, record.fingerprint)
    if replayed != recorded:
        raise WorkFailed(
            f"replaying {record.key} of arm {record.arm} gave {replayed}, "
            f"its record says {recorded}: the simulator here is not the one that produced the record "
            "(`qlibero doctor` compares both with the shipped references)"
        )
