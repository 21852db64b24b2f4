"""Runs as one table of episodes, for people's own notebooks and for whoever wants to judge the claim again.

.jsonl and .parquet hold everything a verdict rests on: every record whole but for its trajectory, and, in the first
line or the file's metadata, each run's experiment, environment, stopping rule and what its arms were. `compare` and
`report` read such a file like the run directory it is of. .csv is the flat columns alone.

Absolute paths of this machine, trackers and launchers stay out.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from dataclasses import replace as with_fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlibero.documents import JsonObject, read_json
from qlibero.errors import UserError
from qlibero.files import replace
from qlibero.results.episode_table import COLUMNS, FLAT, SCHEMA, VERSION, arrow_schema
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import RunResults, suites_of
from qlibero.results.selection import select
from qlibero.results.summary import percentiles, phase_calls, policy_calls

SUFFIXES = (".csv", ".jsonl", ".parquet")
_PRIVATE = ("tracking", "launch")
_PATH = re.compile(r"(?<![\w.:/])(?:~|/)(?:[^\s:;,'\"/]*/)+([^\s:;,'\"/]*)")
_MOST_BYTES = 16 << 20


def export_episodes(
    paths: Sequence[Path | str],
    out: Path | str,
    arms: Sequence[str] | None = None,
    tasks: Sequence[int] | None = None,
    card: Path | str | None = None,
) -> JsonObject:
    """Write the episodes of one or several runs, or of arms given as DIR/ARM, to `out` (.csv, .jsonl, .parquet), and a
    dataset card beside it where `card` names one. Returns {"file", "rows", "columns", "schema", "card"}.

    `arms`, `tasks`: only these. Raises UserError for another suffix, a missing pyarrow or an arm that no run has,
    WorkFailed if a file cannot be written.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise UserError(f"export: {out.name} ends in neither {' nor '.join(SUFFIXES)}")
    if card and out.suffix == ".csv":
        raise UserError(f"export: --card describes a .jsonl or .parquet, and {out.name} is neither")
    # a row names its run, so arms keep the names that they have there
    runs = [with_fields(run, arms={arm.arm: arm for arm in run.arms.values()}) for run in select(paths)]
    known = dict.fromkeys(arm for run in runs for arm in run.arms)
    for arm in arms or ():
        if arm not in known:
            raise UserError(f"export: --arm {arm}: the runs have {', '.join(known)}")
    for run in runs if out.suffix != ".csv" else []:
        for name, ledger in run.arms.items():
            if ledger.conflicts:
                raise UserError(
                    f"export: arm {name} of {run.run_dir} has {ledger.conflicts[0]} twice with different results, "
                    "which no table of one row an episode can say; find out which is right, or write a .csv"
                )
    names = [run.name for run in runs]
    if len(set(names)) < len(names) and out.suffix != ".csv":
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"export: two runs are called {twice}, and a row names its run; export them one by one")
    rows = [
        row
        for run in runs
        for row in episode_rows(run)
        if (not arms or row["arm"] in arms) and (not tasks or row["task"] in tasks)
    ]
    header = {
        "schema": SCHEMA,
        "version": VERSION,
        "qlibero": version("qlibero"),
        "runs": {run.name: _files(run, arms, tasks) for run in runs},
    }
    columns = list(dict.fromkeys(column for row in rows for column in row)) if out.suffix == ".csv" else list(COLUMNS)
    write = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[out.suffix]
    replace(out, write(rows, columns, header), "Choose another -o")
    if card:
        from qlibero.results.dataset_card import dataset_card

        replace(Path(card), dataset_card(out.name, rows, header, runs), "Choose another --card")
    return {
        "file": str(out),
        "rows": len(rows),
        "columns": columns,
        "schema": f"{SCHEMA} {VERSION}",
        "card": str(card) if card else None,
    }


def episode_rows(run: RunResults) -> list[JsonObject]:
    """Rows with the same columns for every episode; `success` is 1, 0, or None for an error."""
    phases = list(dict.fromkeys(p for arm in run.arms.values() for r in arm.records for p in r.phases_ms))
    return [_row(run, name, record, phases) for name, arm in run.arms.items() for record in arm.records]


