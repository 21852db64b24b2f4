"""YAML files and what they extend → one `Source`; and the laying of one over another.

Nothing here raises for what a file may be or hold (a pipe, a directory, another encoding, a circle of `extends:`):
`Source.problems` says it with its place.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qlibero.config.yaml_text import MAX_DEPTH, Mark, Problem, Source, convert_text, locations, short, shown
from qlibero.documents import JsonObject
from qlibero.errors import cause

LARGEST = 500_000  # bytes of one file: far beyond any experiment, and a second's work
KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFDIR: "a directory"}
ENCODINGS = ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))


def read(path: Path) -> Source:
    """The file with everything it extends, deepest first. Never raises for what a file may hold: see `problems`."""
    named_at = Mark(short(display(path)))
    try:
        return _read(Path(os.path.abspath(path)), (), named_at, {})
    except ValueError as error:
        return Source({}, {}, [Problem(named_at, str(error))])


def located(directory: Path, text: str) -> Path:
    """The absolute path that `text` means when it is written in a file of `directory`.

    Raises ValueError for what can be no path: an unknown `~user`, a NUL, half a character.
    """
    try:
        os.fsencode(text)
        path = Path(text).expanduser()
    except UnicodeEncodeError:
        raise ValueError(f"{shown(text)} holds half a character (a surrogate)") from None
    except RuntimeError:  # Path.expanduser's word for a user who is not there
        raise ValueError(f"{shown(text)}: this machine has no user {text.partition('/')[0]}") from None
    if "\0" in text:
        raise ValueError(f"{shown(text)} holds a NUL character, which no path can")
    return Path(os.path.abspath(directory / path))


def _read(path: Path, chain: tuple[Path, ...], named_at: Mark, known: dict[Path, Source]) -> Source:
    path = Path(os.path.realpath(path))
    if path in known:
        return known[path]
    if path in chain:
        cycle = " → ".join(display(p) for p in (*chain[chain.index(path) :], path))
        return Source({}, {}, [Problem(named_at, f"extends: goes round in a circle: {short(cycle, 400)}")])
    if len(chain) > MAX_DEPTH:
        return Source({}, {}, [Problem(named_at, f"extends: more than {MAX_DEPTH} files, one below the other")])
    own = _own(path, named_at)
    if not isinstance(own.data, dict):
        if not own.problems:
            own.problems.append(Problem(own.marks[()], f"expected `key: value` lines, got {shown(own.data)}"))
        return Source({}, own.marks, own.problems)
    under_todays_words(own)
    parents = own.data.pop("extends", ())
    at = own.marks.get(("extends",), own.marks[()])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list | tuple) or not all(isinstance(p, str) for p in parents):
        own.problems.append(Problem(at, f"extends: should be a file or a list of files (got {shown(parents)})"))
        return own
    result = Source({}, {}, [])
    for i, parent in enumerate(parents):
        mark = own.marks.get(("extends", i), at)
        overlay(result, extended(path.parent, parent, mark, (*chain, path), known))
    overlay(result, own)
    known[path] = result
    return result


OLDER_WORDS = {"backends": "arms"}  # keys of an experiment that have another name now


def under_todays_words(own: Source) -> None:
    """Rename what stands under an older word, in place; its marks remember the word."""
    for older, now in OLDER_WORDS.items():
        if older not in own.data:
            continue
        if now in own.data:
            message = f"{older}: is the older word for {now}, and both are written; keep one of them"
            own.problems.append(Problem(own.marks.get((older,), Mark("?")), message))
            del own.data[older]
            continue
        own.data = {now if key == older else key: value for key, value in own.data.items()}
        own.marks = {
            (now, *at[1:]) if at[:1] == (older,) else at: replace(mark, word=older) if at[:1] == (older,) else mark
            for at, mark in own.marks.items()
        }


def extended(
    directory: Path,
    text: str,
    named_at: Mark,
    chain: tuple[Path, ...] = (),
    known: dict[Path, Source] | None = None,
) -> Source:
    """The file that `extends: text` names, written in `directory` at `named_at`, with everything it extends."""
    try:
        return _read(located(directory, text), chain, named_at, {} if known is None else known)
    except ValueError as error:
        return Source({}, {}, [Problem(named_at, f"extends: {error}")])


def _own(path: Path, named_at: Mark) -> Source:
    """What the file itself says."""
    name = short(display(path), 200)
    try:
        raw = _bytes(path)
    except OSError as error:
        return Source(None, {}, [Problem(named_at, f"cannot read {name}: {cause(error)}{_nearby(path)}")])
    except ValueError as error:
        return Source(None, {}, [Problem(named_at, f"cannot read {name}: {error}")])
    for mark, encoding in ENCODINGS:
        if raw.startswith(mark):
            message = f"is written in {encoding}; save it as UTF-8 (iconv -f {encoding} -t UTF-8)"
            return Source(None, {}, [Problem(Mark(name, 1, 1), message)])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8; if the file is Latin-1: iconv -f LATIN1 -t UTF-8"
        return Source(None, {}, [Problem(Mark(name, line, column), message)])
    own = convert_text(text, name, path.parent)
    if own.data is None and not own.problems:
        own.problems.append(Problem(Mark(name, 1, 1), "the file is empty"))
    return own


def _bytes(path: Path) -> bytes:
    """A regular file's content. Opened without waiting: a pipe nobody writes to would never answer."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            kind = KINDS.get(stat.S_IFMT(found.st_mode), "no file")
            raise ValueError(f"it is {kind}, and should be a file")
        if found.st_size > LARGEST:
            raise ValueError(f"it has {found.st_size:,} bytes; the most is {LARGEST:,}")
        return b"".join(iter(lambda: os.read(handle, LARGEST), b""))
    finally:
        os.close(handle)


