"""A result file as the readers see it: its text, JSON and lines, each value named by its place when it is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qlibero.documents import JsonObject, read_bytes
from qlibero.results.records import Outcome

SUITE = re.compile(r"libero_(?:spatial|object|goal|10|90)(?:_(?:swap|object|lan|task))?(?![a-z0-9])")
_WORDS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


@dataclass(frozen=True)
class ResultFile:
    path: Path

    @property
    def name(self) -> str:
        """What its arm is called: folder and file, without the ending."""
        return f"{self.path.parent.name}/{self.path.stem}" if self.path.parent.name else self.path.stem

    @cached_property
    def head(self) -> bytes:
        """The first bytes, which tell a database from a text."""
        with self.path.open("rb") as file:
            return file.read(16)

    @cached_property
    def content(self) -> bytes:
        return read_bytes(self.path)

    @cached_property
    def text(self) -> str:
        return self.content.decode("utf-8-sig")

    @cached_property
    def data(self) -> Any:
        """The whole file as one JSON value; None where it is none."""
        if self.text.lstrip()[:1] not in ("{", "["):
            return None
        try:
            return json.loads(self.text)
        except json.JSONDecodeError as problem:
            if problem.msg == "Extra data":  # one value a line
                return None
            raise

    def rows(self) -> Iterator[tuple[str, JsonObject]]:
        """The JSON objects of its lines, each with where it stands. Zeros after a power loss are no line."""
        for number, line in enumerate(self.text.split("\n"), 1):
            if not line.strip(" \t\r\0"):
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as problem:
                raise ValueError(f"line {number}: not JSON: {problem.msg}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: {row!r:.40} is no JSON object")
            yield f"line {number}", row

    def suite_in_name(self) -> str:
        found = SUITE.search(self.path.stem)
        if not found:
            raise ValueError(f"the suite must be in the file's name, e.g. libero_object_results{self.path.suffix}")
        return found[0]


def number(value: Any, where: str) -> int:
    """A whole number, also as text; ValueError naming `where` otherwise."""
    try:
        if isinstance(value, float) and value != int(value):
            raise ValueError
        return int(value)
    except (ValueError, OverflowError, TypeError):
        raise ValueError(f"{where} is {value!r}, expected a whole number") from None


def outcome(value: Any, where: str) -> Outcome:
    """`success` or `failure` of a truth value in any of the usual spellings; ValueError naming `where` otherwise."""
    meant = _WORDS.get(value.strip().lower()) if isinstance(value, str) else value
    if meant not in (True, False):
        raise ValueError(f"{where} is {value!r}, expected True or False")
    return "success" if meant else "failure"
