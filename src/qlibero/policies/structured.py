"""JSON files of a checkpoint or an artifact: bounded in size and depth, and held against a schema before any use.

`read_json` gives plain data or a UserError; `fit` turns plain data into a pydantic model
(or a standard dataclass) or a UserError that names the file, the key, what was found and what belongs there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from qlibero.documents import JsonObject, read_bytes
from qlibero.errors import UserError

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 32
_LFS = b"version https://git-lfs.github.com/spec/"
_SHOWN = 60
"""Characters of a found value in a message."""
_NAMED = 5
"""Faults in a message before "and n more"."""

Model = TypeVar("Model")


class Strict(BaseModel):
    """For schemas of files: no type is taken for another (`true` is no 1, "8" no 8), no NaN, no unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Open(Strict):
    """The same for files of other programs, which have more keys than concern us."""

    model_config = ConfigDict(extra="allow")


def read_json(path: Path, most_bytes: int = MAX_BYTES) -> JsonObject:
    """The JSON object in a regular file of at most `most_bytes`. UserError when it is anything else, WorkFailed when it
    cannot be read."""
    try:
        raw = read_bytes(path, most_bytes)
    except FileNotFoundError:
        raise UserError(f"{path} is not there") from None
    if raw.startswith(_LFS):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned")
    return parse_json(raw, str(path))


def parse_json(raw: bytes | str, where: str) -> JsonObject:
    """The JSON object in `raw`; UserError, beginning with `where`, for anything else."""
    try:
        content = json.loads(raw, object_pairs_hook=_once_each)
    except (ValueError, RecursionError, OverflowError, MemoryError) as problem:
        why = "it nests too deep" if isinstance(problem, RecursionError) else short(str(problem))
        raise UserError(f"{where} cannot be read as JSON: {why}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where} holds no JSON object but {short(content)}")
    if _deeper_than(content, MAX_DEPTH):
        raise UserError(f"{where} cannot be read as JSON: it nests too deep, more than {MAX_DEPTH} levels")
    return content


def fit(model: type[Model], content: Any, where: str, at: str = "") -> Model:
    """`content` (or the part of a file that `at` names) as a `model`; a UserError names every fault by its key."""
    try:
        return TypeAdapter(model).validate_json(json.dumps(content))
    except ValidationError as problem:
        faults = [_fault(item, at) for item in problem.errors(include_url=False)]
    except (ValueError, RecursionError, OverflowError) as problem:
        faults = [short(str(problem))]
    more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    raise UserError(f"{where}: {'; '.join(faults[:_NAMED])}{more}") from None


def short(value: Any) -> str:
    """A found value for a message, never longer than a line."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        text = f"a {type(value).__name__}"
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _fault(item: ErrorDetails, at: str) -> str:
    key = ".".join(short(str(part)) for part in (*([at] if at else []), *item["loc"])) or "the file"
    if item["type"] == "missing":
        return f"{key} is missing"
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key} is not a known key"
    return f"{key} is {short(item['input'])}: {item['msg'].removeprefix('Value error, ')}"


def _once_each(pairs: list[tuple[str, Any]]) -> JsonObject:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {short(key)} stands there twice")
            seen.add(key)
    return content


def _deeper_than(content: Any, most: int) -> bool:
    level = [content]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
