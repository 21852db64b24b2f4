"""`qlibero status`: how far a sweep or run is, from its result files, and from squeue for what is queued.

Result files are the only thing that is true on every engine; a scheduler only adds which shards still hold a place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from qlibero.config.load import load_experiment
from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError, WorkFailed
from qlibero.launch.cells import Cell, Manifest, Shard, experiment_file, latest_manifest
from qlibero.launch.engine import engines
from qlibero.results.ledger import is_locked, read_ledger
from qlibero.results.machines import in_words, is_mixed, machines_of
from qlibero.results.records import EpisodeRecord
from qlibero.run.planned import episode_keys, finished_episodes, missing_episodes

RATE_WINDOW = timedelta(minutes=30)
FOLLOW_S = 10.0
QUIET_S = 120.0  # longer than a shard takes to start, so that the pause between two is not taken for the end


@dataclass(frozen=True)
class CellStatus:
    """`machines`, {arm: {kind: episodes}}, has the arms whose episodes come from machines that answer differently."""

    cell: str
    done: int
    episodes: int
    errors: int
    last_error: str | None
    successes: int
    machines: dict[str, dict[str, int]]

    def row(self) -> JsonObject:
        """For a table."""
        return {name: value for name, value in asdict(self).items() if name != "machines"}


@dataclass(frozen=True)
class Status:
    """`queue` is {state: shards}, `queue_problem` why it cannot be asked; `writing` counts ledgers that a process of
    this machine holds open; the rate is that of the last half hour in which episodes finished."""

    directory: Path
    shards: int
    shards_done: int
    writing: int
    queue: dict[str, int]
    queue_problem: str | None
    episodes_per_hour: float | None
    eta: str | None
    cells: tuple[CellStatus, ...]

    @property
    def episodes(self) -> int:
        return sum(cell.episodes for cell in self.cells)

    @property
    def done(self) -> int:
        return sum(cell.done for cell in self.cells)

    @property
    def errors(self) -> int:
        return sum(cell.errors for cell in self.cells)

    @property
    def complete(self) -> bool:
        return self.done == self.episodes

    @property
    def under_way(self) -> bool:
        """Whether somebody works on it as far as can be seen from here, or nobody can tell."""
        return bool(self.queue or self.queue_problem or self.writing)

    def to_json(self) -> JsonObject:
        return {
            "directory": str(self.directory),
            "complete": self.complete,
            "episodes": self.episodes,
            "done": self.done,
            "errors": self.errors,
            "shards": self.shards,
            "shards_done": self.shards_done,
            "writing": self.writing,
            "queue": self.queue,
            "queue_problem": self.queue_problem,
            "episodes_per_hour": self.episodes_per_hour and round(self.episodes_per_hour, 1),
            "eta": self.eta,
            "cells": [asdict(cell) for cell in self.cells],
        }


def status(directory: Path, tasks: Sequence[int] | None = None, arms: Sequence[str] | None = None) -> Status:
    """Of a sweep directory or a single run directory; `tasks`, `arms`: only these episodes are counted.

    Raises UserError when it is neither, and for an arm or task that it does not have.
    """
    submitted = latest_manifest(directory)
    manifest = _as_continued(submitted, directory) if submitted else _single_run(directory)
    cells: list[CellStatus] = []
    records: list[EpisodeRecord] = []
    missing_keys: dict[str, set[EpisodeKey]] = {}
    _check_filters(directory, manifest, tasks, arms)

    def counted(arm: str, task: int) -> bool:
        return (not arms or arm in arms) and (not tasks or task in tasks)

    for cell in manifest.cells:
        by_arm = {
            arm.name: [r for r in read_ledger(cell.run_dir, arm.name) if counted(r.arm, r.task)]
            for arm in cell.experiment.arms()
        }
        found = [record for of_arm in by_arm.values() for record in of_arm]
        records += found
        missing = [(a, key) for a, key in missing_episodes(cell.experiment, cell.run_dir) if counted(a, key.task)]
        missing_keys[cell.id] = {key for _, key in missing}
        finished = sum(counted(a, key.task) for a, key in finished_episodes(cell.experiment, cell.run_dir))
        errors = [r for r in found if r.outcome == "error"]
        cells.append(
            CellStatus(
                cell.id,
                finished,
                finished + len(missing),
                len(errors),
                errors[-1].error if errors else None,
                sum(r.succeeded for r in found),
                {name: machines_of(of_arm) for name, of_arm in by_arm.items() if is_mixed(of_arm)},
            )
        )
    left = sum(cell.episodes - cell.done for cell in cells)
    rate = episodes_per_hour(records)
    queue, queue_problem = _queue(directory, manifest.cells[0].experiment.launch.engine)
    lacking = [s for s in manifest.shards if missing_keys[s.cell].intersection(_keys(manifest, s))]
    return Status(
        directory,
        len(manifest.shards),
        len(manifest.shards) - len(lacking),
        sum(is_locked(lock) for cell in manifest.cells for lock in cell.run_dir.glob("*/.lock-*")),
        queue,
        queue_problem,
        rate,
        _eta(left, rate),
        tuple(cells),
    )


def _check_filters(
    directory: Path, manifest: Manifest, tasks: Sequence[int] | None, arms: Sequence[str] | None
) -> None:
    has = {arm.name for cell in manifest.cells for arm in cell.experiment.arms()}
    known = {task for cell in manifest.cells for _, task in cell.experiment.all_tasks()}
    if unknown := [arm for arm in arms or () if arm not in has]:
        raise UserError(f"--arm {unknown[0]}: {directory} has the arms {', '.join(sorted(has))}")
    if absent := [task for task in tasks or () if task not in known]:
        raise UserError(f"--task {absent[0]}: {directory} has the tasks {', '.join(map(str, sorted(known)))}")


def follow(
    directory: Path,
    show: Callable[[Status], None],
    tasks: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
) -> Status:
    """`show` the status every ten seconds until everything is done, or nothing has been under way for two minutes.

    Under way is what stands in a queue, holds a shard's lock, or adds to the ledgers. Returns the last status.
    """
    alive, grown = time.monotonic(), None
    while True:
        found = status(directory, tasks, arms)
        show(found)
        growth = (found.done, found.errors)
        if found.under_way or growth != grown:
            alive, grown = time.monotonic(), growth
        if found.complete or time.monotonic() - alive > QUIET_S:
            return found
        time.sleep(FOLLOW_S)


def headline(found: Status) -> str:
    """One line for people."""
    parts = [
        f"{found.done:,} of {count_text(found.episodes, 'episode')}",
        f"{found.shards_done:,} of {count_text(found.shards, 'shard')}",
    ]
    if found.errors:
        parts.append(count_text(found.errors, "error"))
    parts += [f"{n} {state.lower()}" for state, n in sorted(found.queue.items())]
    if found.queue_problem:
        parts.append(found.queue_problem)
    if found.complete:
        return ", ".join(parts)
    if found.episodes_per_hour:
        parts.append(f"{round(found.episodes_per_hour, 1):g} episodes/h")
    if not found.under_way:
        parts.append("nothing under way here")
    elif found.eta:
        parts.append(f"done about {found.eta}")
    return ", ".join(parts)


def mixes(found: Status) -> list[str]:
    """A line for people for each arm whose episodes come from machines that answer differently."""
    return [
        f"{cell.cell}, arm {arm}: {in_words(machines)}"
        for cell in found.cells
        for arm, machines in cell.machines.items()
    ]


def episodes_per_hour(records: list[EpisodeRecord]) -> float | None:
    """Rate over the half hour before the last finished episode; None while fewer than two have finished."""
    times = sorted(datetime.fromisoformat(r.finished_at) for r in records if r.finished_at)
    recent = [t for t in times if times[-1] - t <= RATE_WINDOW]
    if len(recent) < 2 or recent[0] == recent[-1]:
        return None
    return (len(recent) - 1) / (recent[-1] - recent[0]).total_seconds() * 3600


def _eta(missing: int, rate: float | None) -> str | None:
    if not rate:
        return None
    return (datetime.now(UTC) + timedelta(hours=missing / rate)).strftime("%Y-%m-%d %H:%M UTC")


def _queue(directory: Path, own: str) -> tuple[dict[str, int], str | None]:
    try:
        states = [s for engine in engines(own).values() for s in engine.live_shards(directory).values()]
    except WorkFailed as problem:
        return {}, str(problem)
    return {state: states.count(state) for state in set(states)}, None


def _keys(manifest: Manifest, shard: Shard) -> list[EpisodeKey]:
    return episode_keys(manifest.cell(shard).experiment, (shard.index, shard.count))


def _as_continued(submitted: Manifest, directory: Path) -> Manifest:
    """A run that several processes began and one goes on with may ask for other episodes by now: its own experiment
    is the later one then."""
    written, (cell, *others) = directory / "experiment.yaml", submitted.cells
    if others or cell.run_dir.resolve() != directory.resolve() or not written.exists():
        return submitted
    if written.stat().st_mtime_ns <= experiment_file(submitted.directory, cell.id).stat().st_mtime_ns:
        return submitted
    experiment = load_experiment(written, environ={}, check_files=False)
    return replace(submitted, cells=(replace(cell, experiment=experiment),))


def _single_run(directory: Path) -> Manifest:
    if not (directory / "experiment.yaml").exists():
        raise UserError(
            f"{directory}: neither a sweep (no sweep/submission-*/manifest.json) nor a run (no experiment.yaml)"
        )
    experiment = load_experiment(directory / "experiment.yaml", environ={}, check_files=False)
    cell = Cell(experiment.name, directory, {}, experiment)
    return Manifest(experiment.name, directory, (cell,), (Shard(cell.id, 0, 1),))
