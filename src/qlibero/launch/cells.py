"""A sweep's cells on disk, and the one contract every engine executes: `run-shard --manifest M --index I`.

    <sweep directory>/
      <cell>/                          one run directory per cell (one plain cell: the sweep directory itself)
      sweep/experiments/<cell>.yaml    the cell's resolved experiment
      sweep/submission-001/            what was submitted at once: manifest.json, scripts, logs

A shard is a piece of a cell's episodes with all their arms, so that pairs stay together. Running a shard again
continues it, whoever runs it; which shards still lack episodes is read from the ledger, never from a scheduler.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlibero import files
from qlibero.config.config_hash import config_hash
from qlibero.config.dump import dump_resolved
from qlibero.config.launch import Launch
from qlibero.config.load import load_experiment
from qlibero.config.schema import Experiment
from qlibero.config.sweep import Sweep
from qlibero.documents import JsonObject, flattened, read_json
from qlibero.errors import UserError, WorkFailed, cause
from qlibero.launch.manifest import SCHEMA, read_document
from qlibero.places import RUNS
from qlibero.results.arm_equality import Arithmetic
from qlibero.results.meta import check
from qlibero.results.records import EpisodeRecord
from qlibero.run.experiment import run_experiment
from qlibero.run.planned import episode_keys, missing_episodes
from qlibero.run.simulators import names_a_gpu
from qlibero.run.state import RunState, run_state

log = logging.getLogger(__name__)

OURS = "sweep"  # the sub-directory of a sweep directory that is not a run directory


@dataclass(frozen=True)
class Cell:
    """One experiment of the sweep. `axes` is what distinguishes it, for people."""

    id: str
    run_dir: Path
    axes: dict[str, str]
    experiment: Experiment

    @property
    def shards(self) -> int:
        """How many shards: as `launch.shard_episodes` asks; one where `stop` looks at all episodes together."""
        if self.experiment.stop is not None:
            return 1
        return max(1, math.ceil(len(episode_keys(self.experiment)) / self.experiment.launch.shard_episodes))


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` of a cell."""

    cell: str
    index: int
    count: int


@dataclass(frozen=True)
class Manifest:
    """A sweep as submitted: all its cells and all their shards; an engine is given the indices it shall run."""

    name: str
    directory: Path
    cells: tuple[Cell, ...]
    shards: tuple[Shard, ...]

    def cell(self, shard: Shard) -> Cell:
        return next(cell for cell in self.cells if cell.id == shard.cell)

    def shard(self, index: int) -> Shard:
        if not 0 <= index < len(self.shards):
            raise UserError(f"--index {index}: the manifest has shards 0 to {len(self.shards) - 1}")
        return self.shards[index]

    @property
    def launch(self) -> Launch:
        """What the cells share (`_check_launch`). Of processes beside each other each has one GPU alone, so where a
        policy names its own there is one."""
        launch = self.cells[0].experiment.launch
        named = launch.processes == "auto" and any(names_a_gpu(cell.experiment) for cell in self.cells)
        return launch.model_copy(update={"processes": 1}) if named else launch

    def experiment_of(self, index: int) -> Experiment:
        return self.cell(self.shard(index)).experiment

    def missing(self) -> tuple[int, ...]:
        """Indices of the shards that lack episodes, or have episodes that ended in an error."""
        lacking = {cell.id: {key for _, key in missing_episodes(cell.experiment, cell.run_dir)} for cell in self.cells}
        return tuple(
            i
            for i, shard in enumerate(self.shards)
            if lacking[shard.cell].intersection(episode_keys(self.cell(shard).experiment, (shard.index, shard.count)))
        )


def make_manifest(sweep: Sweep, out: Path | None = None) -> Manifest:
    """Lay a sweep out on disk (nothing is written). Raises GuardRefusal when a cell's directory holds other results."""
    directory = (out or RUNS / sweep.name).resolve()
    alone = len(sweep.cells) == 1 and not sweep.cells[0].axes
    cells = tuple(
        Cell(cell.id, directory if alone else directory / cell.id, dict(cell.axes), cell.experiment)
        for cell in sweep.cells
    )
    for cell in cells:
        if cell.id == OURS and not alone:
            raise UserError(
                f"a cell cannot be called {OURS}: the sweep keeps its own files in a directory of that name"
            )
        _check_directory(cell)
    _check_launch(cells)
    shards = tuple(Shard(cell.id, i, cell.shards) for cell in cells for i in range(cell.shards))
    return Manifest(sweep.name, directory, cells, shards)


