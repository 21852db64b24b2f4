"""Results of other tools, read as far as they go: LeRobot, the openpi fork this grew from, vla-eval.

None of them records what the scene was, and LeRobot not even which initial state an episode started from. So
an import is a `ForeignArm`: outcomes under the best key the file has. `foreign.py` compares them.

Formats (read in the sources, 2026-11):
  LeRobot   eval_info.json {"per_task": [{"task_group", "task_id", "metrics": {"successes": [bool]}}], "overall"};
            before multi-task: {"per_episode": [{"episode_ix", "success", "seed"}], "aggregated"}
  openpi fork  <suite>_results.json {"task_suite", "seed", "results": [{"task_id", "episode_idx", "success", "steps"}]},
            and a .csv of the same rows, which names the suite in its file name only
  vla-eval  {"benchmark", "harness_version", "tasks": [{"task", "episodes": [{"episode_id", "success" or
            "metrics": {"success"}, "failure_reason"}]}]}
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlibero.episode_key import OFFICIAL
from qlibero.errors import UserError
from qlibero.results.pairing import Arm
from qlibero.results.records import Outcome

Key = tuple[str, str, int, int | None]  # suite, task (index or its text), initial state, seed where the file says it


@dataclass(frozen=True)
class ForeignArm:
    """`episodes`: (key or None, outcome). Without keys the arm can only be compared unpaired; `reason` says
    why. `arm` is the thing itself when it is one of qlibero's, with fingerprints.
    """

    name: str
    tool: str
    episodes: tuple[tuple[Key | None, Outcome], ...]
    reason: str = ""
    arm: Arm | None = None

    @property
    def has_seeds(self) -> bool:
        return all(key is not None and key[3] is not None for key, _ in self.episodes)

    def keyed(self, with_seed: bool = False) -> dict[tuple, Outcome] | None:
        """Outcomes by key, without its seed unless asked for; None if any episode has no key or shares one."""
        if any(key is None for key, _ in self.episodes):
            return None
        found = {key if with_seed else key[:3]: outcome for key, outcome in self.episodes}
        return found if len(found) == len(self.episodes) else None

    @property
    def counts(self) -> tuple[int, int, int]:
        outcomes = [outcome for _, outcome in self.episodes]
        return outcomes.count("success"), len(outcomes) - outcomes.count("error"), outcomes.count("error")


def read_foreign(path: Path | str) -> ForeignArm:
    """Recognise and read a result file of another tool. Raises UserError naming the file for anything else."""
    path = Path(path)
    name = path.parent.name + "/" + path.stem if path.parent.name else path.stem
    try:
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                return _fork(name, _suite_in(path), None, list(csv.DictReader(file)))
        data = json.loads(path.read_text())
        if isinstance(data, dict) and "per_task" in data:
            return _lerobot(name, data["per_task"])
        if isinstance(data, dict) and "per_episode" in data:
            outcomes = [(None, _outcome(e["success"])) for e in data["per_episode"]]
            return ForeignArm(name, "LeRobot", tuple(outcomes), "LeRobot records no initial state")
        if isinstance(data, dict) and "task_suite" in data:
            return _fork(name, data["task_suite"], data.get("seed"), data["results"])
        if isinstance(data, dict) and "benchmark" in data and "tasks" in data:
            return _vla_eval(name, data)
    except OSError as problem:
        raise UserError(f"{path}: {problem.strerror}") from None
    except ValueError as problem:
        raise UserError(f"{path}: cannot be read: {problem}") from None
    except (KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path}: looks like a known result file but lacks {problem}") from None
    raise UserError(
        f"{path}: not a result file of LeRobot (eval_info.json), the openpi fork "
        "(<suite>_results.json or .csv) or vla-eval; for a run of qlibero give its directory"
    )


def _lerobot(name: str, per_task: list[dict[str, Any]]) -> ForeignArm:
    outcomes = [(None, _outcome(s)) for task in per_task for s in task["metrics"]["successes"]]
    return ForeignArm(
        name,
        "LeRobot",
        tuple(outcomes),
        "LeRobot's initial states depend on when earlier episodes ended (lerobot #4152)",
    )


def _fork(name: str, suite: str, seed: int | None, rows: list[dict[str, Any]]) -> ForeignArm:
    episodes = tuple(
        ((suite, str(int(r["task_id"])), int(r["episode_idx"]), seed), _outcome(r["success"])) for r in rows
    )
    return ForeignArm(name, "openpi fork", episodes)


def _vla_eval(name: str, data: dict[str, Any]) -> ForeignArm:
    suite = next(iter(re.findall(r"libero_\w+", data["benchmark"])), data["benchmark"])
    episodes = []
    for task in data["tasks"]:
        for e in task["episodes"]:
            index = re.search(r"(\d+)$", str(e["episode_id"]))
            key = (suite, str(task["task"]), int(index[1]), None) if index else None
            success = e["success"] if "success" in e else e.get("metrics", {}).get("success")
            if success is None and not e.get("failure_reason"):
                raise ValueError(
                    f"episode {e['episode_id']} of task {task['task']!r} says neither success nor failure_reason"
                )
            episodes.append((key, "error" if e.get("failure_reason") else _outcome(success)))
    return ForeignArm(name, "vla-eval", tuple(episodes))


def _outcome(value: Any) -> Outcome:
    meant = (
        {"true": True, "1": True, "false": False, "0": False}.get(value.lower()) if isinstance(value, str) else value
    )
    if meant not in (True, False):
        raise ValueError(f"success is {value!r}, expected True or False")
    return "success" if meant else "failure"


def _suite_in(path: Path) -> str:
    found = re.search(r"libero_(?:spatial|object|goal|10|90)", path.stem)
    if not found:
        raise ValueError("the suite must be in the file's name, e.g. libero_object_results.csv")
    return found[0]


def from_run(arm: Arm, run: str) -> ForeignArm:
    """An arm of qlibero as one among the others."""
    # other tools know official initial states only: a fresh one has no number that could be taken for one of theirs
    episodes = tuple(
        ((key.suite, str(key.task), key.init if key.inits == OFFICIAL else -1 - key.init, key.seed), record.outcome)
        for key, record in sorted(arm.records.items())
    )
    return ForeignArm(f"{run}/{arm.name}", "qlibero", episodes, arm=arm)