def overlay(below: Source, above: Source) -> None:
    """Merge `above` over `below`, in place: mappings key by key, anything else replaced, marks alike."""
    below.data = _merge(below.data, above.data, (), below)
    below.marks.update(
        {location: mark for location, mark in above.marks.items() if location == () or location[0] != "extends"}
    )
    below.problems.extend([problem for problem in above.problems if problem not in below.problems])


def _merge(low: Any, high: Any, at: tuple[str | int, ...], below: Source) -> Any:
    if isinstance(low, dict) and isinstance(high, dict) and _same_type(low, high):
        merged = {key: value for key, value in low.items() if not left_behind(key, high)}
        for key, value in high.items():
            merged[key] = _merge(low[key], value, (*at, key), below) if key in low else value
        return merged
    for inner in locations(low):
        if inner:
            below.marks.pop((*at, *inner), None)
    return high


def copied(value: Any) -> Any:
    """Mappings and lists anew, their scalars shared: `deepcopy` takes twenty times as long."""
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


def laid_over(low: Any, high: Any) -> Any:
    """`high` over `low` as one file lies over another, of plain data without marks."""
    if not (isinstance(low, dict) and isinstance(high, dict) and _same_type(low, high)):
        return high
    kept = {key: value for key, value in low.items() if not left_behind(key, high)}
    return kept | {key: laid_over(kept[key], value) if key in kept else value for key, value in high.items()}


def _same_type(low: JsonObject, high: JsonObject) -> bool:
    """Whether both may be one thing: a remote policy inherits nothing from a pi05."""
    return bool(high.get("type", low.get("type")) == low.get("type"))


def left_behind(key: str, newer: JsonObject) -> bool:
    """A hash belongs to the checkpoint it was written for: another checkpoint does not inherit it. And a suite's states
    are drawn or there: whoever says one leaves the other."""
    if key in newer:
        return False
    return {"sha256": "checkpoint", "fresh": "init_states", "init_states": "fresh"}.get(key) in newer


def put(data: JsonObject, keys: Iterable[str], value: Any) -> None:
    """`--set a.b=value` into `data`. Raises ValueError when the way leads below a value that is no mapping."""
    *path, last = keys
    if len(path) > MAX_DEPTH:
        raise ValueError(f"a key of {len(path) + 1:,} words; no key lies more than {MAX_DEPTH} deep")
    here: Any = data
    for i, key in enumerate(path):
        inner = here.get(key) if isinstance(here, dict) else here[int(key)]
        if inner is None and isinstance(here, dict):
            inner = here[key] = {}
        name = short(".".join(path[: i + 1]))
        if isinstance(inner, list) and _index((*path, last)[i + 1], inner) is None:
            raise ValueError(f"{name} is a list of {len(inner)}; continue with a number, or set all of it")
        if not isinstance(inner, dict | list):
            raise ValueError(f"{name} is {shown(inner)}, which has no keys of its own")
        here = inner
    if isinstance(here, list):
        here[int(last)] = value
    else:
        for key in [key for key in here if left_behind(key, {last: value})]:
            del here[key]
        here[last] = value


def _index(text: str, items: list[Any]) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 9 and int(text) < len(items) else None


def display(path: Path) -> str:
    """A path as the user would write it: relative to the current directory when it lies below it."""
    try:
        return os.path.relpath(path) if Path(os.path.abspath(path)).is_relative_to(Path.cwd()) else str(path)
    except (ValueError, OSError):
        return str(path)


def _nearby(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml") and p.name != path.name]
    except OSError:
        return ""
    close = get_close_matches(short(path.name, 200), names, n=1)
    return f"; did you mean {display(path.parent / close[0])}?" if close else ""
