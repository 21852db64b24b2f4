"""LeRobot's `lerobot-eval` (read in the sources of 0.3 to 0.6.2): eval_info.json.

    {"per_task": [{"task_group", "task_id", "metrics": {"successes": [bool], …}}], "per_group", "overall"}
    before multi-task: {"per_episode": [{"episode_ix", "success", "seed"}], "aggregated"}

It says no initial state, and until 0.6.0 the order of these depended on which episodes had ended (SAME_STEP autoreset,
lerobot #4152). From 0.6.1 on episode k of a task starts from state k, but the file does not say its version: unpaired.
"""

from __future__ import annotations

from qlibero.results.importers.file import ResultFile, outcome
from qlibero.results.imports import ExternalArm

TOOL = "LeRobot"
REASON = (
    "LeRobot's initial states depend on when earlier episodes ended (lerobot #4152, until 0.6.0), and its file says "
    "neither state nor version"
)


def read(file: ResultFile) -> ExternalArm | None:
    data = file.data
    if not isinstance(data, dict):
        return None
    if "per_task" in data:
        found = [
            (
                (str(task["task_group"]), str(task["task_id"])),
                (None, outcome(success, f"per_task[{t}].metrics.successes[{i}]")),
            )
            for t, task in enumerate(data["per_task"])
            for i, success in enumerate(task["metrics"]["successes"])
        ]
        return ExternalArm(file.name, TOOL, tuple(o for _, o in found), REASON, cells=tuple(cell for cell, _ in found))
    if "per_episode" in data:
        episodes = [
            (None, outcome(e["success"], f"per_episode[{i}].success")) for i, e in enumerate(data["per_episode"])
        ]
        return ExternalArm(file.name, TOOL, tuple(episodes), "LeRobot records no initial state")
    return None
