"""YAML file + `--set` + environment → a frozen `Experiment`, or every problem at once with its place and cure.

Precedence, lowest first: files named by `extends:`, the file itself, OPENPI_DUQUANT_* variables, `--set`.
One rule for paths: a relative path belongs to the file that wrote it; in `--set`, to the current directory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qlibero.config.fork_variables import fork_overrides
from qlibero.config.labels import suffix_of_sets
from qlibero.config.schema import UNQUANTIZED_BACKENDS, Experiment, Misplaced
from qlibero.config.yaml_source import CoreLoader, Location, Mark, Problem, Source, display, parse, put, read
from qlibero.errors import UserError

SWEEP_KEYS = ("grid", "exclude", "cells")
PLAIN_WORDS = {
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "string_type": "should be a text",
    "tuple_type": "should be a list",
    "dict_type": "should be `key: value` lines",
    "model_type": "should be `key: value` lines",
    "model_attributes_type": "should be `key: value` lines",
    "dataclass_type": "should be `key: value` lines",
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "path_type": "should be a path",
    "string_pattern_mismatch": "does not look right",
    "finite_number": "should be a finite number",
}
PATH_KEYS = (
    "checkpoint",
    "tokenizer",
    "config",
    "path",
    "artifact",
    "norm_stats",
)  # every Path of the schema; a test compares


class ConfigError(UserError):
    """Everything that is wrong with a configuration, one line each."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def load_experiment(
    path: str | Path,
    sets: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    announce: Callable[[str], None] = _say,
    check_files: bool = True,
) -> Experiment:
    """Read, merge and validate. `sets` are `a.b=c` texts; `announce` hears of every OPENPI_DUQUANT_* variable.

    `check_files` also requires that the files the experiment names exist. Raises ConfigError with all problems.
    """
    source = read(Path(path))
    if source.problems:
        raise ConfigError(source.problems)
    for key in SWEEP_KEYS:
        if key in source.data:
            message = f"{key}: makes this a sweep of many experiments; use `qlibero sweep` or `qlibero plan`"
            raise ConfigError([Problem(source.marks[(key,)], message)])
    sets, environ = tuple(sets), os.environ if environ is None else environ
    source.data.setdefault("name", Path(path).stem)
    source.data["name"] = f"{source.data['name']}{suffix_of_sets(sets, _effective(source, environ))}"
    return finish(source, sets, environ, announce, check_files)


def _effective(source: Source, environ: Mapping[str, str]) -> list[tuple[str, Any]]:
    """(key, value) of the fork's variables as far as there is something to override; `finish` tells a wrong one."""
    if not isinstance(source.data.get("quant"), dict):
        return []
    try:
        return [(f"quant.{override.key}", override.value) for override in fork_overrides(environ)[0]]
    except ValueError:
        return []


def finish(
    source: Source, sets: Iterable[str], environ: Mapping[str, str], announce: Callable[[str], None], check_files: bool
) -> Experiment:
    """The second half of `load_experiment`, also used for each cell of a sweep. `source` is changed in place."""
    _apply_environment(source, environ, announce)
    _apply_sets(source, sets)
    _resolve_paths(source, check_files)
    experiment = None
    try:
        experiment = Experiment.model_validate(source.data)
    except ValidationError as error:
        source.problems.extend(explain(error, source, Experiment.model_json_schema()))
    _check_backends(source)
    if source.problems or experiment is None:
        raise ConfigError(sorted(source.problems, key=lambda p: (p.mark.source, p.mark.line, p.mark.column)))
    return experiment


# ---------------------------------------------------------------------------------------------------- overrides
def _apply_environment(source: Source, environ: Mapping[str, str], announce: Callable[[str], None]) -> None:
    try:
        overrides, notes = fork_overrides(environ)
    except ValueError as error:
        source.problems.append(Problem(Mark("environment"), str(error)))
        return
    for note in notes:
        announce(note)
    quant = source.data.get("quant")
    for override in overrides:
        if not isinstance(quant, dict):
            announce(f"{override.variable} changes nothing here: the experiment has no quant section")
            continue
        keys = ("quant", *override.key.split("."))
        if override.key == "include":
            quant["layout"] = None
        if override.key == "row_rotation" and quant.get("method", "duquant") != "weight_pca":
            announce(f"{override.variable} changes nothing here: only weight_pca rotates outputs")
            continue
        if override.key.startswith("calibration") and not isinstance(quant.get("calibration"), dict):
            announce(f"{override.variable} changes nothing here: quant.calibration names no data")
            continue
        put(source.data, keys, override.value)
        _mark(source, keys, Mark(f"{override.variable}={override.text}"))
        announce(str(override))


