"""One experiment from its config to its ledger: the only place that knows all the parts.

    run directory → what is missing → policies of the arms (calibrated, quantized, kernels tried), and beside them the
    physics check → simulators → ledger

Running the same experiment again continues it: what the ledger holds is never run twice, and when nothing is missing
the result is shown without loading a policy. A shard is the same thing over a part of the episodes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlibero import files
from qlibero.activity import doing
from qlibero.config.config_hash import config_hash
from qlibero.config.dump import dump_resolved
from qlibero.config.schema import Experiment, Tracking
from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError, WorkFailed, cause
from qlibero.places import RUNS
from qlibero.results.arm_equality import RECHECK
from qlibero.results.ledger import Ledger, read_ledger
from qlibero.results.machines import mix_in_words
from qlibero.results.meta import check
from qlibero.results.records import EpisodeRecord
from qlibero.run.planned import episode_keys, finished_episodes, missing_episodes
from qlibero.run.sequential import SequentialRun
from qlibero.run.simulators import gpu_batch, start_pool, tell_memory
from qlibero.run.state import RunState, run_state
from qlibero.sim.own_suite import lint
from qlibero.tracking.mirror import MirrorEnd

if TYPE_CHECKING:
    import numpy as np

    from qlibero.config.arms import Arm
    from qlibero.policies.base import Observation
    from qlibero.quant.recheck import Recheck
    from qlibero.run.episode import PlannedEpisode
    from qlibero.sim.pool import SimulatorPool

log = logging.getLogger(__name__)


def run_directory(experiment: Experiment, out: Path | None) -> Path:
    """Where the experiment's ledger lies: `out`, or logs/<name> (see `places.RUNS`)."""
    return (out or RUNS / experiment.name).resolve()


def look_through(experiment: Experiment) -> None:
    """Raise UserError for tasks of one's own that nobody should run. They are known by their names from here on."""
    own = [suite.plugin() for suite in experiment.own_suites()]
    for plugin in own:
        plugin.make_known()
    lint(own)


def run_experiment(
    experiment: Experiment,
    out: Path | None = None,
    shard: tuple[int, int] = (0, 1),
    on_start: Callable[[int, int], None] = lambda missing, total: None,
    on_episode: Callable[[EpisodeRecord], None] = lambda record: None,
    on_result: Callable[[Path], None] = lambda run_dir: None,
    most_pairs: int | None = None,
) -> RunState:
    """Run what is missing and return what there is then.

    `most_pairs`: run no more than so many of the missing pairs now, the first ones. One shard of several has no
    mirrors, which belong to whole runs, and a number of videos is recorded by the first.
    `on_result(run_dir)` is called when every episode is in the ledger, before what can wait: videos, mirrors.
    Raises `GuardRefusal` when the directory holds another configuration, a kernel or an artifact is refused, or the
    simulator has other physics than the references (`sim/physics_check_cache.py`);
    `WorkFailed` when the directory cannot be written or the disk is full (finished episodes are kept).
    """
    look_through(experiment)
    run_dir = run_directory(experiment, out)
    make_directory(run_dir)
    for arm in experiment.arms():
        check(run_dir, arm.name, {"config_hash": config_hash(experiment, arm)})
    mirrors: list[MirrorEnd] = []
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
                mirrors = _run(experiment, run_dir, shard, missing, ledgers, on_episode, on_result)
    else:
        on_start(0, total)
    if not missing:
        on_result(run_dir)
    tell_mixes(experiment, run_dir)
    return replace(run_state(experiment, run_dir), mirrors=tuple(mirrors))


def tell_mixes(experiment: Experiment, run_dir: Path) -> None:
    """Warn of arms whose episodes come from machines that answer differently."""
    for arm in experiment.arms():
        if mix := mix_in_words(read_ledger(run_dir, arm.name)):
            log.warning(f"arm {arm.name}: {mix}")


