"""vla-eval (vla-evaluation-harness; read in its sources, 2026-08): an aggregate JSON, or since 0.7 the SQLite recording
it is made from (recording-<id>.sqlite, tables `eval_metadata` and `episode_results`).

    {"benchmark", "harness_version", "seed", "config", "tasks": [{"task", "episodes": [{"episode_id", "metrics":
     {"success"}, "failure_reason", and since 0.5 the task's own fields: "suite", "task_id", "episode_idx"}]}]}
    before 0.4: "success" beside "episode_id" ("<task>_ep3")

An episode with a `failure_reason` (time-out, lost connection) counts as a failure there and as an error here.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable
from typing import Any

from qlibero.documents import JsonObject
from qlibero.results.importers.file import SUITE, ResultFile, number, outcome
from qlibero.results.imports import ExternalArm, Key, task_text
from qlibero.results.records import Outcome

TOOL = "vla-eval"
MAGIC = b"SQLite format 3\0"
_EPISODES = (
    "SELECT task_name, episode_id, status, metrics, context, failure_reason FROM episode_results WHERE eval_id = ? "
    "ORDER BY task_name, episode_id"
)


def read(file: ResultFile) -> ExternalArm | None:
    if file.head == MAGIC:
        return _from_sqlite(file)
    data = file.data if file.path.suffix == ".json" else None
    if not isinstance(data, dict) or not {"benchmark", "tasks"} <= data.keys():
        return None
    seed = data.get("seed", _parameters(data).get("seed"))
    rows = ((task["task"], episode) for task in data["tasks"] for episode in task["episodes"])
    return _arm(file, [(data["benchmark"], _parameters(data), seed, rows)])


Benchmark = tuple[str, JsonObject, Any, Iterable[tuple[str, JsonObject]]]
"""Its name, its parameters, its seed, and each episode with its task."""


def _arm(file: ResultFile, benchmarks: Iterable[Benchmark]) -> ExternalArm:
    episodes: list[tuple[Key | None, Outcome]] = []
    names, caps = {}, {}
    for benchmark, parameters, seed, rows in benchmarks:
        found = SUITE.search(str(benchmark))
        usual = str(parameters.get("suite") or (found[0] if found else benchmark))
        for name, e in rows:
            suite = str(e.get("suite") or usual)
            task = str(e["task_id"]) if e.get("task_id") is not None else str(name)
            index = re.search(r"(\d+)$", str(e["episode_id"]))
            key = (suite, task, int(index[1]), seed) if index else None
            episodes.append((key, _ended(e, name)))
            names[suite, task] = task_text(str(name))
            caps[suite] = parameters.get("max_steps")
    constants = {"seed": seed, "max_steps": {s: cap for s, cap in caps.items() if cap}}
    return ExternalArm(file.name, TOOL, tuple(episodes), names=names, constants=constants)


def _ended(episode: JsonObject, task: str) -> Outcome:
    success = episode["success"] if "success" in episode else (episode.get("metrics") or {}).get("success")
    if episode.get("failure_reason"):
        return "error"
    if success is None:
        raise ValueError(f"episode {episode['episode_id']} of task {task!r} says neither success nor failure_reason")
    return outcome(success, f"success of episode {episode['episode_id']} of task {task!r}")


def _parameters(said: JsonObject) -> JsonObject:
    """The benchmark's parameters in its configuration."""
    return (said.get("config") or {}).get("params") or {}


def _from_sqlite(file: ResultFile) -> ExternalArm | None:
    try:
        connection = _open(file)
        try:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not {"eval_metadata", "episode_results"} <= tables:
                return None
            return _arm(
                file,
                [
                    _benchmark(connection, *row)
                    for row in connection.execute(
                        "SELECT eval_id, safe_name, metadata FROM eval_metadata ORDER BY eval_id"
                    ).fetchall()
                ],
            )
        finally:
            connection.close()
    except sqlite3.Error as problem:
        raise ValueError(
            f"a SQLite file that cannot be read ({problem}); copy its -wal and -shm along with it"
        ) from None


def _open(file: ResultFile) -> sqlite3.Connection:
    """Read only. A recording is in WAL mode, and opening that writes beside it: where the directory refuses and nothing
    waits in a -wal file, the file alone is the whole."""
    uri = file.path.resolve().as_uri()
    connection = sqlite3.connect(f"{uri}?mode=ro", uri=True)
    try:
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()
        return connection
    except sqlite3.OperationalError:
        connection.close()
        if file.path.with_name(file.path.name + "-wal").exists():
            raise
        return sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True)


def _benchmark(connection: sqlite3.Connection, eval_id: str, safe_name: str, metadata: str) -> Benchmark:
    said = json.loads(metadata)
    rows = []
    for task, episode, status, metrics, context, reason in connection.execute(_EPISODES, (eval_id,)):
        row = {**json.loads(context or "{}"), "episode_id": number(episode, f"episode_id of task {task!r}")}
        row |= {
            "metrics": json.loads(metrics or "{}"),
            "failure_reason": reason or ("error" if status == "error" else None),
        }
        rows.append((str(task), row))
    return str(said.get("benchmark") or safe_name), _parameters(said), _parameters(said).get("seed"), rows
