"""`qlibero.evaluate` and `qlibero.compare`: LIBERO from Python, for any object with the Policy protocol.

Made to be called between two steps of a training loop: random number generators, torch's threads, gradient mode and
the network's train/eval modes are afterwards what they were. A directory belongs to one set of weights, by content: the
same weights continue it, others are refused, so a loop gives each evaluation an `out` of its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from qlibero import files
from qlibero.config.vocabulary import OF_PYTHON
from qlibero.documents import JsonObject
from qlibero.episode_key import EpisodeKey
from qlibero.errors import GuardRefusal, UserError, WorkFailed, cause
from qlibero.identity import text_sha256
from qlibero.machine.capacity import simulators
from qlibero.machine.environment import simulator_environment
from qlibero.machine.record import describe
from qlibero.policies.base import Policy
from qlibero.results import compare as comparing
from qlibero.results.comparison import ArmComparison
from qlibero.results.ledger import Ledger, read_ledger
from qlibero.results.meta import check
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import RunResults, read_run
from qlibero.results.summary import counts
from qlibero.run.arms import probe
from qlibero.run.episode import PlannedEpisode
from qlibero.run.network import left_as_it_was, network_of, weights_sha256
from qlibero.run.noise import RECIPE
from qlibero.run.rollout import RolloutSettings, as_run, run_episodes
from qlibero.sim.physics_check_cache import PhysicsCheck
from qlibero.sim.pool import SimulatorPool, worker_environment
from qlibero.sim.provenance import enforce, parts
from qlibero.sim.suites import check_task, get_suite, task_language
from qlibero.stats.proportions import Interval, wilson

log = logging.getLogger(__name__)

ARM = "policy"  # evaluated directories have this one arm
RETRIES = 2


@dataclass(frozen=True)
class Evaluation:
    """A policy's episodes: `records` in key order, as the ledger in `out` holds them.

    An episode whose simulator failed is neither a success nor a failure: it counts under `errors`, and the next call
    runs it again.
    """

    out: Path
    records: tuple[EpisodeRecord, ...]

    @property
    def successes(self) -> int:
        return counts(self.records)[0]

    @property
    def episodes(self) -> int:
        """Finished ones."""
        return counts(self.records)[1]

    @property
    def errors(self) -> int:
        return counts(self.records)[2]

    @property
    def success_rate(self) -> float | None:
        """A fraction; None where no episode has finished."""
        return self.successes / self.episodes if self.episodes else None

    @property
    def interval(self) -> Interval | None:
        """Wilson's 95 % interval of the success rate."""
        return wilson(self.successes, self.episodes) if self.episodes else None


def evaluate(
    policy: Policy,
    *,
    suite: str,
    episodes: int,
    out: str | Path,
    tasks: Sequence[int] | None = None,
    seed: int = 7,
    replan_steps: int = 5,
    max_steps: int | None = None,
    workers: int | Literal["auto"] = "auto",
) -> Evaluation:
    """Run what `out` does not hold yet of the official initial states 0 … `episodes` - 1 of each task.

    Args:
        policy: any object with `policies.base.Policy`'s members. Its network is in eval mode meanwhile, without
            gradients.
        suite: a LIBERO suite, see `qlibero ls suites`.
        out: the run directory. `qlibero report` and `export` read it. Calling again continues it.
        tasks: task indices; None is all of the suite.
        seed: of scenes and policy noise; two evaluations are pairs only under the same.
        replan_steps: actions executed of each chunk.
        max_steps: replaces the suite's step cap.
        workers: simulator processes; "auto" is one per core, or four batches of a policy whose provenance says device
            "cuda", as far as memory allows.

    Raises:
        UserError: an argument that cannot be meant.
        GuardRefusal: `out` holds episodes of other weights, other settings or another kind of run; or the simulator is
            not the published one, or has other physics than the references.
        WorkFailed: `out` cannot be written. What has finished is kept.

    Nothing is printed: progress is logged at level INFO, what is in doubt as a warning, both under `qlibero`.
    """
    _check(policy, suite, episodes=episodes, seed=seed, replan_steps=replan_steps, max_steps=max_steps, workers=workers)
    chosen = list(range(get_suite(suite).tasks)) if tasks is None else list(dict.fromkeys(tasks))
    for task in chosen:
        check_task(suite, task)
    if not chosen:
        raise UserError("tasks is empty: write task indices, or None for all of the suite")
    run_dir = Path(out).resolve()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise WorkFailed(f"cannot write to {run_dir}: {cause(problem)}; choose another out") from problem
    settings = RolloutSettings("pure", max_steps or get_suite(suite).max_steps, replan_steps, RETRIES)
    said = {
        "name": run_dir.name,
        "suite": suite,
        "tasks": chosen,
        "episodes_per_task": episodes,
        "seed": seed,
        "protocol": settings.protocol,
        "max_steps": max_steps,
        "policy": {"type": OF_PYTHON, "name": str(policy.name), "replan_steps": replan_steps},
        "backends": [ARM],
    }
    _refuse_other_runs(run_dir)
    keys = [EpisodeKey(suite, task, init, seed) for task in chosen for init in range(episodes)]
    with left_as_it_was(network_of(policy)):
        _run_missing(policy, keys, settings, said, run_dir, workers)
    wanted = set(keys)
    return Evaluation(run_dir, tuple(record for record in read_ledger(run_dir, ARM) if record.key in wanted))