def _apply_sets(source: Source, sets: Iterable[str]) -> None:
    for text in sorted(
        sets, key=lambda text: "sha256" in text.partition("=")[0]
    ):  # a hash after the checkpoint it is for
        mark = Mark(f"--set {text}", directory=Path.cwd())
        key, equals, value = text.partition("=")
        keys = tuple(key.strip().split("."))
        if not equals or not all(keys):
            source.problems.append(Problem(mark, "should look like a.b=value"))
            continue
        try:
            put(source.data, keys, parse(value))
        except ValueError as error:
            source.problems.append(Problem(mark, str(error)))
            continue
        _mark(source, keys, mark)


def _mark(source: Source, keys: tuple[str, ...], mark: Mark) -> None:
    location = _walk(source.data, keys)[0]
    for known in [known for known in source.marks if known[: len(location)] == location]:
        del source.marks[known]
    source.marks[location] = mark


def _mark_of(source: Source, location: Location) -> Mark:
    while location not in source.marks and location:
        location = location[:-1]
    return source.marks.get(location, Mark("?"))


# ------------------------------------------------------------------------------------------------ paths, backends
def _resolve_paths(source: Source, check_files: bool) -> None:
    def visit(value: Any, at: Location) -> None:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            here = (*at, key)
            if isinstance(inner, dict | list):
                visit(inner, here)
            elif (
                key in PATH_KEYS
                and isinstance(inner, str)
                and inner
                and at
                and at[0] in ("policy", "quant", "backends")
            ):
                mark = _mark_of(source, here)
                value[key] = str(Path(os.path.abspath(mark.directory / Path(inner).expanduser())))
                if check_files and not os.path.exists(value[key]):
                    source.problems.append(
                        Problem(mark, f"{_dotted(here)}: no such file or directory: {display(Path(value[key]))}")
                    )

    visit(source.data, ())


def known_backends() -> tuple[str, ...]:
    """What an arm's `backend` may be: the unquantized ones, `auto`, and every kernel."""
    from qlibero.kernels import BACKENDS

    return (*UNQUANTIZED_BACKENDS, "auto", *BACKENDS)


def _check_backends(source: Source) -> None:
    entries = source.data.get("backends")
    for i, entry in enumerate(entries if isinstance(entries, list) else ()):
        name = entry.get("backend") if isinstance(entry, dict) else entry
        if isinstance(name, str) and name not in known_backends():
            at: Location = ("backends", i, "backend") if isinstance(entry, dict) else ("backends", i)
            message = f"{_dotted(at)}: unknown backend; known are {', '.join(known_backends())} (got {name!r})"
            source.problems.append(Problem(_mark_of(source, at), message + _did_you_mean(name, known_backends())))


# ----------------------------------------------------------------------------------------- pydantic's errors, told
def explain(error: ValidationError, source: Source, schema: dict[str, Any]) -> list[Problem]:
    """pydantic's errors as `file:line:col: key: what (got …); did you mean …?`, the branches of a union in one line."""
    told: dict[Location, list[str]] = {}
    tails: dict[Location, str] = {}
    for item in error.errors():
        location, beyond = _walk(source.data, item["loc"])
        kind, context = item["type"], item.get("ctx", {})
        location = (*location, *getattr(context.get("error"), "path", ()))
        got, hint = f" (got {_short(item['input'])})", ""
        if kind == "missing":
            location = (*location, *beyond[-1:])
            about = _property(schema, location).get("description")
            what, got = "is missing" + (f": {about}" if about else ""), ""
        elif kind == "extra_forbidden":
            what, got, hint = "unknown key", "", _did_you_mean(str(location[-1]), _keys_at(schema, location[:-1]))
        elif kind == "union_tag_not_found":
            what, got = "say which type: pi05 or remote", ""
        elif kind == "union_tag_invalid":
            what, got = f"type should be {context['expected_tags'].replace(', ', ' or ')}", f" (got {context['tag']!r})"
            hint = _did_you_mean(context["tag"], context["expected_tags"].replace("'", "").split(", "))
        else:
            what = PLAIN_WORDS.get(kind, item["msg"].removeprefix("Value error, ").removeprefix("Input "))
            got = "" if isinstance(context.get("error"), Misplaced) else got
            if kind == "literal_error":
                hint = _did_you_mean(
                    item["input"], context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
                )
        told.setdefault(location, []).append(what)
        tails[location] = got + (hint or tails.get(location, "").partition(")")[2])
    problems = []
    for at, what in told.items():
        first, *others = dict.fromkeys(what)
        text = " or ".join([first, *(other.removeprefix("should be ") for other in others)])
        problems.append(Problem(_mark_of(source, at), f"{_dotted(at) + ': ' if at else ''}{text}{tails[at]}"))
    return problems


