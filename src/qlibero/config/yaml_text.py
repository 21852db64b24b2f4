"""YAML text → plain data, remembering where every value was written.

PyYAML's node tree keeps line and column; its plain loader throws them away and also takes the last of two equal keys
in silence. So we walk the tree ourselves: every path of the data (`("quant", "weight_bits")`) gets a `Mark`,
duplicates are refused, `<<` is merged with its marks, unknown tags are refused on mappings and lists too. Scalars
follow YAML 1.2's core rules: `no` and `on` stay words, `1e-3` is a number, `010` is ten and `12:30:00` is a text.

ruamel.yaml 0.19.1 was tried in PyYAML's place. It drops tags of mappings and lists in silence, makes dates of texts
and number subclasses of numbers, raises KeyError, OverflowError and ValueError without a place for `!!bool maybe`,
`"\\UFFFFFFFF"` and numbers of 5,000 digits, and takes twice as long (1.1 s for 10,000 values). All but 50 lines of
this file would have stayed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qlibero.documents import JsonObject

Location = tuple[str | int, ...]

MAX_NODES = 20_000  # far beyond any experiment; stops alias and merge bombs
MAX_DEPTH = 24  # an experiment nests six deep
LONGEST_NUMBER = 100  # characters; the longest exact float64 that people write has about 60
LONGEST_ECHO = 80  # characters of a value in a message
CORE = "tag:yaml.org,2002:"
PATTERNS = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "null": r"~|null|Null|NULL|",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}
FIRST = {"bool": "tTfF", "null": "~nN\0", "int": "-+0123456789", "float": "-+.0123456789", "merge": "<"}


@dataclass(frozen=True)
class Mark:
    """Where a value was written: a file with line and column, or a `source` such as `--set seed=8`."""

    source: str
    line: int = 0
    column: int = 0
    directory: Path = Path(".")  # what a relative path written here is relative to
    word: str = ""  # the older word under which it was written, where it has another name now

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


class _TooMuch(Exception):
    def __init__(self, mark: yaml.Mark, message: str):
        super().__init__(message)
        self.mark = mark


class CoreLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the implicit types of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str | None, list[Any]] = {}
    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.composed += 1
        if self.composed > MAX_NODES:  # a long file is refused after a second, not after a minute
            raise _TooMuch(self.get_mark(), f"more than {MAX_NODES:,} keys and values")
        return super().compose_node(parent, index)


for _kind, _pattern in PATTERNS.items():
    CoreLoader.add_implicit_resolver(CORE + _kind, re.compile(rf"^(?:{_pattern})$"), list(FIRST[_kind]))
CoreLoader.yaml_implicit_resolvers.setdefault("", CoreLoader.yaml_implicit_resolvers.get("\0", []))


def short(text: object, most: int = LONGEST_ECHO) -> str:
    """A text of somebody else's for a message: at most `most` characters, passwords of addresses left out."""
    found = str(text)
    found = found if len(found) <= most else f"{found[: most - 1]}…"
    return re.sub(r"//[^/@\s]*@", "//…@", found)


