"""The openpi fork this grew from: <suite>_results.json, and the same rows as .csv and .jsonl.

    {"task_suite", "seed", "results": [{"task_id", "episode_idx", "success", "steps", "max_steps"}]}

The tables name the suite in their file name only, and no seed.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from qlibero.documents import JsonObject
from qlibero.results.importers.file import ResultFile, number, outcome
from qlibero.results.imports import ExternalArm, task_text

TOOL = "openpi fork"
NEEDED = {"task_id", "episode_idx", "success"}


def read(file: ResultFile) -> ExternalArm | None:
    if file.path.suffix == ".csv":
        header = file.text.partition("\n")[0]
        delimiter = max(",;\t", key=header.count)
        reader = csv.DictReader(io.StringIO(file.text, newline=""), delimiter=delimiter)
        if not NEEDED & set(reader.fieldnames or ()):
            return None
        rows = ((f"line {reader.line_num}", row) for row in reader)
        return _arm(file, file.suite_in_name(), None, rows)
    if file.path.suffix == ".jsonl":
        first = next(file.rows(), ("", {}))[1]
        return _arm(file, file.suite_in_name(), None, file.rows()) if NEEDED & first.keys() else None
    data = file.data
    if isinstance(data, dict) and "task_suite" in data:
        rows = ((f"results[{i}]", row) for i, row in enumerate(data["results"]))
        return _arm(file, data["task_suite"], data.get("seed"), rows)
    return None


def _arm(file: ResultFile, suite: str, seed: int | None, rows: Iterable[tuple[str, JsonObject]]) -> ExternalArm:
    episodes, names = [], {}
    caps: set[Any] = set()
    for where, row in rows:
        task = str(number(row["task_id"], f"{where}: task_id"))
        key = (suite, task, number(row["episode_idx"], f"{where}: episode_idx"), seed)
        episodes.append((key, outcome(row["success"], f"{where}: success")))
        names[suite, task] = task_text(row.get("task_name") or "")
        caps.add(row.get("max_steps"))
    cap = int(caps.pop()) if len(caps) == 1 and caps != {None} else None
    return ExternalArm(
        file.name,
        TOOL,
        tuple(episodes),
        names=names,
        constants={"seed": seed, "max_steps": {suite: cap} if cap else None},
    )