def _walk(data: Any, loc: Iterable[str | int]) -> tuple[Location, Location]:
    """(the part of `loc` that exists in `data`, the rest): pydantic puts union branches between real keys."""
    here: list[str | int] = []
    rest: list[str | int] = []
    for step in loc:
        index = int(step) if isinstance(data, list) and str(step).isdecimal() else step
        if (isinstance(data, dict) and index in data) or (
            isinstance(data, list) and isinstance(index, int) and index < len(data)
        ):
            data = data[index]
            here.append(index)
            rest.clear()
        else:
            rest.append(step)
    return tuple(here), tuple(rest)


def _schemas_at(schema: dict[str, Any], location: Location) -> list[dict[str, Any]]:
    """Every JSON Schema that may describe the value at `location`, unions opened."""

    def opened(node: dict[str, Any]) -> list[dict[str, Any]]:
        if "$ref" in node:
            return opened(schema["$defs"][node["$ref"].rpartition("/")[2]])
        return [
            node,
            *(inner for key in ("anyOf", "oneOf") for option in node.get(key, ()) for inner in opened(option)),
        ]

    nodes = opened(schema)
    for step in location:
        inner = [
            n["items"] if isinstance(step, int) else n["properties"][step]
            for n in nodes
            if (isinstance(step, int) and "items" in n) or step in n.get("properties", {})
        ]
        nodes = [found for node in inner for found in opened(node)]
    return nodes


def _keys_at(schema: dict[str, Any], location: Location) -> list[str]:
    return [key for node in _schemas_at(schema, location) for key in node.get("properties", {})] + ["extends"] * (
        not location
    )


def _property(schema: dict[str, Any], location: Location) -> dict[str, Any]:
    return next(
        (
            n["properties"][location[-1]]
            for n in _schemas_at(schema, location[:-1])
            if location[-1] in n.get("properties", {})
        ),
        {},
    )


def _did_you_mean(word: Any, known: Iterable[str]) -> str:
    close = get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _dotted(location: Location) -> str:
    return ".".join(map(str, location))


def _short(value: Any) -> str:
    text = (
        {True: "true", False: "false", None: "null"}.get(value)
        if value is None or isinstance(value, bool)
        else repr(value)
    )
    return text if len(text) <= 80 else text[:77] + "…"


# ----------------------------------------------------------------------------------------------------- back to YAML
class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    plain = CoreLoader("").resolve(yaml.ScalarNode, value, (True, False)) == "tag:yaml.org,2002:str"
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else "'")


_Dumper.add_representer(str, _text)


def dump_resolved(experiment: Experiment, directory: Path | None = None) -> str:
    """The experiment as one YAML text that loads to an equal Experiment.

    Paths are absolute, or, for a file to be kept in `directory`, relative to it where both lie in one checkout.
    """
    data = experiment.model_dump(mode="json")
    if directory is not None:
        _make_relative(data, directory.resolve())
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _make_relative(value: Any, directory: Path) -> None:
    from qlibero.places import REPOSITORY

    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, dict | list):
            _make_relative(inner, directory)
        elif key in PATH_KEYS and isinstance(inner, str):
            if directory.is_relative_to(REPOSITORY) and Path(inner).is_relative_to(REPOSITORY):
                value[key] = os.path.relpath(inner, directory)


def editor_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of an experiment file, for completion and tooltips in editors."""
    schema = Experiment.model_json_schema()
    files = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    schema["properties"]["extends"] = {**files, "description": "files this one is laid over, relative to this file"}
    schema["$defs"]["Backend"]["properties"]["backend"]["enum"] = list(known_backends())
    schema.pop("required", None)  # any key may come from a file this one extends
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
