"""Anybody's table: a row an episode, `--columns` says which column is what.

    --columns task=task_id,success=ok,init=trial,suite=bench,seed=rng,arm=method

`task` and `success` are needed; without `init` the rows are counts, without `suite` it is looked for in the file name.
`arm` splits one table into several results. A value that a column has not is written `suite=@libero_goal`.
.csv and .tsv (comma, semicolon or tab), .jsonl, and .parquet where pyarrow is installed.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.errors import UserError
from qlibero.results.importers.file import ResultFile, number, outcome
from qlibero.results.imports import ExternalArm, Key
from qlibero.results.records import Outcome

FIELDS = ("suite", "task", "init", "seed", "success", "arm")
_WORDS = {"yes": True, "success": True, "no": False, "failure": False, "fail": False}
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


def parse_columns(text: str) -> dict[str, str]:
    """`task=task_id,success=ok` as {field: column}. Raises UserError for anything else."""
    found: dict[str, str] = {}
    for part in text.split(","):
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column or field not in FIELDS:
            raise UserError(
                f"--columns {text}: {part.strip()!r} is not FIELD=COLUMN; the fields are {', '.join(FIELDS)}, "
                "e.g. --columns task=task_id,success=ok,init=trial"
            )
        if field in found:
            raise UserError(f"--columns {text}: {field} is there twice")
        found[field] = column
    if missing := [field for field in ("task", "success") if field not in found]:
        raise UserError(f"--columns {text}: say which column is the {' and which the '.join(missing)}")
    return found


def read_table(file: ResultFile, columns: Mapping[str, str]) -> list[ExternalArm]:
    """One arm, or one for each value of the column `arm`, in the order of their first rows."""
    arms: dict[str, list[tuple[Key | None, Outcome]]] = defaultdict(list)
    cells = defaultdict(list)
    keyed = "init" in columns
    for where, row in _rows(file):
        value = {field: _value(row, column, where) for field, column in columns.items()}
        suite = str(value["suite"]) if "suite" in value else file.suite_in_name()
        task, arm = _label(value["task"]), str(value.get("arm", ""))
        seed = number(value["seed"], f"{where}: {columns['seed']}") if "seed" in value else None
        key = (suite, task, number(value["init"], f"{where}: {columns['init']}"), seed) if keyed else None
        said = _WORDS.get(str(value["success"]).strip().lower(), value["success"])
        arms[arm].append((key, outcome(said, f"{where}: {columns['success']}")))
        cells[arm].append((suite, task))
    reason = "" if keyed else "the table has no column of initial states"
    return [
        ExternalArm(
            f"{file.name}/{arm}" if arm else file.name,
            "table",
            tuple(episodes),
            reason,
            cells=() if keyed else tuple(cells[arm]),
        )
        for arm, episodes in arms.items()
    ]


def _value(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column.startswith("@"):
        return column[1:]
    if column not in row:
        near = get_close_matches(column, list(row), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{where}: no column {column!r}; there are {', '.join(map(str, row))}{hint}")
    value = row[column]
    if value is None or value == "":
        raise ValueError(f"{where}: {column} is empty")
    return value


def _label(task: Any) -> str:
    """Task 3, "3" and 3.0 (a column with gaps) are one task."""
    text = str(task).strip()
    return str(int(float(text))) if text.replace(".0", "", 1).isdigit() else text


def _rows(file: ResultFile) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if file.path.suffix == ".jsonl":
        yield from file.rows()
    elif file.path.suffix == ".parquet":
        yield from ((f"row {i}", row) for i, row in enumerate(parquet_rows(file), 1))
    else:
        header = file.text.partition("\n")[0]
        reader = csv.DictReader(io.StringIO(file.text, newline=""), delimiter=max(",;\t", key=header.count))
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num}: {count_text(len(row[None]), 'more value')} than columns")
            yield f"line {reader.line_num}", row


def parquet_rows(file: ResultFile) -> list[JsonObject]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError:
        raise UserError(f"{file.path}: Parquet needs pyarrow (pip install 'qlibero[parquet]')") from None
    try:
        rows: list[JsonObject] = parquet.read_table(io.BytesIO(file.content)).to_pylist()
        return rows
    except ArrowInvalid as problem:
        raise ValueError(f"no Parquet file ({problem})") from None
