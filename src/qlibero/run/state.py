"""How far an experiment is, from its run directory: what `qlibero run` prints last, its keys fixed in `to_json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from qlibero.config.schema import Experiment
from qlibero.documents import JsonObject
from qlibero.results.arm_equality import Arithmetic, arithmetic
from qlibero.results.ledger import read_arm, read_ledger
from qlibero.results.stopping import Decision
from qlibero.results.summary import ArmSummary, summarize_arm
from qlibero.run.planned import episode_keys, missing_episodes
from qlibero.run.sequential import SequentialRun
from qlibero.tracking.mirror import MirrorEnd


@dataclass(frozen=True)
class StopState:
    """Under `stop`: each tested arm's decision, and episodes over all arms. An open question has saved nothing yet."""

    decisions: dict[str, Decision]
    episodes_spent: int
    episodes_saved: int

    def to_json(self) -> JsonObject:
        return {
            "arms": {arm: asdict(decision) for arm, decision in self.decisions.items()},
            "episodes_spent": self.episodes_spent,
            "episodes_saved": self.episodes_saved,
        }


@dataclass(frozen=True)
class RunState:
    """`mirrors`: of those that ran, what each said at its end."""

    experiment: str
    run_dir: Path
    complete: bool
    arms: dict[str, ArmSummary]
    arithmetic: Arithmetic
    stop: StopState | None
    mirrors: tuple[MirrorEnd, ...] = ()

    def to_json(self) -> JsonObject:
        return {
            "experiment": self.experiment,
            "run_dir": str(self.run_dir),
            "complete": self.complete,
            "arms": {name: arm.to_json() for name, arm in self.arms.items()},
            "arithmetic": self.arithmetic.to_json(),
            **({"stop": self.stop.to_json()} if self.stop else {}),
            **({"mirrors": [mirror.to_json() for mirror in self.mirrors]} if self.mirrors else {}),
        }


def run_state(experiment: Experiment, run_dir: Path) -> RunState:
    """From the ledgers, whoever wrote them."""
    arms = {arm.name: read_arm(run_dir, arm.name) for arm in experiment.arms()}
    complete = not missing_episodes(experiment, run_dir)
    return RunState(
        experiment.name,
        run_dir,
        complete,
        {name: summarize_arm(arm.records) for name, arm in arms.items()},
        arithmetic(run_dir, arms),
        _stop_state(experiment, run_dir, complete) if experiment.stop is not None else None,
    )


def _stop_state(experiment: Experiment, run_dir: Path, complete: bool) -> StopState:
    sequential = SequentialRun(experiment, run_dir, episode_keys(experiment))
    spent = sum(len(read_ledger(run_dir, arm.name)) for arm in experiment.arms())
    most = len(sequential.order) * len(experiment.arms())
    return StopState(dict(sequential.decisions()), spent, max(0, most - spent) if complete else 0)
