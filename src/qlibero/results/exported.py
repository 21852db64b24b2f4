"""An exported table read back: the run directories it is of, so that everything that reads a run reads it too.

They are made in the cache, once for each content. What an export leaves out (trajectories, videos) they have not.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlibero import files
from qlibero.cache import cache_directory
from qlibero.documents import JsonObject, parse_json, read_bytes
from qlibero.errors import UserError
from qlibero.results.episode_table import ADDED, COLUMNS, SCHEMA, VERSION
from qlibero.results.records import SCHEMA as RECORD_SCHEMA
from qlibero.results.records import record_from_dict, sealed

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_DOCUMENT = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._+=-]*/)?[A-Za-z0-9][A-Za-z0-9._+=-]*\.(?:json|yaml)")


def is_export(path: Path | str) -> bool:
    """Whether a file is such a table, by what stands in it."""
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet") or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(64)
        if head.startswith(b"PAR1"):  # its metadata stand at the end
            file.seek(0)
            return f'"schema": "{SCHEMA}"'.encode() in file.read()
    return f'"schema": "{SCHEMA}"'.encode() in head


def unpacked(path: Path | str) -> list[Path]:
    """The directories of an export's runs. Raises UserError naming file and line for what this version cannot read."""
    path = Path(path)
    content = read_bytes(path)
    place = cache_directory(f"exports/{hashlib.sha256(content).hexdigest()[:16]}")
    whole = place / "whole"
    if not whole.is_file():
        header, rows = _read(path, content)
        _write(place, path, header, rows)
        files.replace(whole, "\n".join(header["runs"]) + "\n")
    return [place / name for name in whole.read_text().splitlines()]


def _read(path: Path, content: bytes) -> tuple[JsonObject, Iterator[tuple[str, JsonObject]]]:
    if content.startswith(b"PAR1"):
        header, rows = _parquet(path, content)
    else:
        lines = ((f"{path}:{n}", line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip())
        parsed = ((where, parse_json(line, where)) for where, line in lines)
        header, rows = next(parsed)[1], parsed
    known = isinstance(header, dict) and header.get("schema") == SCHEMA and isinstance(header.get("version"), int)
    if not known or not isinstance(header.get("runs"), dict):
        raise UserError(f"{path}: not a table of {SCHEMA}; `qlibero export` writes one")
    if header["version"] > VERSION:
        raise UserError(f"{path}: {SCHEMA} {header['version']}, this qlibero reads up to {VERSION}; update qlibero")
    return header, rows


def _parquet(path: Path, content: bytes) -> tuple[Any, Iterator[tuple[str, JsonObject]]]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UserError(f"{path}: Parquet needs pyarrow (pip install 'qlibero[parquet]')") from None
    table = parquet.read_table(io.BytesIO(content))
    header = parse_json((table.schema.metadata or {}).get(SCHEMA.encode(), b"null"), path)
    maps = [name for name in table.column_names if COLUMNS.get(name, ("",))[0].startswith("map")]
    rows = ({**row, **{name: dict(row[name] or ()) for name in maps}} for row in table.to_pylist())
    return header, ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def _write(place: Path, path: Path, header: JsonObject, rows: Iterator[tuple[str, JsonObject]]) -> None:
    ledgers: dict[tuple[str, str], list[str]] = {}
    for where, row in rows:
        if not isinstance(row, dict) or row.get("run") not in header["runs"]:
            raise UserError(f"{where}: a row of no run that the header names")
        fields = {name: value for name, value in row.items() if name not in ADDED and name in COLUMNS}
        record = record_from_dict({**fields, "schema": RECORD_SCHEMA, "trajectory": None}, where)
        if not _PART.fullmatch(record.arm):
            raise UserError(f"{where}: arm {record.arm!r} can name no directory")
        ledgers.setdefault((row["run"], record.arm), []).append(sealed(record.to_json()))
    for run, documents in header["runs"].items():
        if not _PART.fullmatch(run) or not isinstance(documents, dict):
            raise UserError(f"{path}: run {run!r} can name no directory")
        for name, document in documents.items():
            if not _DOCUMENT.fullmatch(name):
                raise UserError(f"{path}: {name!r} is no file of a run")
            files.replace(place / run / name, json.dumps(document, indent=1, ensure_ascii=False))
    for (run, arm), lines in ledgers.items():
        files.replace(place / run / arm / "episodes-export-1.jsonl", "".join(f"{line}\n" for line in lines))