def compare(
    reference: Evaluation | str | Path,
    other: Evaluation | str | Path,
    *,
    margin: float | None = None,
    estimand: str | None = None,
) -> ArmComparison:
    """`other` against `reference`, paired by scene: `.verdict`, `.delta`, `.interval`, `.sentence`, `.to_json()`.

    Each is an Evaluation or a run directory with one arm. `margin` (a fraction) and `estimand` as `qlibero compare`
    has them. Raises UserError where a directory has several arms, or the two have no episode in common.
    """
    runs = [_one_arm(side.out if isinstance(side, Evaluation) else Path(side)) for side in (reference, other)]
    name = next(iter(runs[0].arms))
    if not runs[0].arms[name].by_key().keys() & next(iter(runs[1].arms.values())).by_key().keys():
        raise UserError(f"{runs[0].run_dir} and {runs[1].run_dir} have no episode in common: nothing can be compared")
    (compared,) = comparing.compare(runs, name, margin, estimand).arms.values()
    return compared


def _run_missing(
    policy: Policy,
    keys: Sequence[EpisodeKey],
    settings: RolloutSettings,
    said: JsonObject,
    run_dir: Path,
    workers: int | Literal["auto"],
) -> None:
    """Append to the ledger what it lacks of `keys`; refuse a directory that is bound to anything else."""
    suite = said["suite"]
    simulator = enforce()
    meta: JsonObject = {
        "config_hash": _settings_hash(said),
        "backend": OF_PYTHON,
        "label": said["policy"]["name"],
        "policy": policy.provenance(),
        "identity": {**_identity(policy), **parts(suite, simulator)},
        **probe(policy, suite),
    }
    check(run_dir, ARM, meta)

    def missing() -> list[EpisodeKey]:
        done = {record.key for record in read_ledger(run_dir, ARM) if record.outcome != "error"}
        return [key for key in keys if key not in done]

    if not missing():
        _describe(run_dir, said)
        return
    environment = {
        **describe(),
        "instructions": {suite: {str(task): task_language(suite, task) for task in _asked(run_dir, said)}},
        "imported": {name: asdict(one) for name, one in simulator.items()},
    }
    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger(run_dir, ARM, "000of001", meta["config_hash"]))
        todo = missing()  # again, now that nobody else writes here
        guard = PhysicsCheck(suite, worker_environment(simulator_environment()), environment["gl"])
        report = stack.enter_context(guard).enforce()
        log.info("physics check: %s", report.summary())
        physics = {"passport": report.to_json()}
        ledger.bind(meta | physics)
        _describe(run_dir, said)
        files.replace(run_dir / "environment.json", json.dumps(environment | physics, indent=2) + "\n")
        on_gpu = policy.provenance().get("device") == "cuda"
        fitting = simulators(workers, len(todo), gpu_batch=policy.batch_size if on_gpu else None)
        log.info("%d of %d episodes with %d simulators: %s", len(todo), len(keys), fitting.workers, fitting.why)
        pool = stack.enter_context(SimulatorPool(fitting.workers, environment=simulator_environment()))

        def finished(record: EpisodeRecord, trajectory: np.ndarray | None) -> None:
            written = ledger.append(as_run(record, settings, "", environment["versions"]), trajectory)
            log.info("%s: %s after %d steps", written.key, written.outcome, written.steps)

        run_episodes([PlannedEpisode(ARM, key) for key in todo], {ARM: policy}, pool, settings, finished)