def spread_over(experiment: Experiment, run_dir: Path, shards: int) -> Manifest:
    """A run as a sweep of one cell, in so many shards. Raises GuardRefusal when its directory holds other results."""
    cell = Cell(experiment.name, run_dir, {}, experiment)
    _check_directory(cell)
    return Manifest(experiment.name, run_dir, (cell,), tuple(Shard(cell.id, i, shards) for i in range(shards)))


def next_submission(manifest: Manifest) -> Path:
    """The directory the next submission will have."""
    ours = manifest.directory / OURS
    last = max(map(_number, ours.glob("submission-[0-9]*")), default=0)
    return ours / f"submission-{last + 1:03d}"


def write_manifest(manifest: Manifest) -> Path:
    """Write the cells' experiments and the next submission's manifest.json; returns the submission's directory."""
    ours = manifest.directory / OURS
    try:
        (ours / "experiments").mkdir(parents=True, exist_ok=True)
        for cell in manifest.cells:
            files.replace(experiment_file(manifest.directory, cell.id), dump_resolved(cell.experiment))
        submission = next_submission(manifest)
        (submission / "logs").mkdir(parents=True)
        document = {
            "schema": SCHEMA,
            "sweep": manifest.name,
            "directory": str(manifest.directory),
            "cells": [{"id": cell.id, "run_dir": str(cell.run_dir), "axes": cell.axes} for cell in manifest.cells],
            "shards": [[shard.cell, shard.index, shard.count] for shard in manifest.shards],
        }
        files.replace(submission / "manifest.json", json.dumps(document, indent=1) + "\n")
    except OSError as problem:
        raise WorkFailed(f"cannot write to {ours}: {cause(problem)}; choose another --out") from problem
    return submission


def read_manifest(path: Path, check_files: bool = True) -> Manifest:
    """The manifest of a submission, with its cells' experiments; `check_files`: checkpoints must be there."""
    written = read_document(path)

    def experiment(cell_id: str) -> Experiment:
        # no environment: what was resolved at submission is what runs, whatever a node's shell exports
        return load_experiment(experiment_file(Path(written.directory), cell_id), environ={}, check_files=check_files)

    cells = tuple(Cell(cell.id, Path(cell.run_dir), cell.axes, experiment(cell.id)) for cell in written.cells)
    return Manifest(written.sweep, Path(written.directory), cells, tuple(Shard(*each) for each in written.shards))


def latest_manifest(directory: Path) -> Manifest | None:
    """The last submission's manifest in a sweep directory; None when there is none."""
    paths = (directory / OURS).glob("submission-[0-9]*/manifest.json")
    last = max(paths, key=lambda path: _number(path.parent), default=None)
    return read_manifest(last, check_files=False) if last else None


def _number(submission: Path) -> int:
    return int(submission.name.rpartition("-")[2])


def run_shard(
    manifest: Manifest,
    index: int,
    on_start: Callable[[int, int], None] = lambda missing, total: None,
    on_episode: Callable[[EpisodeRecord], None] = lambda record: None,
) -> ShardState:
    """Run what one shard still lacks. `on_start` and `on_episode` are run_experiment's."""
    shard = manifest.shard(index)
    cell, part = manifest.cell(shard), (shard.index, shard.count)
    found = run_experiment(cell.experiment, cell.run_dir, part, on_start, on_episode)
    complete = not missing_episodes(cell.experiment, cell.run_dir, part)
    return ShardState(cell.id, part, complete, cell.run_dir, found.arithmetic)


