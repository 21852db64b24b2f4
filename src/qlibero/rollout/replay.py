"""Videos after the fact: an episode is pure, so its recorded actions replayed give the same episode, now filmed.

Filming renders every step and would make a measured episode several times slower; replaying costs nothing while
measuring, works for any episode of any ledger (the flipped ones are known only afterwards), and checks purity once
more, because the replay's fingerprint and outcome must equal the record's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qlibero.errors import WorkFailed
from qlibero.results.records import EpisodeRecord
from qlibero.sim.pool import Assignment, Died, Finished, Observed, SimulatorPool


def film(episodes: Sequence[tuple[EpisodeRecord, np.ndarray, Path]], pool: SimulatorPool, protocol: str) -> list[Path]:
    """Replay `(record, trajectory (steps, 10), path.mp4)` and return the videos written.

    Raises `WorkFailed` when a replay differs from its record: then the record, or the simulator, is not what it says.
    A simulator that dies costs its video, nothing else.
    """
    waiting = deque(episodes)
    filming: dict[int, tuple[EpisodeRecord, np.ndarray, Path]] = {}
    written: list[Path] = []

    def start(worker: int) -> None:
        if not waiting:
            return
        record, trajectory, path = filming[worker] = waiting.popleft()
        path.parent.mkdir(parents=True, exist_ok=True)
        pool.start(worker, Assignment(record.key, protocol, record.steps, path))

    for worker in range(pool.workers):
        start(worker)
    while filming:
        for event in pool.wait(1.0):
            record, trajectory, path = filming[event.worker]
            if isinstance(event, Observed):
                pool.act(event.worker, trajectory[event.step :, :7])
                continue
            del filming[event.worker]
            if isinstance(event, Finished):
                _same_episode(record, event)
                written.append(path)
            elif isinstance(event, Died):
                path.unlink(missing_ok=True)
            start(event.worker)
    return written


def _same_episode(record: EpisodeRecord, event: Finished) -> None:
    replayed = ("success" if event.success else "failure", event.steps, event.fingerprint)
    recorded = (record.outcome, record.steps, record.fingerprint)
    if replayed != recorded:
        raise WorkFailed(
            f"replaying {record.key} of arm {record.arm} gave {replayed}, "
            f"its record says {recorded}: the simulator here is not the one that produced the record "
            "(`qlibero doctor` compares both with the shipped references)"
        )
