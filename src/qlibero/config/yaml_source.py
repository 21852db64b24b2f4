"""YAML text → plain data, remembering where every value was written.

PyYAML's node tree keeps line and column; its plain loader throws them away and also takes the last of two equal
keys in silence. So we walk the tree ourselves: every path of the data (`("quant", "weight_bits")`) gets a `Mark`,
duplicates are refused, `extends:` and `<<` are merged with their marks. Scalars follow YAML 1.2's core rules, so
that `no` and `on` stay words, `1e-3` is a number, `010` is ten and `12:30:00` is a text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Location = tuple[str | int, ...]

MOST_NODES = 20_000  # far beyond any experiment; stops alias bombs


@dataclass(frozen=True)
class Mark:
    """Where a value was written: a file with line and column, or a `source` such as `--set seed=8`."""

    source: str
    line: int = 0
    column: int = 0
    directory: Path = Path(".")  # what a relative path written here is relative to

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where."""

    mark: Mark
    message: str

    def __str__(self) -> str:
        return f"{self.mark}: {self.message}"


@dataclass
class Source:
    """Data read so far, the mark of every path in it, and what was wrong on the way."""

    data: Any
    marks: dict[Location, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class CoreLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the implicit types of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str | None, list] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))
CoreLoader.yaml_implicit_resolvers.setdefault("", CoreLoader.yaml_implicit_resolvers.get("\0", []))


def core_scalar(tag: str, text: str) -> Any:
    """The value of a scalar node; `tag` as CoreLoader resolved it. Raises ValueError for any tag but the core ones."""
    kind = tag.removeprefix("tag:yaml.org,2002:")
    if kind in ("str", "merge"):
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if kind == "float":
        return float(
            text.replace(".inf", "inf")
            .replace(".nan", "nan")
            .replace(".Inf", "inf")
            .replace(".INF", "inf")
            .replace(".NaN", "nan")
            .replace(".NAN", "nan")
        )
    raise ValueError(f"tag {tag.replace('tag:yaml.org,2002:', '!!')} is not understood here")


def parse(text: str) -> Any:
    """The value written after `--set key=`: a scalar, list or mapping in YAML. Raises ValueError with the reason."""
    source = _convert_text(text, "", Path("."))
    if source.problems:
        raise ValueError(source.problems[0].message)
    return source.data


def read(path: Path) -> Source:
    """The file with everything it extends, deepest first. Never raises for what a file may hold: see `problems`."""
    return _read(path.resolve(), (), Mark(display(path)))


def _read(path: Path, chain: tuple[Path, ...], named_at: Mark) -> Source:
    if path in chain:
        cycle = " → ".join(display(p) for p in (*chain[chain.index(path) :], path))
        return Source({}, {}, [Problem(named_at, f"extends: goes round in a circle: {cycle}")])
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Source({}, {}, [Problem(named_at, f"cannot read {display(path)}: {reason}{_nearby(path)}")])
    own = _convert_text(text, display(path), path.parent)
    if own.data is None and not own.problems:
        own.problems.append(Problem(Mark(display(path), 1, 1), "the file is empty"))
    if not isinstance(own.data, dict):
        if not own.problems:
            own.problems.append(Problem(own.marks[()], f"expected `key: value` lines, got {_kind(own.data)}"))
        return Source({}, own.marks, own.problems)
    parents = own.data.pop("extends", ())
    at = own.marks.get(("extends",), own.marks[()])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list | tuple) or not all(isinstance(p, str) for p in parents):
        own.problems.append(Problem(at, f"extends: should be a file or a list of files (got {parents!r})"))
        return own
    result = Source({}, {}, [])
    for i, parent in enumerate(parents):
        mark = own.marks.get(("extends", i), at)
        overlay(result, _read((path.parent / parent).resolve(), (*chain, path), mark))
    overlay(result, own)
    return result


def overlay(below: Source, above: Source) -> None:
    """Merge `above` over `below`, in place: mappings key by key, anything else replaced, marks alike."""
    below.data = _merge(below.data, above.data, (), below, above)
    below.marks.update(
        {location: mark for location, mark in above.marks.items() if location == () or location[0] != "extends"}
    )
    below.problems.extend(above.problems)


def _merge(low: Any, high: Any, at: Location, below: Source, above: Source) -> Any:
    mappings = isinstance(low, dict) and isinstance(high, dict)
    if mappings and high.get("type", low.get("type")) == low.get(
        "type"
    ):  # a remote policy inherits nothing from a pi05
        merged = {key: value for key, value in low.items() if not _left_behind(key, high)}
        for key, value in high.items():
            merged[key] = _merge(low[key], value, (*at, key), below, above) if key in low else value
        return merged
    for location in [known for known in below.marks if known[: len(at)] == at and len(known) > len(at)]:
        del below.marks[location]
    return high