def merge(manifest: Manifest) -> SweepState:
    """What is done once, after all shards: mirror every cell's ledger, and write sweep/result.json. Can be repeated.

    Returns `sweep_state`; the file has also {"mirrors": {cell: {tracker: problem or None}}}.
    """
    from qlibero.tracking.mirror import start_mirrors

    state = sweep_state(manifest)
    mirrors: dict[str, dict[str, str | None]] = {}
    for cell in manifest.cells:
        if any(arm.episodes for arm in state.cells[cell.id].arms.values()):
            for ended in start_mirrors(cell.run_dir, cell.experiment.tracking).finish(300.0):
                if problem := ended.told(cell.experiment.tracking):
                    log.warning(f"{cell.id}: {problem}")
                else:
                    log.info(f"{cell.id}: {ended.tracker}: {ended.mode or 'mirrored'}")
                mirrors.setdefault(cell.id, {})[ended.tracker] = ended.problem
    whole = {**state.to_json(), "mirrors": mirrors}
    files.replace(manifest.directory / OURS / "result.json", json.dumps(whole, indent=1) + "\n")
    return state


def merged(manifest: Manifest) -> bool:
    """Whether a merge has mirrored all since the last episode; its result is written last, so a killed one has not."""
    try:
        found = read_json(manifest.directory / OURS / "result.json")
    except (FileNotFoundError, UserError, WorkFailed):
        return False
    if not isinstance(found, dict):
        return False
    problems = [problem for cell in found.pop("mirrors", {}).values() for problem in cell.values()]
    return found == json.loads(json.dumps(sweep_state(manifest).to_json())) and not any(problems)


@dataclass(frozen=True)
class ShardState:
    """What a job of a sweep prints last. `shard` is (index, count)."""

    cell: str
    shard: tuple[int, int]
    complete: bool
    run_dir: Path
    arithmetic: Arithmetic

    def to_json(self) -> JsonObject:
        return {
            "cell": self.cell,
            "shard": list(self.shard),
            "complete": self.complete,
            "run_dir": str(self.run_dir),
            "arithmetic": self.arithmetic.to_json(),
        }


@dataclass(frozen=True)
class SweepState:
    """How far a sweep is: its cells by id, with the axes that tell them apart."""

    sweep: str
    directory: Path
    axes: dict[str, JsonObject]
    cells: dict[str, RunState]

    @property
    def complete(self) -> bool:
        return all(cell.complete for cell in self.cells.values())

    def to_json(self) -> JsonObject:
        return {
            "sweep": self.sweep,
            "directory": str(self.directory),
            "complete": self.complete,
            "cells": {name: {"axes": self.axes[name], **cell.to_json()} for name, cell in self.cells.items()},
        }


def sweep_state(manifest: Manifest) -> SweepState:
    """From the ledgers."""
    axes = {cell.id: cell.axes for cell in manifest.cells}
    cells = {cell.id: run_state(cell.experiment, cell.run_dir) for cell in manifest.cells}
    return SweepState(manifest.name, manifest.directory, axes, cells)


def spans(indices: Sequence[int]) -> str:
    """`0-3,7` for (0, 1, 2, 3, 7): how Slurm and people write it."""
    groups: list[list[int]] = []
    for i in sorted(indices):
        if groups and i == groups[-1][-1] + 1:
            groups[-1].append(i)
        else:
            groups.append([i])
    return ",".join(f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)


def _check_directory(cell: Cell) -> None:
    """The ledger would refuse too, but only on the cluster, after the queue."""
    for arm in cell.experiment.arms():
        check(cell.run_dir, arm.name, {"config_hash": config_hash(cell.experiment, arm)})


def _check_launch(cells: Sequence[Cell]) -> None:
    """A submission is one array (or set of processes), so its resources are one choice: none is dropped in silence."""
    first, *others = cells
    ours = flattened(first.experiment.launch.model_dump(exclude={"shard_episodes"}))
    for cell in others:
        theirs = flattened(cell.experiment.launch.model_dump(exclude={"shard_episodes"}))
        if differing := [key for key in ours if ours[key] != theirs[key]]:
            key = differing[0]
            raise UserError(
                f"launch.{key} is {ours[key]!r} in cell {first.id} and {theirs[key]!r} in cell {cell.id}: "
                "the cells of a sweep are submitted together and share launch (but shard_episodes); "
                "write one sweep file for each kind of job"
            )


def experiment_file(directory: Path, cell_id: str) -> Path:
    """Where a sweep keeps a cell's experiment, as it was last submitted."""
    return directory / OURS / "experiments" / f"{cell_id}.yaml"