def shown(value: Any) -> str:
    """A value for a message, as YAML or Python would write it; never long, whatever it is."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str):
        return repr(short(value))
    if isinstance(value, list | tuple | dict) and len(value) > LONGEST_ECHO:
        return f"{len(value)} {'keys' if isinstance(value, dict) else 'values'}"
    return short(repr(value))


def core_scalar(tag: str, text: str) -> Any:
    """The value of a scalar node; `tag` as CoreLoader resolved it, or as the file says. Raises ValueError, told."""
    kind = tag.removeprefix(CORE)
    if kind in ("str", "merge"):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("holds half a character (a surrogate, such as \\uD800)") from None
        return text
    if kind not in PATTERNS:
        raise ValueError(f"tag {short(tag.replace(CORE, '!!'))} is not understood here")
    if not re.fullmatch(PATTERNS[kind], text):
        raise ValueError(f"{shown(text)} is not what !!{kind} stands for")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text):,} characters ({short(text, 20)}) is not meant here")
    if kind == "int":
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def parse(text: str) -> Any:
    """The value written after `--set key=`: a scalar, list or mapping in YAML. Raises ValueError with the reason."""
    source = convert_text(text, "", Path("."))
    if source.problems:
        raise ValueError(source.problems[0].message)
    return source.data


def convert_text(text: str, name: str, directory: Path) -> Source:
    """The data of a YAML text. `name` stands in its marks; never raises for what a text may hold: see `problems`."""
    source = Source(None)
    loader = None
    try:
        loader = CoreLoader(text)
        node = loader.get_single_node()
        if node is not None:
            source.data = _Converter(source, name, directory).convert(node, (), ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        _complain(source, name, directory, mark, f"not valid YAML: {short(reason, 200)}")
    except _TooMuch as error:
        _complain(source, name, directory, error.mark, str(error))
    except RecursionError:
        _complain(source, name, directory, loader.get_mark() if loader else None, "nested too deeply")
    except (ValueError, OverflowError) as error:  # PyYAML's own, for numbers in escapes and directives
        _complain(
            source, name, directory, loader.get_mark() if loader else None, f"not valid YAML: {short(error, 200)}"
        )
    if source.problems and source.data is None:
        source.marks.setdefault((), source.problems[0].mark)
    return source


def _complain(source: Source, name: str, directory: Path, mark: yaml.Mark | None, message: str) -> None:
    where = Mark(name, mark.line + 1, mark.column + 1, directory) if mark else Mark(name, 1, 1, directory)
    source.problems.append(Problem(where, message))


class _Converter:
    def __init__(self, source: Source, name: str, directory: Path):
        self.source, self.name, self.directory, self.nodes = source, name, directory, 0

    def mark(self, node: yaml.Node) -> Mark:
        return Mark(self.name, node.start_mark.line + 1, node.start_mark.column + 1, self.directory)

    def complain(self, node: yaml.Node, message: str) -> None:
        self.source.problems.append(Problem(self.mark(node), message))

    def count(self, node: yaml.Node, depth: int) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise _TooMuch(node.start_mark, f"more than {MAX_NODES:,} values, counted wherever an alias repeats them")
        if depth > MAX_DEPTH:
            raise _TooMuch(node.start_mark, f"nested more than {MAX_DEPTH} levels deep")

    def convert(self, node: yaml.Node, at: Location, ancestors: tuple[int, ...]) -> Any:
        if id(node) in ancestors:
            self.complain(node, "an alias contains itself")
            return None
        self.source.marks.setdefault(at, self.mark(node))
        inside = (*ancestors, id(node))
        try:
            if isinstance(node, yaml.ScalarNode):
                self.count(node, len(ancestors))
                return core_scalar(node.tag, node.value)
            kind = "map" if isinstance(node, yaml.MappingNode) else "seq"
            if node.tag not in (CORE + kind, "!"):
                raise ValueError(f"tag {short(node.tag.replace(CORE, '!!'))} is not understood here")
        except ValueError as error:
            self.complain(node, str(error))
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, at, inside)
        self.count(node, len(ancestors))
        return [self.convert(item, (*at, i), inside) for i, item in enumerate(node.value)]

    def mapping(self, node: yaml.MappingNode, at: Location, inside: tuple[int, ...]) -> JsonObject:
        self.count(node, len(inside) - 1)
        first: dict[str, yaml.Node] = {}
        merged_in: list[yaml.Node] = []
        result: JsonObject = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.complain(key_node, "a key should be a word")
                continue
            key = key_node.value
            if key_node.tag == CORE + "merge":
                merged_in += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            if key in first:
                line = first[key].start_mark.line + 1
                self.complain(key_node, f"duplicate key {short(key)} (first on line {line}); keep one of them")
                continue
            first[key] = key_node
            try:
                core_scalar(key_node.tag, key)
            except ValueError as error:
                self.complain(key_node, f"key: {error}")
                continue
            self.source.marks[(*at, key)] = self.mark(key_node)
            result[key] = self.convert(value_node, (*at, key), inside)
        for other in merged_in:  # a mapping's own keys win, then the first merged in
            if not isinstance(other, yaml.MappingNode) or id(other) in inside:
                self.complain(other, "<<: should name another mapping")
                continue
            origin: Location = ("<<", id(other))
            for key, value in self.mapping(other, origin, (*inside, id(other))).items():
                if key not in result:
                    result[key] = value
                    for here in locations(value):
                        self.source.marks[(*at, key, *here)] = self.source.marks[(*origin, key, *here)]
        return result


def locations(value: Any) -> Iterator[Location]:
    """Every path inside a value, its own `()` first."""
    yield ()
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            for rest in locations(inner):
                yield (key, *rest)
