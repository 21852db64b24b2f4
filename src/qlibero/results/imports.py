"""Results of other tools, read as far as they go: LeRobot, the openpi fork this grew from, vla-eval.

None of them records what the scene was, and LeRobot not even which initial state an episode started from. So
an import is a `ForeignArm`: outcomes under the best key the file has. `external_results.py` compares them.

Formats (read in the sources, 2026-11):
  LeRobot   eval_info.json {"per_task": [{"task_group", "task_id", "metrics": {"successes": [bool]}}], "overall"};
            before multi-task: {"per_episode": [{"episode_ix", "success", "seed"}], "aggregated"}
  openpi fork  <suite>_results.json {"task_suite", "seed", "results": [{"task_id", "episode_idx", "success", "steps"}]},
            and a .csv of the same rows, which names the suite in its file name only
            (as .jsonl as well: one row a line)
  OpenVLA(-OFT)  a text log: "Task suite: X", then for each episode "Task: T", "Starting episode N...", "Success: B"
  vla-eval  {"benchmark", "harness_version", "tasks": [{"task", "episodes": [{"episode_id", "success" or
            "metrics": {"success"}, "failure_reason"}]}]}
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlibero.episode_key import OFFICIAL
from qlibero.errors import UserError
from qlibero.results.pairing import Arm
from qlibero.results.records import Outcome

Cell = tuple[str, str]  # suite, task (index or its text)
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
    cells: tuple[Cell, ...] = ()
    """Suite and task of each episode where the file says these without an initial state; () where it says none."""

    @property
    def places(self) -> list[Cell | None]:
        """Suite and task of every episode."""
        if self.cells:
            return list(self.cells)
        return [key and key[:2] for key, _ in self.episodes]

    def only(self, wanted: set[Cell]) -> ForeignArm:
        """The episodes of these suites and tasks."""
        kept = [i for i, place in enumerate(self.places) if place in wanted]
        cells = tuple(self.cells[i] for i in kept) if self.cells else ()
        return replace(self, episodes=tuple(self.episodes[i] for i in kept), cells=cells)

    @property
    def has_seeds(self) -> bool:
        return all(key is not None and key[3] is not None for key, _ in self.episodes)

    def keyed(self, with_seed: bool = False) -> dict[tuple[str | int | None, ...], Outcome] | None:
        """Outcomes by key, without its seed unless asked for; None if any episode has no key or shares one."""
        found: dict[tuple[str | int | None, ...], Outcome] = {}
        for key, outcome in self.episodes:
            if key is None:
                return None
            found[key if with_seed else key[:3]] = outcome
        return found if len(found) == len(self.episodes) else None

    @property
    def counts(self) -> tuple[int, int, int]:
        outcomes = [outcome for _, outcome in self.episodes]
        return outcomes.count("success"), len(outcomes) - outcomes.count("error"), outcomes.count("error")


def read_foreign(path: Path | str) -> ForeignArm:
    """Recognise and read a result file of another tool. Raises UserError naming the file for anything else, for one
    without episodes, and for one in which an episode stands twice."""
    path = Path(path)
    name = path.parent.name + "/" + path.stem if path.parent.name else path.stem
    try:
        found = _recognised(name, path, path.read_text(encoding="utf-8-sig"))
    except OSError as problem:
        raise UserError(f"{path}: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path}: cannot be read: {problem}") from None
    except (KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path}: looks like a known result file but lacks {problem}") from None
    if found is None:
        raise UserError(
            f"{path}: not a result file of LeRobot (eval_info.json), the openpi fork (<suite>_results.json, .jsonl or "
            ".csv), vla-eval or OpenVLA (its text log); totals alone are not enough; "
            "for a run of qlibero give its directory"
        )
    if not found.episodes:
        raise UserError(f"{path}: a result file of {found.tool} without a single episode: nothing to compare")
    twice = [key for key, count in Counter(key for key, _ in found.episodes if key is not None).items() if count > 1]
    if twice:
        suite, task, init, _ = twice[0]
        more = f", and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise UserError(
            f"{path}: {suite} task {task}, episode {init} stands there more than once{more}; which one counts?"
        )
    return found


def _recognised(name: str, path: Path, text: str) -> ForeignArm | None:
    if path.suffix == ".csv":
        header = text.partition("\n")[0]
        delimiter = max(",;\t", key=header.count)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        return _fork(name, _suite_in(path), None, ((f"line {reader.line_num}", row) for row in reader))
    if path.suffix == ".jsonl":
        lines = ((f"line {i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip())
        return _fork(name, _suite_in(path), None, ((where, _json(line, where)) for where, line in lines))
    if (suite := re.search(r"^Task suite: (\S+)", text, re.MULTILINE)) and not text.lstrip().startswith("{"):
        return _openvla(name, suite[1], text)
    data = json.loads(text)
    if not isinstance(data, dict):
        return None
    if "per_task" in data:
        return _lerobot(name, data["per_task"])
    if "per_episode" in data:
        outcomes = [
            (None, _outcome(e["success"], f"per_episode[{i}].success")) for i, e in enumerate(data["per_episode"])
        ]
        return ForeignArm(name, "LeRobot", tuple(outcomes), "LeRobot records no initial state")
    if "task_suite" in data:
        rows = ((f"results[{i}]", row) for i, row in enumerate(data["results"]))
        return _fork(name, data["task_suite"], data.get("seed"), rows)
    if "benchmark" in data and "tasks" in data:
        return _vla_eval(name, data)
    return None


def _openvla(name: str, suite: str, text: str) -> ForeignArm:
    """Episode N of a task starts from initial state N - 1."""
    episodes, task, init = [], "", None
    for key, value in re.findall(r"^(Task|Starting episode|Success):? *(.*?)(?:\.\.\.)? *$", text, re.MULTILINE):
        if key == "Task":
            task = value
        elif key == "Starting episode":
            init = int(value) - 1
        elif init is not None:
            episodes.append(((suite, task, init, None), _outcome(value, f"Success of episode {init + 1} of {task!r}")))
            init = None
    return ForeignArm(name, "OpenVLA", tuple(episodes))


def _lerobot(name: str, per_task: list[dict[str, Any]]) -> ForeignArm:
    found = [
        (
            (str(task["task_group"]), str(task["task_id"])),
            (None, _outcome(success, f"per_task[{t}].metrics.successes[{i}]")),
        )
        for t, task in enumerate(per_task)
        for i, success in enumerate(task["metrics"]["successes"])
    ]
    return ForeignArm(
        name,
        "LeRobot",
        tuple(outcome for _, outcome in found),
        "LeRobot's initial states depend on when earlier episodes ended (lerobot #4152)",
        cells=tuple(cell for cell, _ in found),
    )


def _fork(name: str, suite: str, seed: int | None, rows: Iterable[tuple[str, dict[str, Any]]]) -> ForeignArm:
    """`rows`: each with where it stands, for the message."""
    episodes = tuple(
        (
            (
                suite,
                str(_index(r["task_id"], f"{where}: task_id")),
                _index(r["episode_idx"], f"{where}: episode_idx"),
                seed,
            ),
            _outcome(r["success"], f"{where}: success"),
        )
        for where, r in rows
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
            where = f"success of episode {e['episode_id']} of task {task['task']!r}"
            if success is None and not e.get("failure_reason"):
                raise ValueError(
                    f"episode {e['episode_id']} of task {task['task']!r} says neither success nor failure_reason"
                )
            episodes.append((key, "error" if e.get("failure_reason") else _outcome(success, where)))
    return ForeignArm(name, "vla-eval", tuple(episodes))


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        raise ValueError(f"{where}: not JSON: {problem.msg}") from None


def _index(value: Any, where: str) -> int:
    try:
        return int(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{where} is {value!r}, expected a whole number") from None


def _outcome(value: Any, where: str) -> Outcome:
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    meant = words.get(value.strip().lower()) if isinstance(value, str) else value
    if meant not in (True, False):
        raise ValueError(f"{where} is {value!r}, expected True or False")
    return "success" if meant else "failure"


def _suite_in(path: Path) -> str:
    found = re.search(r"libero_(?:spatial|object|goal|10|90)", path.stem)
    if not found:
        raise ValueError(f"the suite must be in the file's name, e.g. libero_object_results{path.suffix}")
    return found[0]


def from_run(arm: Arm, run: str) -> ForeignArm:
    """An arm of qlibero as one among the others."""
    # other tools know official initial states only: a fresh one has no number that could be taken for one of theirs
    episodes = tuple(
        ((key.suite, str(key.task), key.init if key.inits == OFFICIAL else -1 - key.init, key.seed), record.outcome)
        for key, record in sorted(arm.records.items())
    )
    return ForeignArm(f"{run}/{arm.name}", "qlibero", episodes, arm=arm)
