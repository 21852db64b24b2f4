"""What a thing is, is what is inside it: the content of everything that decides an action, part by part.

An identity names no path, so that shards on other machines agree and a moved checkpoint stays what it is; and it
changes when a file is retrained in its place. Hashing is remembered by path, size, times and inode of the files, so
that the second look at gigabytes costs a `stat`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlibero.cache import cache_directory, keep
from qlibero.errors import UserError, WorkFailed, cause

_SETTLED_NS = 2_000_000_000
"""A file changed this recently may change again within the clock's grain, unseen: it is not remembered."""


@dataclass(frozen=True)
class Identity:
    """`parts` maps a part's name, in words, to its sha256 (hex) or to a short text that says it all."""

    parts: Mapping[str, str]

    @property
    def digest(self) -> str:
        """16 hex digits over all parts."""
        return hashlib.sha256(json.dumps(dict(self.parts), sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, now: Identity) -> list[str]:
        """In words, what `now` has otherwise."""
        return [
            f"{name} {_short(self.parts.get(name))}, now {_short(now.parts.get(name))}"
            for name in sorted(self.parts.keys() | now.parts.keys())
            if self.parts.get(name) != now.parts.get(name)
        ]


def text_sha256(text: str) -> str:
    """Hex digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content, remembered. Raises UserError where there is no such file."""
    return remembered("file", [path], lambda: sha256(path))


def remembered(question: str, files: Iterable[Path], answer: Callable[[], str]) -> str:
    """`answer()`, or what it was when the files last had these sizes, times and inodes.

    The memory lies in the user's cache directory. It is lost where that cannot be written, which costs time only.
    """
    digest, latest = hashlib.sha256(question.encode()), 0
    real = functools.cache(os.path.realpath)  # of thousands of files in a few directories
    for file in files:
        try:
            about = os.stat(file)
        except OSError as problem:
            raise UserError(f"{file}: {cause(problem)}") from None
        times = (about.st_mtime_ns, about.st_ctime_ns)
        digest.update(f"\0{real(file.parent)}/{file.name}|{about.st_size}|{times}|{about.st_ino}".encode())
        latest = max(latest, *times)
    name = digest.hexdigest()
    place = cache_directory("content") / name[:2] / name[2:34]
    try:
        kept, _, check = place.read_text().rpartition("\n")
        if check == text_sha256(kept):
            return kept
    except (OSError, ValueError):
        pass
    found = answer()
    if latest < time.time_ns() - _SETTLED_NS:
        keep(place, f"{found}\n{text_sha256(found)}")
    return found


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read now. Raises WorkFailed."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise WorkFailed(f"cannot read {path}: {cause(problem)}") from problem


def _short(value: str | None) -> str:
    if value is None:
        return "was not there"
    return f"{value[:12]}…" if len(value) == 64 else repr(value)
