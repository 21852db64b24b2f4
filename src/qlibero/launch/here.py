"""`qlibero run`: an experiment in this process, or, where its policy may use several GPUs, in one process for each.

Processes are shards of the local engine: each loads the policy on a GPU of its own and has its part of the cores for
simulators. They share the run directory, so another number of them, or none, continues it, once the first have ended.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import replace
from math import ceil
from pathlib import Path

from qlibero import files
from qlibero.activity import doing
from qlibero.config.dump import dump_resolved
from qlibero.config.schema import Experiment
from qlibero.episode_key import EpisodeKey
from qlibero.errors import GuardRefusal, UserError, WorkFailed
from qlibero.launch import cells
from qlibero.launch.engine import Submission
from qlibero.launch.local import Failed, processes, run_shards
from qlibero.machine.environment import usable_gpus
from qlibero.results.locks import refuse_second_writer
from qlibero.results.records import EpisodeRecord, record_from_json
from qlibero.run.experiment import look_through, make_directory, run_directory, run_experiment, tell_mixes
from qlibero.run.planned import episode_keys, finished_episodes, missing_episodes
from qlibero.run.simulators import names_a_gpu
from qlibero.run.state import RunState, run_state

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at the ledgers, of which there may be hundreds on a disk that others share
UNEVEN = 1.25  # most that the largest share may be of an even one


def run_here(
    experiment: Experiment,
    out: Path | None,
    on_start: Callable[[int, int], None],
    on_episode: Callable[[EpisodeRecord], None],
    on_result: Callable[[Path], None],
) -> RunState:
    """Run what is missing; arguments, result and errors are `run_experiment`'s, whichever process has them."""
    look_through(experiment)
    run_dir = run_directory(experiment, out)
    make_directory(run_dir)
    cells.spread_over(experiment, run_dir, 1)  # refuses other results before they are counted
    missing = missing_episodes(experiment, run_dir)
    if missing:
        refuse_second_writer(run_dir)
    lacking = {key for _, key in missing}
    at_once = min(_processes(experiment), len(lacking))
    if at_once < 2:
        return run_experiment(experiment, out, on_start=on_start, on_episode=on_episode, on_result=on_result)
    total = len(finished_episodes(experiment, run_dir)) + len(missing)
    on_start(len(missing), total)
    pieces = _pieces(episode_keys(experiment), lacking, at_once)
    return _spread(experiment, run_dir, pieces, at_once, on_episode, on_result)


def _processes(experiment: Experiment) -> int:
    """As many as `launch.processes` says; `auto`: one for each GPU, where a policy takes whichever there is."""
    asked = experiment.launch.processes
    if asked == "auto":
        devices = {getattr(arm.policy, "device", "cpu") for arm in experiment.arms()}
        asked = processes(experiment.launch) if devices & {"auto", "cuda"} and not names_a_gpu(experiment) else 1
    if asked > 1 and experiment.stop is not None:
        log.info("one process: `stop` looks at all episodes together")
        return 1
    return asked


def _pieces(keys: Sequence[EpisodeKey], lacking: Set[EpisodeKey], at_once: int) -> int:
    """The fewest shards that share what is lacking about evenly among so many processes: one that was run to its end
    gives a process nothing to do."""
    places = [place for place, key in enumerate(keys) if key in lacking]
    pieces, even = at_once, len(places) / at_once
    while True:
        shares = Counter(((place + 1) * pieces - 1) // len(keys) for place in places)
        if len(shares) >= at_once and max(shares.values()) <= max(UNEVEN * even, ceil(even)):
            return pieces
        pieces += 1


def _spread(
    experiment: Experiment,
    run_dir: Path,
    pieces: int,
    at_once: int,
    on_episode: Callable[[EpisodeRecord], None],
    on_result: Callable[[Path], None],
) -> RunState:
    from qlibero.tracking.mirror import start_mirrors

    manifest = cells.spread_over(experiment, run_dir, pieces)
    directory = cells.write_manifest(manifest)
    launch = experiment.launch.model_copy(update={"processes": at_once})
    submission = Submission(manifest.name, directory, manifest.missing(), launch)
    files.replace(run_dir / "experiment.yaml", dump_resolved(experiment))
    gpus = usable_gpus()
    on_gpus = f" on GPUs {', '.join(gpus[:at_once])}" if len(gpus) > 1 else ""
    log.info(f"{at_once} processes{on_gpus}, logs in {directory / 'logs'}")
    doing(f"starting {at_once} processes")
    written, begun, looked = _Written(run_dir, [arm.name for arm in experiment.arms()]), False, 0.0

    def tell() -> None:
        nonlocal begun
        for record in written.since_last_time():
            if not begun:  # said again, it would begin to count anew
                doing("episodes")
            begun = True
            on_episode(record)

    def meanwhile() -> None:
        nonlocal looked
        if time.monotonic() - looked >= LOOK_S:
            tell()
            looked = time.monotonic()

    mirrors, ended = start_mirrors(run_dir, experiment.tracking), []
    try:
        failed = run_shards(submission, meanwhile)
        tell()
        found = run_state(experiment, run_dir)
        errors = sum(arm.errors for arm in found.arms.values())
        _raise(failed, found, len(missing_episodes(experiment, run_dir)) > errors)
        on_result(run_dir)
    finally:
        ended = mirrors.finish()
        for said in filter(None, (one.told(experiment.tracking) for one in ended)):
            log.warning(said)
    tell_mixes(experiment, run_dir)
    return replace(found, mirrors=tuple(ended))


def _raise(failed: dict[int, Failed], found: RunState, more: bool) -> None:
    """What a process was refused, or could not do; wrong kernels and episodes in error are in what was found. `more`:
    more is missing than episodes that ended in an error."""
    if found.arithmetic.problems:
        return
    for one in failed.values():
        if one.status in (2, 3):
            raise {2: UserError, 3: GuardRefusal}[one.status](one.said)
    if failed and more:
        raise WorkFailed("\n".join(dict.fromkeys(one.said for one in failed.values())))


class _Written:
    """The lines that other processes add to the ledgers of a run from now on."""

    def __init__(self, run_dir: Path, arms: Iterable[str]):
        self._arms = [run_dir / arm for arm in arms]
        self._read: dict[Path, int] = {}
        for _ in self._lines():
            pass

    def since_last_time(self) -> Iterator[EpisodeRecord]:
        for path, line in self._lines():
            if line.strip() and b"\0" not in line:
                yield record_from_json(line, str(path))

    def _lines(self) -> Iterator[tuple[Path, bytes]]:
        for path in (path for arm in self._arms for path in sorted(arm.glob("episodes-*.jsonl"))):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._read[path] = self._read.get(path, 0) + len(whole) + 1
                yield from ((path, line) for line in whole.split(b"\n"))