def _left_behind(key: str, newer: dict[str, Any]) -> bool:
    """A hash belongs to the checkpoint it was written for: another checkpoint does not inherit it."""
    return key == "sha256" and "checkpoint" in newer and "sha256" not in newer


def _convert_text(text: str, name: str, directory: Path) -> Source:
    source = Source(None)
    try:
        node = yaml.compose(text, Loader=CoreLoader)
        if node is not None:
            source.data = _Converter(source, name, directory).convert(node, (), ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = Mark(name, mark.line + 1, mark.column + 1, directory) if mark else Mark(name, 1, 1, directory)
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        source.problems.append(Problem(where, f"not valid YAML: {reason}"))
    except RecursionError:
        source.problems.append(Problem(Mark(name, 1, 1, directory), "nested too deeply"))
    except _TooMuch:
        source.problems.append(Problem(Mark(name, 1, 1, directory), f"more than {MOST_NODES} values"))
    if source.problems and source.data is None:
        source.marks.setdefault((), source.problems[0].mark)
    return source


class _TooMuch(Exception):
    pass


class _Converter:
    def __init__(self, source: Source, name: str, directory: Path):
        self.source, self.name, self.directory, self.nodes = source, name, directory, 0

    def mark(self, node: yaml.Node) -> Mark:
        return Mark(self.name, node.start_mark.line + 1, node.start_mark.column + 1, self.directory)

    def complain(self, node: yaml.Node, message: str) -> None:
        self.source.problems.append(Problem(self.mark(node), message))

    def convert(self, node: yaml.Node, at: Location, ancestors: tuple[int, ...]) -> Any:
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise _TooMuch
        if id(node) in ancestors:
            self.complain(node, "an alias contains itself")
            return None
        self.source.marks.setdefault(at, self.mark(node))
        inside = (*ancestors, id(node))
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, at, inside)
        if isinstance(node, yaml.SequenceNode):
            return [self.convert(item, (*at, i), inside) for i, item in enumerate(node.value)]
        try:
            return core_scalar(node.tag, node.value)
        except ValueError as error:
            self.complain(node, str(error))
            return None

    def mapping(self, node: yaml.MappingNode, at: Location, inside: tuple[int, ...]) -> dict[str, Any]:
        first: dict[str, yaml.Node] = {}
        merged_in: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.complain(key_node, "a key should be a word")
            elif key_node.tag.endswith(":merge"):
                merged_in += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            elif key_node.value in first:
                line = first[key_node.value].start_mark.line + 1
                self.complain(key_node, f"duplicate key {key_node.value} (first on line {line}); keep one of them")
            else:
                first[key_node.value] = key_node
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if any(key_node is known for known in first.values()):
                key = key_node.value
                self.source.marks[(*at, key)] = self.mark(key_node)
                result[key] = self.convert(value_node, (*at, key), inside)
        for other in merged_in:  # a mapping's own keys win, then the first merged in
            if not isinstance(other, yaml.MappingNode) or id(other) in inside:
                self.complain(other, "<<: should name another mapping")
                continue
            for key, value in self.mapping(other, ("<<", id(other)), (*inside, id(other))).items():
                if key not in result:
                    result[key] = value
                    self._adopt(("<<", id(other), key), (*at, key))
        return result

    def _adopt(self, origin: Location, target: Location) -> None:
        for known in [known for known in self.source.marks if known[: len(origin)] == origin]:
            self.source.marks[(*target, *known[len(origin) :])] = self.source.marks[known]


def put(data: dict[str, Any], keys: Iterable[str], value: Any) -> None:
    """`--set a.b=value` into `data`. Raises ValueError when the way leads below a value that is no mapping."""
    *path, last = keys
    here: Any = data
    for i, key in enumerate(path):
        inner = here.get(key) if isinstance(here, dict) else here[int(key)]
        if inner is None and isinstance(here, dict):
            inner = here[key] = {}
        if isinstance(inner, list) and _index((*path, last)[i + 1], inner) is None:
            raise ValueError(
                f"{'.'.join(path[: i + 1])} is a list of {len(inner)}; continue with a number, or set all of it"
            )
        if not isinstance(inner, dict | list):
            raise ValueError(f"{'.'.join(path[: i + 1])} is {inner!r}, which has no keys of its own")
        here = inner
    if isinstance(here, list):
        here[int(last)] = value
    else:
        for key in [key for key in here if _left_behind(key, {last: value})]:
            del here[key]
        here[last] = value


def _index(text: str, items: list) -> int | None:
    return int(text) if text.isdecimal() and int(text) < len(items) else None


def display(path: Path) -> str:
    """A path as the user would write it: relative to the current directory when it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def _nearby(path: Path) -> str:
    from difflib import get_close_matches

    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return ""
    close = get_close_matches(path.name, names, n=1)
    return f"; did you mean {display(path.parent / close[0])}?" if close else ""


def _kind(value: Any) -> str:
    return {list: "a list", str: f"the text {value!r}"}.get(type(value), repr(value))
