"""Results of other tools, read as far as they go: LeRobot, the openpi fork this grew from, vla-eval.

None of them records what the scene was, and LeRobot not even which initial state an episode started from. So
an import is an `ForeignArm`: outcomes under the best key the file has. `compare_foreign` pairs by that key
where both sides have one and says that scene equality is taken on trust, and otherwise compares two
independent proportions and says that.

Formats (read in the sources, 2026-11):
  LeRobot   eval_info.json {"per_task": [{"task_group", "task_id", "metrics": {"successes": [bool]}}], "overall"};
            before multi-task: {"per_episode": [{"episode_ix", "success", "seed"}], "aggregated"}
  openpi fork  <suite>_results.json {"task_suite", "seed", "results": [{"task_id", "episode_idx", "success", "steps"}]}, and a
            .csv of the same rows, which names the suite in its file name only
  vla-eval  {"benchmark", "harness_version", "tasks": [{"task", "episodes": [{"episode_id", "success" or
            "metrics": {"success"}, "failure_reason"}]}]}
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlibero.errors import UserError
from qlibero.results import statistics as st
from qlibero.results.pairing import Arm, collect_arms
from qlibero.results.phrases import margin_text, points
from qlibero.results.records import Outcome
from qlibero.results.runs import read_run

Key = tuple[str, str, int]  # suite, task (index or its text), initial state


@dataclass(frozen=True)
class ForeignArm:
    """`episodes`: (key or None, outcome). Without keys the arm can only be compared unpaired; `reason` says
    why.
    """

    name: str
    tool: str
    episodes: tuple[tuple[Key | None, Outcome], ...]
    reason: str = ""

    def keyed(self) -> dict[Key, Outcome] | None:
        """Outcomes by key, or None if any episode has no key or shares one."""
        found = dict(self.episodes)
        return None if None in found or len(found) != len(self.episodes) else found

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
                return _fork(name, _suite_in(path), list(csv.DictReader(file)))
        data = json.loads(path.read_text())
        if isinstance(data, dict) and "per_task" in data:
            return _lerobot(name, data["per_task"])
        if isinstance(data, dict) and "per_episode" in data:
            outcomes = [(None, _outcome(e["success"])) for e in data["per_episode"]]
            return ForeignArm(name, "LeRobot", tuple(outcomes), "LeRobot records no initial state")
        if isinstance(data, dict) and "task_suite" in data:
            return _fork(name, data["task_suite"], data["results"])
        if isinstance(data, dict) and "benchmark" in data and "tasks" in data:
            return _vla_eval(name, data)
    except OSError as problem:
        raise UserError(f"{path}: {problem.strerror}") from None
    except ValueError as problem:
        raise UserError(f"{path}: cannot be read: {problem}") from None
    except (KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path}: looks like a known result file but lacks {problem}") from None
    raise UserError(
        f"{path}: not a result file of LeRobot (eval_info.json), the openpi fork (<suite>_results.json or .csv) or vla-eval; "
        "for a run of qlibero give its directory"
    )


def _lerobot(name: str, per_task: list[dict[str, Any]]) -> ForeignArm:
    outcomes = [(None, _outcome(s)) for task in per_task for s in task["metrics"]["successes"]]
    return ForeignArm(
        name,
        "LeRobot",
        tuple(outcomes),
        "LeRobot's initial states depend on when earlier episodes ended (lerobot #4152)",
    )


def _fork(name: str, suite: str, rows: list[dict[str, Any]]) -> ForeignArm:
    episodes = tuple(
        ((suite, str(int(r["task_id"])), int(r["episode_idx"])), _outcome(r["success"])) for r in rows
    )
    return ForeignArm(name, "openpi fork", episodes)


def _vla_eval(name: str, data: dict[str, Any]) -> ForeignArm:
    suite = next(iter(re.findall(r"libero_\w+", data["benchmark"])), data["benchmark"])
    episodes = []
    for task in data["tasks"]:
        for e in task["episodes"]:
            index = re.search(r"(\d+)$", str(e["episode_id"]))
            key = (suite, str(task["task"]), int(index[1])) if index else None
            success = e["success"] if "success" in e else e.get("metrics", {}).get("success", False)
            episodes.append((key, "error" if e.get("failure_reason") else _outcome(success)))
    return ForeignArm(name, "vla-eval", tuple(episodes))


def _outcome(value: Any) -> Outcome:
    if isinstance(value, str):
        if value.lower() not in ("true", "false", "0", "1"):
            raise ValueError(f"success is {value!r}, expected True or False")
        value = value.lower() in ("true", "1")
    return "success" if value else "failure"


def _suite_in(path: Path) -> str:
    found = re.search(r"libero_(?:spatial|object|goal|10|90)", path.stem)
    if not found:
        raise ValueError("the suite must be in the file's name, e.g. libero_object_results.csv")
    return found[0]


def _from_run(arm: Arm, run: str) -> ForeignArm:
    episodes = tuple(
        ((key.suite, str(key.task), key.init), record.outcome) for key, record in sorted(arm.records.items())
    )
    return ForeignArm(f"{run}/{arm.name}", "qlibero", episodes)


# ------------------------------------------------------------------------------------------------- comparison
def compare_foreign(
    paths: Sequence[Path | str], reference: str | None = None, margin: float = 0.02
) -> dict[str, Any]:
    """Compare result files, and run directories beside them. The reference is the first file unless named.

    {"reference", "margin", "foreign": True, "arms": {name: {"paired", "tool", "delta", "interval95",
    "method", "p", "verdict", "caveat", "sentence", …}}}; paired arms also hold pairs, broken, repaired,
    tango95 and mcnemar_p.
    """
    arms = list(_read_all(paths))
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise UserError(
            f"two inputs are called {next(n for n in names if names.count(n) > 1)}; put them into different folders"
        )
    chosen = (
        reference
        if reference in names
        else next((n for n in names if reference and n.endswith(f"/{reference}")), names[0])
    )
    base = next(arm for arm in arms if arm.name == chosen)
    others = [arm for arm in arms if arm is not base]
    if not others:
        raise UserError("only one result here: nothing to compare. Name a second file or run directory")
    results = {arm.name: _against(base, arm, margin) for arm in others}
    return {"reference": base.name, "margin": margin, "foreign": True, "arms": results}


def _read_all(paths: Iterable[Path | str]) -> Iterable[ForeignArm]:
    for path in map(Path, paths):
        if path.is_dir():
            run = read_run(path)
            yield from (_from_run(arm, run.name) for arm in collect_arms([run]).values())
        else:
            yield read_foreign(path)


def _against(base: ForeignArm, arm: ForeignArm, margin: float) -> dict[str, Any]:
    left, right = base.keyed(), arm.keyed()
    common = sorted(left.keys() & right.keys()) if left and right else []
    if common:
        result = _paired(left, right, common, margin)
        result["caveat"] = (
            "paired by task and initial state; that the scenes were equal is taken on trust, no file has fingerprints"
        )
        missing = len(left.keys() ^ right.keys())
        if missing:
            result["caveat"] += f"; {missing} episodes are in one file only and were left out"
        result["unpaired"] = ["/".join(map(str, key)) for key in sorted(left.keys() ^ right.keys())]
    else:
        result = _independent(base.counts, arm.counts, margin)
        why = arm.reason or base.reason or "the two share no episode key"
        result["caveat"] = f"unpaired: {why}, so the interval is that of two independent samples and wider"
    (k0, n0, e0), (k1, n1, e1) = base.counts, arm.counts
    result |= {
        "tool": arm.tool,
        "counts": [k1, n1],
        "reference_counts": [k0, n0],
        "errors": {"arm": e1, "reference": e0},
    }
    if result["interval95"] is None:
        return {**result, "sentence": f"{arm.name} and {base.name}: no finished episodes to compare."}
    low, high = result["interval95"]
    size = f"{result['pairs']} pairs" if common else f"{k1}/{n1} against {k0}/{n0}"
    words = {
        "non-inferior": "is non-inferior to",
        "inferior": "is inferior to",
        "inconclusive": "is inconclusive against",
    }
    result["sentence"] = (
        f"{arm.name} {words[result['verdict']]} {base.name} at {margin_text(margin)}: Δ {points(result['delta'])} pp "
        f"[{points(low)}, {points(high)}], {size} ({result['caveat']})."
    )
    return result


def _paired(
    left: dict[Key, Outcome], right: dict[Key, Outcome], keys: list[Key], margin: float
) -> dict[str, Any]:
    finished = [(left[k], right[k]) for k in keys if "error" not in (left[k], right[k])]
    n = len(finished)
    broken, repaired = finished.count(("success", "failure")), finished.count(("failure", "success"))
    interval = list(st.tango(broken, repaired, n)) if n else None
    return {
        "paired": True,
        "pairs": n,
        "broken": broken,
        "repaired": repaired,
        "delta": (repaired - broken) / n if n else None,
        "interval95": interval,
        "tango95": interval,
        "method": "Tango, paired",
        "p": st.mcnemar_exact(broken, repaired),
        "mcnemar_p": st.mcnemar_exact(broken, repaired),
        "verdict": st.verdict(broken, repaired, n, margin),
    }


def _independent(base: tuple[int, int, int], arm: tuple[int, int, int], margin: float) -> dict[str, Any]:
    from scipy.stats import fisher_exact  # seconds to import, and only needed here

    (k0, n0, _), (k1, n1, _) = base, arm
    if not n0 or not n1:
        return {
            "paired": False,
            "delta": None,
            "interval95": None,
            "method": "",
            "p": None,
            "verdict": "no pairs",
        }
    low, high = st.newcombe_independent(k1, n1, k0, n0)
    decided = "non-inferior" if low > -margin else "inferior" if high < -margin else "inconclusive"
    p = float(fisher_exact([[k1, n1 - k1], [k0, n0 - k0]]).pvalue)
    return {
        "paired": False,
        "delta": k1 / n1 - k0 / n0,
        "interval95": [low, high],
        "method": "Newcombe, independent samples",
        "p": p,
        "verdict": decided,
    }
