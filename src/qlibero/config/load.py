"""YAML file + `--set` + environment → a frozen `Experiment`, or every problem at once with its place and hint.

Precedence, lowest first: files named by `extends:`, the file itself, OPENPI_DUQUANT_* variables, `--set`.
One rule for paths: a relative path belongs to the file that wrote it; in `--set`, to the current directory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlibero.config.arm_grid import expand_arms
from qlibero.config.arms import UNQUANTIZED_BACKENDS
from qlibero.config.explain import dotted, explain, mark_of, walk
from qlibero.config.labels import suffix_of_sets
from qlibero.config.legacy_env import fork_overrides
from qlibero.config.policies import path_keys
from qlibero.config.schema import Experiment
from qlibero.config.vocabulary import OF_PYTHON, backend_hint
from qlibero.config.yaml_source import OLDER_WORDS, display, located, put, read
from qlibero.config.yaml_text import Location, Mark, Problem, Source, locations, parse, short, shown
from qlibero.console import count_text
from qlibero.errors import UserError
from qlibero.registry import KernelPlugin, UnknownPlugin, get, names

log = logging.getLogger(__name__)

SWEEP_KEYS = ("grid", "exclude", "cells")
# every Path of the schema but the policy's, which its family says; a test compares
PATH_KEYS = ("path", "artifact", "artifact_dir")
SUITE_PATHS = ("bddl", "init_states")
MAX_SHOWN = 40  # problems in one message


class ConfigError(UserError):
    """Everything that is wrong with a configuration, one line each."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = tuple(dict.fromkeys(problems))
        lines = [str(problem) for problem in self.problems[:MAX_SHOWN]]
        if len(self.problems) > MAX_SHOWN:
            lines.append(f"and {count_text(len(self.problems) - MAX_SHOWN, 'more problem')}")
        super().__init__("\n".join(lines))


def load_experiment(
    path: str | Path,
    sets: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    check_files: bool = True,
) -> Experiment:
    """Read, merge and validate. `sets` are `a.b=c` texts. Every OPENPI_DUQUANT_* variable is logged.

    `check_files` also requires that the files the experiment names exist. Raises ConfigError with all problems.
    """
    source = read(Path(path))
    if source.problems:
        raise ConfigError(source.problems)
    if isinstance(policy := source.data.get("policy"), dict) and policy.get("type") == OF_PYTHON:
        message = (
            "policy: was run by qlibero.evaluate, so only that can go on with it; "
            "`qlibero report`, `export` and `explain-gap` read its directory"
        )
        raise ConfigError([Problem(mark_of(source, ("policy",)), message)])
    for key in SWEEP_KEYS:
        if key in source.data:
            message = f"{key}: makes this a sweep of many experiments; use `qlibero sweep` or `qlibero plan`"
            raise ConfigError([Problem(mark_of(source, (key,)), message)])
    sets, environ = tuple(sets), os.environ if environ is None else environ
    call(source, source.data.get("name", Path(path).stem), sets, environ)
    return finish(source, sets, environ, check_files)


def call(source: Source, name: Any, sets: Iterable[str], environ: Mapping[str, str]) -> None:
    """Name the experiment `name` and what the settings add to it; what can be no name is left for the schema."""
    if isinstance(name, str | int | float) and not isinstance(name, bool):
        name = f"{name}{suffix_of_sets(sets, _effective(source, environ))}"
    source.data["name"] = name


def _effective(source: Source, environ: Mapping[str, str]) -> list[tuple[str, Any]]:
    """(key, value) of the fork's variables as far as there is something to override; `finish` tells a wrong one."""
    if not isinstance(source.data.get("quant"), dict):
        return []
    try:
        return [(f"quant.{override.key}", override.value) for override in fork_overrides(environ)[0]]
    except ValueError:
        return []


def finish(
    source: Source,
    sets: Iterable[str],
    environ: Mapping[str, str],
    check_files: bool,
    told: set[str] | None = None,
) -> Experiment:
    """The second half of `load_experiment`, also used for each cell of a sweep. `source` is changed in place.

    `told`: notes on variables that were logged already; those of this call are added.
    """
    told = set() if told is None else told
    for note in _apply_environment(source, environ):
        if note not in told:
            log.warning(note)
            told.add(note)
    _apply_sets(source, sets)
    expand_arms(source)
    _resolve_paths(source, check_files)
    _check_backends(source)
    unknown = {problem.mark for problem in source.problems}  # of a word that is no backend nothing else is worth saying
    experiment = None
    try:
        experiment = Experiment.model_validate(source.data)
    except ValidationError as error:
        found = explain(error, source)
        source.problems.extend(p for p in found if not (p.mark in unknown and "needs a quant section" in p.message))
    if source.problems or experiment is None:
        raise ConfigError(
            sorted(map(_as_written, source.problems), key=lambda p: (p.mark.source, p.mark.line, p.mark.column))
        )
    return experiment


def _as_written(problem: Problem) -> Problem:
    """With the key that the user wrote, where that is an older word for it."""
    word = problem.mark.word
    now = OLDER_WORDS.get(word, "")
    told = problem.message.removeprefix(now) if now else problem.message
    return Problem(problem.mark, word + told) if now and told != problem.message else problem


