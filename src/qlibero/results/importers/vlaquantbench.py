"""VLAQuantBench: one JSONL a cell (benchmark, suite, model, method, preset, scope), read in its sources of 2026-09.

    {"kind": "header", "model", "checkpoint", "benchmark", "suite", "preset", "scope", "method", "seed", …}
    {"kind": "episode", "suite", "task_id", "task_name", "episode", "seed", "success", "steps",
     "extra": {"max_steps", "camera_size", "action_mode", "init_state_id"}}

`seed` is that of the episode: another number in every task and state. Only LIBERO's cells have `init_state_id`; in
CALVIN, SIMPLER and VLABench the number of the episode stands for it.
"""

from __future__ import annotations

from qlibero.documents import JsonObject
from qlibero.results.importers.file import ResultFile, number, outcome
from qlibero.results.imports import ExternalArm, task_text


def read(file: ResultFile) -> ExternalArm | None:
    if file.path.suffix != ".jsonl":
        return None
    rows = list(file.rows())
    if not rows or rows[0][1].get("kind") not in ("header", "episode") or "schema" in rows[0][1]:
        return None
    header = next((row for _, row in rows if row["kind"] == "header"), {})
    episodes, names, sizes = [], {}, set()
    caps: JsonObject = {}
    for where, row in rows:
        if row["kind"] != "episode":
            continue
        extra = row.get("extra") or {}
        suite = str(row.get("suite") or header.get("suite") or header.get("benchmark") or "")
        task = str(number(row["task_id"], f"{where}: task_id"))
        init = number(extra.get("init_state_id", row["episode"]), f"{where}: init_state_id")
        key = (suite, task, init, number(row["seed"], f"{where}: seed"))
        episodes.append((key, outcome(row["success"], f"{where}: success")))
        names[suite, task] = task_text(str(row.get("task_name") or ""))
        sizes.add(extra.get("camera_size"))
        caps[suite] = extra.get("max_steps", caps.get(suite))
    constants = {"max_steps": caps, "resolution": sizes.pop() if len(sizes) == 1 else None}
    return ExternalArm(_name(file, header), "VLAQuantBench", tuple(episodes), names=names, constants=constants)


def _name(file: ResultFile, header: JsonObject) -> str:
    """The cell as its header names it, so that cells of one name in two folders stay apart; else the file's name."""
    parts = [str(header.get(key) or "") for key in ("suite", "model", "method", "preset", "scope")]
    return f"{parts[0]}/{parts[1]}/{file.path.stem}" if all(parts) else file.name