def make_directory(run_dir: Path) -> None:
    """Make the run directory. Raises UserError when a file is in its place, WorkFailed when it cannot be made."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        owner = run_dir.stat().st_uid
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{run_dir} is a file, not a run directory: choose another --out") from None
    except OSError as problem:
        raise WorkFailed(f"cannot write to {run_dir}: {cause(problem)}; choose another --out") from problem
    if owner != os.geteuid():
        log.warning(f"{run_dir} belongs to another user (id {owner}): who can write there can change these results")


def _run(
    experiment: Experiment,
    run_dir: Path,
    shard: tuple[int, int],
    missing: list[tuple[str, EpisodeKey]],
    ledgers: Mapping[str, Ledger],
    on_episode: Callable[[EpisodeRecord], None],
    on_result: Callable[[Path], None],
) -> list[MirrorEnd]:
    """Run these episodes; returns what each mirror said at its end, no reason to fail: the ledger is the truth.

    The simulators start, and build their first scenes, while the policy is loaded; not where something is timed then.
    """
    from qlibero.run.episode import PlannedEpisode
    from qlibero.run.rollout import first_tasks

    doing("looking at this machine")
    sequential = None
    if experiment.stop is not None:
        sequential = SequentialRun(experiment, run_dir, episode_keys(experiment))
    plan = [PlannedEpisode(arm, key, sequential.block(key) if sequential else 0) for arm, key in missing]
    with start_pool(experiment, len(missing), gpu_batch(experiment)) as pool:
        if not any(_is_timed(arm) for arm in experiment.arms()):
            for worker, (suite, task) in enumerate(first_tasks(plan, pool.workers)):
                pool.prepare(worker, suite, task, experiment.protocol)
        return _run_in(pool, plan, experiment, run_dir, shard, sequential, ledgers, on_episode, on_result)


def _is_timed(arm: Arm) -> bool:
    """Whether times before the first episode decide what the arm does: its fastest kernel, how late answers are."""
    return arm.backend == "auto" or (arm.execution.mode == "async" and arm.execution.latency_ms == "measured")


def _run_in(
    pool: SimulatorPool,
    plan: Sequence[PlannedEpisode],
    experiment: Experiment,
    run_dir: Path,
    shard: tuple[int, int],
    sequential: SequentialRun | None,
    ledgers: Mapping[str, Ledger],
    on_episode: Callable[[EpisodeRecord], None],
    on_result: Callable[[Path], None],
) -> list[MirrorEnd]:
    # Here, not above: torch and the simulator take seconds to import, and a finished experiment needs neither.
    from qlibero.machine.environment import simulator_environment
    from qlibero.machine.record import describe
    from qlibero.run.arms import load_arms, prompts
    from qlibero.run.latency import fixed_execution
    from qlibero.run.pace import Pace
    from qlibero.run.replay import replay
    from qlibero.run.rollout import RolloutSettings, as_run, run_episodes
    from qlibero.run.videos import Videos
    from qlibero.sim.physics_check_cache import PhysicsCheck
    from qlibero.sim.pool import worker_environment
    from qlibero.sim.provenance import enforce, parts
    from qlibero.sim.suites import flaws, get_suite
    from qlibero.tracking.mirror import start_mirrors

    asked = {episode.arm for episode in plan}
    arms = [arm for arm in experiment.arms() if arm.name in asked]
    suites = list(dict.fromkeys(episode.key.suite for episode in plan))  # a shard has few of the experiment's
    simulator = enforce()
    environment = {
        **describe(),
        "instructions": _instructions(experiment),
        **_variants(experiment),
        "imported": {name: asdict(one) for name, one in simulator.items()},
    }
    with ExitStack() as stack:
        inside = worker_environment(simulator_environment())
        guards = [PhysicsCheck(suite, inside, environment["gl"]) for suite in suites]
        stack.enter_context(guards[0])  # looks while the policy loads; the others one by one, each is a simulator
        watched: dict[str, Recheck] = {}
        before = {arm.name: check(run_dir, arm.name, {}) for arm in arms}
        policies, meta = load_arms(experiment, arms, before, run_dir, watched)
        of_simulator: dict[str, str] = {}
        for suite in experiment.suites:
            of_simulator |= parts(suite, simulator, experiment.initial_states()[0])
        for arm in arms:
            meta[arm.name]["identity"] |= of_simulator
            hash_ = config_hash(experiment, arm)
            execution = fixed_execution(run_dir, arm, policies[arm.name], prompts(experiment), meta[arm.name], hash_)
            if execution is not None:
                meta[arm.name]["execution"] = execution
                meta[arm.name]["identity"]["latency"] = f"{execution['latency_steps']} control steps"
            wanted = meta[arm.name] | {"config_hash": hash_}
            check(run_dir, arm.name, wanted, experiment.mixed_machines)
        doing("physics check")
        reports = {suites[0]: guards[0].enforce()}
        for suite, guard in zip(suites[1:], guards[1:], strict=True):
            with guard:
                reports[suite] = guard.enforce()
    for suite, task in experiment.all_tasks():
        for flaw in flaws(suite, task):
            log.warning(f"{suite} task {task} contradicts itself: {flaw}")
    for suite, report in reports.items():
        log.info(f"physics check{f' of {suite}' if len(reports) > 1 else ''}: {report.summary()}")
    checked = {suite: report.to_json() for suite, report in reports.items()}
    single = experiment.suites[0] if len(experiment.suites) == 1 else None
    physics: JsonObject = {"passport": checked[single] if single else checked}
    for arm in arms:
        ledgers[arm.name].bind(meta[arm.name] | physics, experiment.mixed_machines)
    files.replace(run_dir / "experiment.yaml", dump_resolved(experiment))
    files.replace(run_dir / "environment.json", json.dumps(environment | physics, indent=2) + "\n")

    settings = RolloutSettings(
        protocol=experiment.protocol,
        max_steps={suite: experiment.max_steps or get_suite(suite).max_steps for suite in experiment.suites},
        replan_steps=experiment.policy.replan_steps,
        retries=experiment.retries,
        paces={
            arm.name: Pace(arm.policy.replan_steps, meta[arm.name].get("execution", {}).get("latency_steps"))
            for arm in arms
        },
    )

    names = [arm.name for arm in experiment.arms()]
    wanted_videos = experiment.videos if shard[0] == 0 or experiment.videos == "all" else 0
    tracking = experiment.tracking if shard[1] == 1 else Tracking(mode="disabled")
    videos = Videos(run_dir, names, wanted_videos, _recorded_before(experiment, run_dir, shard))

    def finished(record: EpisodeRecord, trajectory: np.ndarray | None) -> None:
        record = as_run(record, settings, meta[record.arm]["kernels_hash"], environment["versions"])
        record = ledgers[record.arm].append(record, trajectory)
        videos.finished(record)
        if sequential is not None:
            sequential.add(record)
        on_episode(record)

    def on_call(
        arm: str, observations: Sequence[Observation], noise: np.ndarray, actions: np.ndarray, seconds: float
    ) -> None:
        if arm in watched:
            watched[arm].call(observations, noise, actions, seconds)

    def needs(arm: str) -> bool:  # after a wrong kernel no further episode is begun
        return not any(one.wrong for one in watched.values()) and (sequential is None or sequential.needs(arm))

    with videos:
        settings = replace(settings, videos=videos.directory)
        doing("episodes", pool.workers)
        mirrors, ended = start_mirrors(run_dir, tracking), []
        try:
            run_episodes(plan, policies, pool, settings, finished, needs, on_call)
            tell_memory(pool)
            videos.fill()
            right = _try_kernels_again(run_dir, watched, ledgers)
            on_result(run_dir)  # a flip that an earlier call ran half of is still to be recorded: that can wait
            if right:
                replay(run_dir, videos.lacking(), pool, experiment.protocol)
        except BaseException:
            pool.close()  # simulators would record on in what `videos` takes away
            raise
        finally:
            ended += mirrors.finish()
            for said in filter(None, (one.told(tracking) for one in ended)):
                log.warning(said)
    return ended


def _recorded_before(experiment: Experiment, run_dir: Path, shard: tuple[int, int]) -> list[EpisodeRecord]:
    """What ledgers hold that may still lack a video. Where all episodes get one, each shard has its own: two that
    replay the same would write the same file."""
    records = [record for arm in experiment.arms() for record in read_ledger(run_dir, arm.name)]
    if experiment.videos != "all" or shard[1] == 1:
        return records
    own = set(episode_keys(experiment, shard))
    return [record for record in records if record.key in own]


def _try_kernels_again(run_dir: Path, watched: Mapping[str, Recheck], ledgers: Mapping[str, Ledger]) -> bool:
    """Every watched arm's kernels once more, and on record what was found; whether all was right."""
    for arm, recheck in watched.items():
        doing(f"trying the kernels of {arm} again")
        found = recheck.finish()
        if found is not None:
            name = RECHECK.format(shard=ledgers[arm].shard, attempt=ledgers[arm].attempt)
            files.replace(run_dir / arm / name, json.dumps(found.to_json(), indent=1) + "\n")
            log.info(
                f"arm {arm}: kernels tried again, {count_text(found.products, 'product')} of "
                f"{count_text(found.layers, 'layer')}"
            )
    wrong = [f"arm {arm}: {text}" for arm, recheck in watched.items() for text in recheck.wrong]
    for text in wrong:
        log.error(text)
    return not wrong


def _variants(experiment: Experiment) -> dict[str, dict[str, dict[str, str]]]:
    """{"variants": {suite: {task: its name}}} of suites with many variants of a task, as their authors name them."""
    from qlibero.sim.suites import perturbation

    names = {
        suite: {str(task): name for task in experiment.task_ids(suite) if (name := perturbation(suite, task).name)}
        for suite in experiment.suites
    }
    named = {suite: tasks for suite, tasks in names.items() if tasks}
    return {"variants": named} if named else {}


def _instructions(experiment: Experiment) -> dict[str, dict[str, str]]:
    """{suite: {task: what the policy is told}}: part of what a run ran in, as reports are read where LIBERO is not."""
    from qlibero.sim.suites import task_language

    return {
        suite: {str(task): task_language(suite, task) for task in experiment.task_ids(suite)}
        for suite in experiment.suites
    }