# ---------------------------------------------------------------------------------------------------- overrides
def _apply_environment(source: Source, environ: Mapping[str, str]) -> list[str]:
    """Set what the fork's variables set; returns what there is to say of each."""
    try:
        overrides, notes = fork_overrides(environ)
    except ValueError as error:
        source.problems.append(Problem(Mark("environment"), str(error)))
        return []
    quant = source.data.get("quant")
    for override in overrides:
        if not isinstance(quant, dict):
            notes.append(f"{override.variable} changes nothing here: the experiment has no quant section")
            continue
        keys = ("quant", *override.key.split("."))
        if override.key == "include":
            quant["layout"] = None
        if override.key == "row_rotation" and quant.get("method") not in ("weight_pca", "svd_hadamard"):
            notes.append(f"{override.variable} changes nothing here: only weight_pca and svd_hadamard rotate outputs")
            continue
        if override.key.startswith("calibration") and not isinstance(quant.get("calibration"), dict):
            notes.append(f"{override.variable} changes nothing here: quant.calibration names no data")
            continue
        replace(source, keys, override.value, Mark(f"{override.variable}={short(override.text)}"))
        notes.append(str(override))
    return notes


def _apply_sets(source: Source, sets: Iterable[str]) -> None:
    for text in sorted(
        sets, key=lambda text: "sha256" in text.partition("=")[0]
    ):  # a hash after the checkpoint it is for
        key, equals, value = text.partition("=")
        keys, word = todays_keys(key.strip())
        mark = Mark(f"--set {short(text)}", directory=Path.cwd(), word=word)
        if not equals or not all(keys):
            source.problems.append(Problem(mark, "should look like a.b=value"))
            continue
        try:
            replace(source, keys, parse(value), mark)
        except ValueError as error:
            source.problems.append(Problem(mark, str(error)))


def todays_keys(key: str) -> tuple[tuple[str, ...], str]:
    """`a.b` as keys, and the older word with which it began, if it did."""
    first, *rest = key.split(".")
    return (OLDER_WORDS.get(first, first), *rest), first if first in OLDER_WORDS else ""


def replace(source: Source, keys: tuple[str, ...], value: Any, mark: Mark) -> Location:
    """Put `value` at `keys`; everything in it was written at `mark`. Returns the place. Raises ValueError, as `put`."""
    arms = source.data.get("arms")
    if keys[0] == "arms" and len(keys) > 2 and isinstance(arms, list):  # a backend alone is an arm that can say more
        arms[:] = [
            {"name": arm, "backend": arm} if isinstance(arm, str) and str(i) == keys[1] else arm
            for i, arm in enumerate(arms)
        ]
    before = walk(source.data, keys)[0]
    old = list(locations(at(source.data, before))) if len(before) == len(keys) else []
    put(source.data, keys, value)
    place = walk(source.data, keys)[0]
    for inner in old:
        source.marks.pop((*place, *inner), None)
    source.marks[place] = mark
    return place


def at(data: Any, location: Location) -> Any:
    """The value at a location that exists."""
    for step in location:
        data = data[step]
    return data


# ---------------------------------------------------------------------------------------------------- paths, arms
def _resolve_paths(source: Source, check_files: bool) -> None:
    def visit(value: Any, at: Location, paths: Collection[Any]) -> None:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            here = (*at, key)
            if isinstance(inner, dict | list):
                visit(inner, here, paths)
            elif key in paths and inner == "":  # which would be the directory that somebody stands in
                problem = f"{dotted(here)}: is empty: write a path, or null for none"
                source.problems.append(Problem(mark_of(source, here), problem))
            elif key in paths and isinstance(inner, str):
                _resolve(source, value, here, check_files)

    policy = source.data.get("policy")
    of_policy = path_keys(policy.get("type")) if isinstance(policy, dict) else ()
    rooms = (("policy", of_policy), ("quant", PATH_KEYS), ("arms", PATH_KEYS), ("suite", SUITE_PATHS))
    for room, paths in rooms:
        if isinstance(source.data.get(room), dict | list):
            visit(source.data[room], (room,), paths)
    arms = source.data.get("arms")
    for i, entry in enumerate(arms if isinstance(arms, list) else ()):
        said = entry.get("policy") if isinstance(entry, dict) else None
        if isinstance(said, dict):
            kind = said.get("type", policy.get("type") if isinstance(policy, dict) else None)
            visit(said, ("arms", i, "policy"), path_keys(kind))


def _resolve(source: Source, around: dict[str | int, Any], here: Location, check_files: bool) -> None:
    """Make the path at `here` absolute. Variables are not expanded: a file means the same whoever reads it."""
    mark, written = mark_of(source, here), around[here[-1]]
    try:
        path = located(mark.directory, written)
    except ValueError as error:
        source.problems.append(Problem(mark, f"{dotted(here)}: {error}"))
        return
    around[here[-1]] = str(path)
    if (written.startswith("$") or check_files) and not os.path.exists(path):
        hint = f" (variables are not expanded here; on the command line the shell does: --set {dotted(here)}=…)"
        missing = f"no such file or directory: {short(display(path), 300)}"
        source.problems.append(Problem(mark, f"{dotted(here)}: {missing}{hint if '$' in written else ''}"))


def known_backends() -> tuple[str, ...]:
    """What an arm's `backend` may be: the unquantized ones, `auto`, and every kernel."""
    return (*UNQUANTIZED_BACKENDS, "auto", *names(KernelPlugin))


def _check_backends(source: Source) -> None:
    entries, known = source.data.get("arms"), known_backends()
    for i, entry in enumerate(entries if isinstance(entries, list) else ()):
        name = entry.get("backend") if isinstance(entry, dict) else entry
        if isinstance(name, str) and name not in known:
            here: Location = ("arms", i, "backend") if isinstance(entry, dict) else ("arms", i)
            try:
                get(KernelPlugin, name)
            except UnknownPlugin:
                message = f"unknown backend; known are {', '.join(known)} (got {shown(name)})"
                message += backend_hint(name, known)
            except UserError as problem:
                message = str(problem)
            else:
                continue
            source.problems.append(Problem(mark_of(source, here), f"{dotted(here)}: {message}"))
