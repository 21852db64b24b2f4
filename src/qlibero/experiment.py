"""One experiment from its config to its ledger: the only place that knows all the parts.

    run directory → what is missing → policies of the arms (calibrated, quantized, kernels tried), and beside them the
    simulator's passport → simulators → ledger

Running the same experiment again continues it: what the ledger holds is never run twice, and when nothing is missing
the result is shown without loading a policy. A shard is the same thing over a part of the episodes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlibero import files
from qlibero.config.dump import dump_resolved
from qlibero.config.schema import Experiment, config_hash
from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError, WorkFailed, cause
from qlibero.launch.capacity import simulators
from qlibero.places import RUNS
from qlibero.results.ledger import Ledger, read_ledger, read_trajectory
from qlibero.results.machines import mix_in_words
from qlibero.results.meta import check
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import video_path
from qlibero.results.stopping import Declaration
from qlibero.results.summary import summarize_arm
from qlibero.sequential import SequentialRun, declaration_of


def run_directory(experiment: Experiment, out: Path | None) -> Path:
    """Where the experiment's ledger lies: `out`, or logs/<name> (see `places.RUNS`)."""
    return (out or RUNS / experiment.name).resolve()


def episode_keys(experiment: Experiment, shard: tuple[int, int] = (0, 1)) -> list[EpisodeKey]:
    """The episodes of shard `(index, count)`, in order; all arms of an episode belong to the same shard.

    A shard is a contiguous piece, so that it has few tasks: building a task's scene costs as much as an episode.
    """
    kind, count = experiment.initial_states()
    keys = [
        EpisodeKey(experiment.suite, task, init, seed, kind)
        for task in experiment.task_ids()
        for init in range(count)
        for seed in experiment.all_seeds()
    ]
    index, count = shard
    return keys[index * len(keys) // count : (index + 1) * len(keys) // count]


def planned_keys(experiment: Experiment) -> Sequence[EpisodeKey]:
    """The most episodes an arm will run: all, or as many as `stop` may spend, in its declared order.

    Raises UserError for a `stop` without two arms to compare.
    """
    keys = episode_keys(experiment)
    return keys if experiment.stop is None else stopping_rule(experiment).spendable


def stopping_rule(experiment: Experiment) -> Declaration:
    """What an experiment with `stop` declares. Raises UserError without two arms to compare."""
    return declaration_of(experiment, episode_keys(experiment))


def missing_episodes(
    experiment: Experiment, run_dir: Path, shard: tuple[int, int] = (0, 1)
) -> list[tuple[str, EpisodeKey]]:
    """(arm, key) of everything the ledger does not hold yet. Episodes that ended in an error are missing: they get
    another chance each time the experiment is run. Under `stop` nothing of an arm is missing once it is decided."""
    done = finished_episodes(experiment, run_dir, shard)
    arms = [arm.name for arm in experiment.arms()]
    keys: Sequence[EpisodeKey] = episode_keys(experiment, shard)
    if experiment.stop is not None:
        if shard[1] > 1:
            raise UserError("stop: a sequential test needs all its episodes in one process; run this cell as one shard")
        sequential = SequentialRun(experiment, run_dir, keys)
        keys, arms = sequential.order, [arm for arm in arms if sequential.needs(arm)]
    return [(arm, key) for key in keys for arm in _rotated(arms, key) if (arm, key) not in done]


def _rotated(arms: list[str], key: EpisodeKey) -> list[str]:
    """The arms of a scene in an order of its own: what comes first on a scene or a host that drifts is no arm's lot."""
    first = int.from_bytes(hashlib.sha256(f"arms/{key}".encode()).digest()[:4], "little") % max(1, len(arms))
    return arms[first:] + arms[:first]


def finished_episodes(
    experiment: Experiment, run_dir: Path, shard: tuple[int, int] = (0, 1)
) -> set[tuple[str, EpisodeKey]]:
    """(arm, key) of the experiment's episodes that are in the ledger with an outcome. With the missing ones these are
    all it will run, as far as can be said now: under `stop` fewer than all keys."""
    keys = set(episode_keys(experiment, shard))
    return {
        (arm.name, record.key)
        for arm in experiment.arms()
        for record in read_ledger(run_dir, arm.name)
        if record.outcome != "error" and record.key in keys
    }


def run_experiment(
    experiment: Experiment,
    out: Path | None = None,
    shard: tuple[int, int] = (0, 1),
    on_start: Callable[[int, int], None] = lambda missing, total: None,
    on_episode: Callable[[EpisodeRecord], None] = lambda record: None,
    say: Callable[[str], None] = lambda text: None,
    most_pairs: int | None = None,
) -> dict[str, Any]:
    """Run what is missing and return the summary that `qlibero run` prints as its last line.

    `most_pairs`: run no more than so many of the missing pairs now, the first ones.

    "mirrors" is added when there were any: what each said at its end (`tracking.mirror.Mirror.finish`).
    Raises `GuardRefusal` when the directory holds another configuration, a kernel or an artifact is refused, or the
    simulator has other physics than the references (`sim/guard.py`);
    `WorkFailed` when the directory cannot be written or the disk is full (finished episodes are kept).
    """
    run_dir = run_directory(experiment, out)
    _make_directory(run_dir, say)
    for arm in experiment.arms():
        check(run_dir, arm.name, {"config_hash": config_hash(experiment, arm)})
    mirrors: list[dict[str, Any]] = []
    missing = missing_episodes(experiment, run_dir, shard)
    if not missing or not (run_dir / "experiment.yaml").exists():
        files.replace(run_dir / "experiment.yaml", dump_resolved(experiment))
    if experiment.stop is not None:
        SequentialRun(experiment, run_dir, episode_keys(experiment)).declare()
    total = len(finished_episodes(experiment, run_dir, shard)) + len(missing)
    if missing:
        with ExitStack() as stack:
            name = f"{shard[0]:03d}of{shard[1]:03d}"
            ledgers = {
                arm.name: stack.enter_context(Ledger(run_dir, arm.name, name, config_hash(experiment, arm)))
                for arm in experiment.arms()
            }
            # again, now that the ledgers are locked: another process may just have finished some
            missing = missing_episodes(experiment, run_dir, shard)
            if most_pairs is not None:
                first = list(dict.fromkeys(key for _, key in missing))[:most_pairs]
                missing = [(arm, key) for arm, key in missing if key in first]
            on_start(len(missing), total)
            if missing:
                mirrors = _run(experiment, run_dir, missing, ledgers, on_episode, say)
    else:
        on_start(0, total)
    for arm in experiment.arms():
        if mix := mix_in_words(read_ledger(run_dir, arm.name)):
            say(f"arm {arm.name}: {mix}")
    return {**summary(experiment, run_dir), **({"mirrors": mirrors} if mirrors else {})}


def summary(experiment: Experiment, run_dir: Path) -> dict[str, Any]:
    """The experiment's state on disk, in the form design.md fixes for the last line of `qlibero run`."""
    document = {
        "experiment": experiment.name,
        "run_dir": str(run_dir),
        "complete": not missing_episodes(experiment, run_dir),
        "arms": {arm.name: summarize_arm(read_ledger(run_dir, arm.name)) for arm in experiment.arms()},
    }
    if experiment.stop is not None:
        keys = episode_keys(experiment)
        sequential = SequentialRun(experiment, run_dir, keys)
        spent = sum(len(read_ledger(run_dir, arm.name)) for arm in experiment.arms())
        most = len(sequential.order) * len(experiment.arms())
        document["stop"] = {
            "arms": {arm: asdict(decision) for arm, decision in sequential.decisions().items()},
            "episodes_spent": spent,
            "episodes_saved": max(0, most - spent)
            if document["complete"]
            else 0,  # an open question has saved nothing yet
        }
    return document


def _make_directory(run_dir: Path, say: Callable[[str], None]) -> None:
    """Make the run directory. Raises UserError when a file is in its place, WorkFailed when it cannot be made."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        owner = run_dir.stat().st_uid
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{run_dir} is a file, not a run directory: choose another --out") from None
    except OSError as problem:
        raise WorkFailed(f"cannot write to {run_dir}: {cause(problem)}; choose another --out") from problem
    if owner != os.geteuid():
        say(f"{run_dir} belongs to another user (id {owner}): who can write there can change these results")


def _run(
    experiment: Experiment,
    run_dir: Path,
    missing: list[tuple[str, EpisodeKey]],
    ledgers: Mapping[str, Ledger],
    on_episode: Callable[[EpisodeRecord], None],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Run these episodes; returns what each mirror said at its end, no reason to fail: the ledger is the truth."""
    # Here, not above: torch and the simulator take seconds to import, and a finished experiment needs neither.
    from qlibero.arms import load_arms
    from qlibero.launch.environment import describe, simulator_environment
    from qlibero.rollout.engine import RolloutSettings, run_episodes
    from qlibero.rollout.episode import PlannedEpisode
    from qlibero.sim.guard import PassportGuard, in_words, on_record
    from qlibero.sim.pool import SimulatorPool, worker_environment
    from qlibero.sim.provenance import enforce, parts
    from qlibero.sim.suites import SUITES
    from qlibero.tracking.mirror import start_mirrors, trouble

    arms = [arm for arm in experiment.arms() if any(arm.name == name for name, _ in missing)]
    simulator = enforce()
    environment = {
        **describe(),
        "instructions": _instructions(experiment),
        "imported": {name: asdict(one) for name, one in simulator.items()},
    }
    with PassportGuard(experiment.suite, worker_environment(simulator_environment()), environment["gl"]) as guard:
        before = {arm.name: check(run_dir, arm.name, {}) for arm in arms}
        policies, meta = load_arms(experiment, arms, say, before)
        simulated = parts(experiment.suite, simulator)
        for arm in arms:
            meta[arm.name]["identity"] |= simulated
            wanted = meta[arm.name] | {"config_hash": config_hash(experiment, arm)}
            check(run_dir, arm.name, wanted, experiment.mixed_machines)
        report = guard.enforce()
    say(f"simulator passport: {in_words(report)}")
    passport = {"passport": on_record(report)}
    for arm in arms:
        ledgers[arm.name].bind(meta[arm.name] | passport, experiment.mixed_machines)
    files.replace(run_dir / "experiment.yaml", dump_resolved(experiment))
    files.replace(run_dir / "environment.json", json.dumps(environment | passport, indent=2) + "\n")

    sequential = None
    if experiment.stop is not None:
        sequential = SequentialRun(experiment, run_dir, episode_keys(experiment))

    settings = RolloutSettings(
        protocol=experiment.protocol,
        max_steps=experiment.max_steps or SUITES[experiment.suite].max_steps,
        replan_steps=experiment.policy.replan_steps,
        retries=experiment.retries,
    )

    def on_record(record: EpisodeRecord, trajectory) -> None:
        record = replace(
            record,
            protocol=experiment.protocol,
            kernels=meta[record.arm]["kernels_hash"],
            versions=environment["versions"],
            max_steps=settings.max_steps,
            replan_steps=settings.replan_steps,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        record = ledgers[record.arm].append(record, trajectory)
        if sequential is not None:
            sequential.add(record)
        on_episode(record)

    with SimulatorPool(_workers(experiment, len(missing), say), environment=simulator_environment()) as pool:
        mirrors = start_mirrors(run_dir, experiment.tracking)
        try:
            plan = [PlannedEpisode(arm, key, sequential.block(key) if sequential else 0) for arm, key in missing]
            run_episodes(
                plan, policies, pool, settings, on_record, sequential.needs if sequential else lambda arm: True
            )
            _film(experiment, run_dir, {key for _, key in missing}, experiment.videos, pool, say)
        finally:
            ended = mirrors.finish()
            for said in filter(None, (trouble(one, experiment.tracking) for one in ended)):
                say(said)
    return ended


def _workers(experiment: Experiment, episodes: int, say: Callable[[str], None]) -> int:
    """How many simulators to start for so many episodes; why, and what more than fits may cost, is said."""
    fitting = simulators(experiment.workers, episodes)
    say(f"simulators: {fitting.workers}, {fitting.why}")
    if fitting.short:
        say(f"simulators: {fitting.short}; one that is killed for it costs its episode")
    return fitting.workers


def _instructions(experiment: Experiment) -> dict[str, dict[str, str]]:
    """{suite: {task: what the policy is told}}: part of what a run ran in, as reports are read where LIBERO is not."""
    from qlibero.sim.suites import task_language

    return {experiment.suite: {str(task): task_language(experiment.suite, task) for task in experiment.task_ids()}}


def film_run(
    run_dir: Path,
    episodes: int,
    say: Callable[[str], None] = lambda text: None,
    task: int | None = None,
    init: int | None = None,
) -> dict[str, Any]:
    """Videos of a finished run's episodes in every arm, flipped ones first; what is filmed already stays.

    `task`, `init`: only episodes of this task, from this initial state. Raises UserError where there are none.

    For sweeps, whose shards cannot know what flips between arms elsewhere. Needs the simulator and renderer that the
    records came from: a replay that differs raises `WorkFailed`, packages that are not the published ones GuardRefusal.
    """
    from qlibero.config.load import load_experiment
    from qlibero.launch.environment import simulator_environment
    from qlibero.sim.pool import SimulatorPool
    from qlibero.sim.provenance import enforce

    if not (run_dir / "experiment.yaml").is_file():
        raise UserError(
            f"{run_dir}: no run directory (it has no experiment.yaml); `qlibero run` prints the one it writes"
        )
    experiment = load_experiment(run_dir / "experiment.yaml", check_files=False)
    among = {key for key in episode_keys(experiment) if task in (None, key.task) and init in (None, key.init)}
    if not among:
        raise UserError(f"{run_dir}: its experiment has no episode of --task {task} --init {init}")
    enforce()
    with SimulatorPool(_workers(experiment, episodes, say), environment=simulator_environment()) as pool:
        written = _film(experiment, run_dir, among, episodes, pool, say)
    return {"run_dir": str(run_dir), "videos": [str(path) for path in written]}


def _film(
    experiment: Experiment, run_dir: Path, among: set[EpisodeKey], episodes: int | str, pool, say: Callable[[str], None]
) -> list[Path]:
    """Videos of so many (or "all") of those episodes, the same in every arm: first those that flipped between arms."""
    from qlibero.rollout.replay import film

    records: dict[EpisodeKey, list[EpisodeRecord]] = {}
    for arm in experiment.arms():
        for record in read_ledger(run_dir, arm.name):
            if record.key in among and record.outcome != "error":
                records.setdefault(record.key, []).append(record)
    flipped_first = sorted(records, key=lambda key: (len({r.outcome for r in records[key]}) < 2, key))
    keys = flipped_first if episodes == "all" else flipped_first[:episodes]
    wanted = [
        (record, trajectory, path)
        for key in keys
        for record in records[key]
        if not (path := video_path(run_dir, record)).exists()
        and (trajectory := read_trajectory(run_dir, record)) is not None
    ]
    if not wanted:
        return []
    say(f"filming {len(wanted)} episodes by replaying their actions")
    return film(wanted, pool, experiment.protocol)
