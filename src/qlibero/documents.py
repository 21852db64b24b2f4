"""Bytes and JSON from files that somebody else may have written: bounded, and wrong in one sentence, never a traceback.

A pipe or a device in a file's place would block or never end; nesting, endless numbers and NaN end Python's own parser
in errors that name neither file nor cause.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qlibero.errors import UserError, WorkFailed, cause

if TYPE_CHECKING:  # what it takes to import is not for `--help`, which only names a JsonObject
    from pydantic import BaseModel, ValidationError

MAX_BYTES = 2 << 30
_SHOWN = 80
_Model = TypeVar("_Model", bound="BaseModel")

JsonObject = dict[str, Any]
"""A mapping as JSON or YAML has it: what was parsed and not yet given types (`checked`), or is about to be written."""


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """A regular file's content. Raises FileNotFoundError, UserError for anything but a file of at most `most` bytes,
    WorkFailed when it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise WorkFailed(f"cannot read {path}: {cause(problem)}") from problem
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode):  # asked before the descriptor becomes a file, which no directory can
        os.close(descriptor)
        raise UserError(f"{path}: not a file; something else lies in its place, remove it")
    with os.fdopen(descriptor, "rb") as file:
        if about.st_size > most:
            raise UserError(f"{path}: {about.st_size} bytes, more than the {most} that such a file can have")
        try:
            return file.read()
        except OSError as problem:
            raise WorkFailed(f"cannot read {path}: {cause(problem)}") from problem


def parse_json(data: bytes | str, where: str | Path) -> Any:
    """The value in JSON text. Raises UserError beginning with `where` (file or file:line) for text that is none,
    is nested too deeply, or holds NaN."""
    from pydantic_core import from_json

    try:
        return from_json(data, allow_inf_nan=False, cache_strings="keys")
    except (ValueError, RecursionError, MemoryError, OverflowError) as problem:
        raise UserError(f"{where}: not JSON that can be read ({problem})") from None


def read_json(path: Path, most: int = 64 << 20) -> Any:
    """`parse_json` of a file. Raises what `read_bytes` and `parse_json` raise."""
    return parse_json(read_bytes(path, most), path)


def checked(model: type[_Model], data: Any, where: str | Path) -> _Model:
    """`data` as a `model`; UserError naming `where`, the key, what was expected and what was found."""
    from pydantic import ValidationError

    try:
        return model.model_validate(data)
    except ValidationError as problem:
        raise UserError(f"{where}: {complaint(problem)}") from None


def flattened(tree: JsonObject, prefix: str = "") -> JsonObject:
    """Nested mappings as one, by their dotted keys."""
    flat: JsonObject = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def complaint(problem: ValidationError) -> str:
    """The first error of a validation: key, what is wrong, what was found (shortened)."""
    first = problem.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))[:200]
    message = first["msg"].removeprefix("Value error, ")
    found = "" if first["type"] in ("missing", "value_error") else f", found {_short(first['input'])}"
    return f"{key}: {message}{found}" if key else f"{message}{found}"


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 1 << 80:
        return "a number of more than 24 digits"
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