def _asked(run_dir: Path, said: Mapping[str, Any]) -> dict[int, int]:
    """How many initial states of each task this call and earlier ones want, by task."""
    earlier = _described(run_dir)
    each = earlier.get("episodes_per_task", 0)
    asked = {task: each[task] if isinstance(each, dict) else each for task in earlier.get("tasks", ())}
    asked |= {task: max(said["episodes_per_task"], asked.get(task, 0)) for task in said["tasks"]}
    for record in read_ledger(run_dir, ARM):
        asked[record.task] = max(record.init + 1, asked.get(record.task, 0))
    return dict(sorted(asked.items()))


def _describe(run_dir: Path, said: Mapping[str, Any]) -> None:
    """Write the experiment.yaml of all that the directory holds or still lacks, not of the last call alone."""
    asked = _asked(run_dir, said)
    each = next(iter(asked.values())) if len(set(asked.values())) == 1 else asked
    whole = yaml.safe_dump({**said, "tasks": list(asked), "episodes_per_task": each}, sort_keys=False)
    files.replace(run_dir / "experiment.yaml", whole)


def _described(run_dir: Path) -> JsonObject:
    path = run_dir / "experiment.yaml"
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def _check(policy: Policy, suite: str, **numbers: Any) -> None:
    members = ("name", "noise_shape", "batch_size", "infer", "provenance")
    if lacking := [name for name in members if not hasattr(policy, name)]:
        raise UserError(
            f"a {type(policy).__name__} is no policy: it has no {', '.join(lacking)}; "
            "qlibero.policies.base.Policy says what each is"
        )
    limits = {
        "episodes": (1, get_suite(suite).inits),
        "seed": (0, 1 << 63),
        "replan_steps": (1, policy.noise_shape[0]),
        "max_steps": (1, 100_000),
        "workers": (1, 10_000),
    }
    defaults = {"max_steps": None, "workers": "auto"}
    for name, (least, most) in limits.items():
        value = numbers[name]
        if name in defaults and value == defaults[name]:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise UserError(f"{name} is {value!r}: write an integer from {least} to {most}")


def _refuse_other_runs(run_dir: Path) -> None:
    """GuardRefusal for a directory of `qlibero run`: its experiment.yaml says how to continue it."""
    if (run_dir / "experiment.yaml").exists() and _described(run_dir).get("policy", {}).get("type") != OF_PYTHON:
        raise GuardRefusal(f"{run_dir} holds a run of `qlibero run`: choose another out")


def _one_arm(run_dir: Path) -> RunResults:
    run = read_run(run_dir)
    if len(run.arms) > 1:
        raise UserError(
            f"{run_dir} has the arms {', '.join(run.arms)}: `qlibero compare` compares those with each other"
        )
    return run


def _identity(policy: Policy) -> dict[str, str]:
    """What decides an action, by content: the weights as they are in memory, and what the policy says of itself."""
    found = {"noise recipe": RECIPE, "policy says": text_sha256(json.dumps(policy.provenance(), sort_keys=True))}
    network = network_of(policy)
    if network is not None:
        found["weights"] = weights_sha256(network)
    return found


def _settings_hash(said: JsonObject) -> str:
    """Over what decides an episode; more tasks or initial states continue a directory."""
    decides = {key: said[key] for key in ("suite", "seed", "protocol", "max_steps")}
    decides["replan_steps"] = said["policy"]["replan_steps"]
    return text_sha256(json.dumps(decides, sort_keys=True))[:16]