def _row(run: RunResults, arm: str, record: EpisodeRecord, phases: Sequence[str]) -> JsonObject:
    calls, by_phase = percentiles(policy_calls([record])), phase_calls([record])
    told = (run.environment.get("instructions") or {}).get(record.suite) or {}
    row = {name: value for name, value in asdict(record).items() if name in COLUMNS}
    row |= {
        "run": run.name,
        "arm": arm,
        "instruction": told.get(str(record.task)),
        "success": None if record.outcome == "error" else int(record.succeeded),
        "policy_ms_p50": calls and calls.p50,
        "policy_ms_p95": calls and calls.p95,
        "policy_ms_p99": calls and calls.p99,
    }
    medians = {}
    for phase in phases:
        found = percentiles(by_phase[phase]) if phase in by_phase else None
        medians[f"{phase}_ms_p50"] = found.p50 if found else None
    return {name: row[name] for name in COLUMNS} | medians


def _files(run: RunResults, arms: Sequence[str] | None, tasks: Sequence[int] | None) -> JsonObject:
    """{file of the run directory: its content}, all but the records. What is exported in part was planned in part."""
    experiment = {key: value for key, value in run.experiment.items() if key not in _PRIVATE}
    if tasks:
        experiment |= _planned_of(run, tasks)
    found: JsonObject = {"experiment.yaml": experiment}
    kept = [arm for arm in run.arms if not arms or arm in arms]
    for path in [*_documents(run.run_dir), *(path for arm in kept for path in _documents(run.run_dir / arm))]:
        if path.stat().st_size <= _MOST_BYTES:
            found[str(path.relative_to(run.run_dir))] = read_json(path)
    return {name: _public(document) for name, document in found.items()}


def _planned_of(run: RunResults, tasks: Sequence[int]) -> JsonObject:
    """`tasks` of an experiment of which only these are exported, and `suite`: of several, those that have one."""
    if run.planned is None:
        return {"tasks": sorted(set(tasks))}
    planned, said = {(key.suite, key.task) for key in run.planned}, run.experiment["suite"]
    suites = dict(zip(suites_of(run.experiment), said if isinstance(said, list) else [said], strict=True))
    kept = {suite: [task for task in sorted(set(tasks)) if (suite, task) in planned] for suite in suites}
    if len(kept) == 1:
        return {"tasks": next(iter(kept.values()))}
    kept = {suite: of for suite, of in kept.items() if of}
    return {"suite": [suites[suite] for suite in kept], "tasks": kept}


def _documents(directory: Path) -> Iterator[Path]:
    yield from sorted(path for path in directory.glob("*.json") if path.is_file())


def _public(value: Any) -> Any:
    """Without where things lie on this machine: a path keeps its last part."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_public(item) for item in value]
    return _PATH.sub(r"…/\1", value) if isinstance(value, str) else value


def _csv(rows: list[JsonObject], columns: list[str], header: JsonObject) -> bytes:
    text = io.StringIO(newline="")
    flat = [column for column in columns if column in FLAT or column not in COLUMNS]
    writer = csv.DictWriter(text, flat, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _jsonl(rows: list[JsonObject], columns: list[str], header: JsonObject) -> bytes:
    whole = [header, *({column: row[column] for column in columns} for row in rows)]
    return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in whole).encode()


def _parquet(rows: list[JsonObject], columns: list[str], header: JsonObject) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError("export: Parquet needs pyarrow (pip install 'qlibero[parquet]'); or write a .jsonl") from None
    schema = arrow_schema(json.dumps(header, ensure_ascii=False))
    maps = {column for column in columns if COLUMNS[column][0].startswith("map")}
    as_arrow = [{c: list(row[c].items()) if c in maps else row[c] for c in columns} for row in rows]
    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(as_arrow, schema=schema), data)
    return data.getvalue()
