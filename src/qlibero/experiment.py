"""One experiment from its config to its ledger: the only place that knows all the parts.

    run directory → what is missing → policies of the arms (calibrated, quantized, kernels tried) → simulators → ledger

Running the same experiment again continues it: what the ledger holds is never run twice, and when nothing is missing
the result is shown without loading a policy. A shard is the same thing over a part of the episodes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlibero.config.load import dump_resolved
from qlibero.config.schema import REPOSITORY, Experiment, config_hash
from qlibero.episode_key import EpisodeKey
from qlibero.errors import WorkFailed
from qlibero.results.ledger import Ledger, check_config, read_ledger, read_trajectory, write_meta
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import video_path
from qlibero.results.summary import summarize_arm
from qlibero.sequential import SequentialRun

RUNS = REPOSITORY / "logs"


def run_directory(experiment: Experiment, out: Path | None) -> Path:
    """Where the experiment's ledger lies: `out`, or logs/<name> in the repository."""
    return (out or RUNS / experiment.name).resolve()


def episode_keys(experiment: Experiment, shard: tuple[int, int] = (0, 1)) -> list[EpisodeKey]:
    """The episodes of shard `(index, count)`, in order; all arms of an episode belong to the same shard.

    A shard is a contiguous piece, so that it has few tasks: building a task's scene costs as much as an episode.
    """
    keys = [
        EpisodeKey(experiment.suite, task, init, experiment.seed)
        for task in experiment.task_ids()
        for init in range(experiment.episodes_per_task)
    ]
    index, count = shard
    return keys[index * len(keys) // count : (index + 1) * len(keys) // count]


def missing_episodes(
    experiment: Experiment, run_dir: Path, shard: tuple[int, int] = (0, 1)
) -> list[tuple[str, EpisodeKey]]:
    """(arm, key) of everything the ledger does not hold yet. Episodes that ended in an error are missing: they get
    another chance each time the experiment is run."""
    done = {
        (arm.name, record.key)
        for arm in experiment.arms()
        for record in read_ledger(run_dir, arm.name)
        if record.outcome != "error"
    }
    arms = [arm.name for arm in experiment.arms()]
    keys = episode_keys(experiment, shard)
    if experiment.stop is not None:
        sequential = SequentialRun(experiment, run_dir, keys, shard[1])
        keys = [] if sequential.decided() else sequential.order
    return [(arm, key) for key in keys for arm in arms if (arm, key) not in done]


def run_experiment(
    experiment: Experiment,
    out: Path | None = None,
    shard: tuple[int, int] = (0, 1),
    on_start: Callable[[int, int], None] = lambda missing, total: None,
    on_episode: Callable[[EpisodeRecord], None] = lambda record: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run what is missing and return the summary that `qlibero run` prints as its last line.

    Raises `GuardRefusal` when the directory holds another configuration, a kernel or an artifact is refused;
    `WorkFailed` when the directory cannot be written or the disk is full (finished episodes are kept).
    """
    run_dir = run_directory(experiment, out)
    for arm in experiment.arms():
        check_config(run_dir, arm.name, config_hash(experiment, arm))
    _prepare_directory(experiment, run_dir)
    total = len(episode_keys(experiment, shard)) * len(experiment.arms())
    missing = missing_episodes(experiment, run_dir, shard)
    if missing:
        with ExitStack() as stack:
            name = f"{shard[0]:03d}of{shard[1]:03d}"
            ledgers = {
                arm.name: stack.enter_context(Ledger(run_dir, arm.name, name, config_hash(experiment, arm)))
                for arm in experiment.arms()
            }
            # again, now that the ledgers are locked: another process may just have finished some
            missing = missing_episodes(experiment, run_dir, shard)
            on_start(len(missing), total)
            if missing:
                _run(experiment, run_dir, missing, ledgers, on_episode, say)
    else:
        on_start(0, total)
    return summary(experiment, run_dir)


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
        sequential = SequentialRun(experiment, run_dir, keys, 1)
        spent = sum(len(read_ledger(run_dir, arm.name)) for arm in experiment.arms())
        document["stop"] = {
            "arms": {arm: asdict(decision) for arm, decision in sequential.decisions().items()},
            "episodes_spent": spent,
            "episodes_saved": len(keys) * len(experiment.arms()) - spent,
        }
    return document


def _prepare_directory(experiment: Experiment, run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = run_dir / f".experiment.yaml.{os.getpid()}"
        temporary.write_text(dump_resolved(experiment))
        temporary.replace(run_dir / "experiment.yaml")
    except OSError as problem:
        raise WorkFailed(f"cannot write to {run_dir}: {problem.strerror}; choose another --out") from problem


def _run(
    experiment: Experiment,
    run_dir: Path,
    missing: list[tuple[str, EpisodeKey]],
    ledgers: Mapping[str, Ledger],
    on_episode: Callable[[EpisodeRecord], None],
    say: Callable[[str], None],
) -> None:
    # Here, not above: torch and the simulator take seconds to import, and a finished experiment needs neither.
    from qlibero.arms import load_arms
    from qlibero.launch.environment import describe, simulator_environment
    from qlibero.rollout.engine import RolloutSettings, run_episodes
    from qlibero.rollout.episode import PlannedEpisode
    from qlibero.sim.pool import SimulatorPool
    from qlibero.sim.suites import SUITES
    from qlibero.tracking.mirror import start_mirrors

    arms = [arm for arm in experiment.arms() if any(arm.name == name for name, _ in missing)]
    policies, meta = load_arms(experiment, arms, say)
    environment = {**describe(), "instructions": _instructions(experiment)}
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
    for arm in arms:
        write_meta(run_dir, arm.name, meta[arm.name])

    sequential = None
    if experiment.stop is not None:
        sequential = SequentialRun(experiment, run_dir, episode_keys(experiment), 1)

    def on_record(record: EpisodeRecord, trajectory) -> None:
        record = replace(
            record,
            protocol=experiment.protocol,
            kernels=meta[record.arm]["kernels_hash"],
            versions=environment["versions"],
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        record = ledgers[record.arm].append(record, trajectory)
        if sequential is not None:
            sequential.add(record)
        on_episode(record)

    settings = RolloutSettings(
        protocol=experiment.protocol,
        max_steps=experiment.max_steps or SUITES[experiment.suite].max_steps,
        replan_steps=experiment.policy.replan_steps,
        retries=experiment.retries,
    )
    with SimulatorPool(worker_count(experiment, len(missing)), environment=simulator_environment()) as pool:
        mirrors = start_mirrors(run_dir, experiment.tracking)
        try:
            plan = [PlannedEpisode(arm, key, sequential.block(key) if sequential else 0) for arm, key in missing]
            run_episodes(plan, policies, pool, settings, on_record, sequential.decided if sequential else lambda: False)
            _film(experiment, run_dir, {key for _, key in missing}, pool, say)
        finally:
            mirrors.finish()


def _instructions(experiment: Experiment) -> dict[str, dict[str, str]]:
    """{suite: {task: what the policy is told}}: part of what a run ran in, since reports are read where LIBERO is not."""
    from qlibero.sim.suites import task_language

    return {experiment.suite: {str(task): task_language(experiment.suite, task) for task in experiment.task_ids()}}


def worker_count(experiment: Experiment, episodes: int) -> int:
    """Simulator processes: as asked, or one per core this process may use, as far as memory allows (2.5 GB each)."""
    if experiment.workers != "auto":
        return min(experiment.workers, episodes)
    memory_gb = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return max(1, min(len(os.sched_getaffinity(0)), int(memory_gb / 2.5), episodes))


def _film(experiment: Experiment, run_dir: Path, ours: set[EpisodeKey], pool, say: Callable[[str], None]) -> None:
    """Videos of the episodes just run, the same in every arm: first those that flipped between arms."""
    from qlibero.rollout.replay import film

    records: dict[EpisodeKey, list[EpisodeRecord]] = {}
    for arm in experiment.arms():
        for record in read_ledger(run_dir, arm.name):
            if record.key in ours and record.outcome != "error":
                records.setdefault(record.key, []).append(record)
    flipped_first = sorted(records, key=lambda key: (len({r.outcome for r in records[key]}) < 2, key))
    keys = flipped_first if experiment.videos == "all" else flipped_first[: experiment.videos]
    wanted = [
        (record, trajectory, path)
        for key in keys
        for record in records[key]
        if not (path := video_path(run_dir, record)).exists()
        and (trajectory := read_trajectory(run_dir, record)) is not None
    ]
    if wanted:
        say(f"filming {len(wanted)} episodes by replaying their actions")
        film(wanted, pool, experiment.protocol)
