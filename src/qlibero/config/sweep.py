"""A sweep file → its cells, each a validated `Experiment`.

A sweep is an experiment file with `grid:` (dotted key → list of values; every combination is a cell), `exclude:`
(combinations to leave out) and `cells:` (further cells by name). The expansion is ours, so no server is needed and
the same file gives the same cell ids everywhere. An experiment file without these keys is a sweep of one cell.
The key `extends` may be an axis too: each value names a file laid over the experiment, e.g. one policy after another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from dataclasses import replace as marked
from itertools import product
from pathlib import Path
from typing import Any

from qlibero.config.explain import mark_of
from qlibero.config.labels import axes_id, setting_label
from qlibero.config.load import MAX_SHOWN, SWEEP_KEYS, ConfigError, call, finish, replace, todays_keys
from qlibero.config.schema import Experiment
from qlibero.config.vocabulary import did_you_mean
from qlibero.config.yaml_source import copied, extended, overlay, read
from qlibero.config.yaml_text import Location, Problem, Source, locations, short, shown
from qlibero.console import count_text
from qlibero.documents import JsonObject

MAX_CELLS = 10_000


@dataclass(frozen=True)
class SweepCell:
    """One experiment of a sweep. `axes` are the (key, label) pairs that make it differ from the others."""

    id: str
    axes: tuple[tuple[str, str], ...]
    experiment: Experiment


@dataclass(frozen=True)
class Sweep:
    """All cells, in the order of the file: the last axis varies fastest, then the named cells."""

    name: str
    cells: tuple[SweepCell, ...]


@dataclass(frozen=True)
class _Choice:
    key: str
    value: Any
    at: Location  # where the value stands in the sweep file

    @property
    def label(self) -> str:
        return setting_label(self.key, self.value, stem=self.key == "extends")


def load_sweep(
    path: str | Path,
    sets: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    check_files: bool = True,
) -> Sweep:
    """Read a sweep (or experiment) file and validate every cell. `sets` apply to all cells. Raises ConfigError."""
    path, sets, environ = Path(path), tuple(sets), os.environ if environ is None else environ
    file = read(path)
    if file.problems:
        raise ConfigError(file.problems)
    names = [text.removeprefix("name=") for text in sets if text.startswith("name=")]
    call(file, names[-1] if names else file.data.get("name", path.stem), sets, environ)
    own = {key: file.data.pop(key) for key in SWEEP_KEYS if key in file.data}
    combinations = _combinations(own, file) if own else [("", ())]
    sets = tuple(text for text in sets if not text.startswith("name="))  # it named the whole sweep
    base = Source(file.data, {here: mark for here, mark in file.marks.items() if here[:1] not in {(k,) for k in own}})
    told: set[str] = set()  # a variable is told of once, not once per cell
    cells: list[SweepCell] = []
    problems: dict[Problem, None] = {}
    known: dict[Path, Source] = {}
    for cell_id, choices in combinations:
        source = Source(copied(base.data), dict(base.marks))
        name = source.data["name"]
        for choice in choices:
            _choose(source, choice, file, path.parent, known)
        if cell_id:
            source.data["name"] = f"{name}.{cell_id}"
        try:
            experiment = finish(source, sets, environ, check_files, told)
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems))
            if len(problems) > MAX_SHOWN:
                break
            continue
        cells.append(SweepCell(cell_id or experiment.name, tuple((c.key, c.label) for c in choices), experiment))
    if problems:
        raise ConfigError(problems)
    return Sweep(str(base.data["name"]), tuple(cells))


def _fail(file: Source, at: Location, message: str) -> ConfigError:
    return ConfigError([Problem(mark_of(file, at), message)])


def _combinations(own: JsonObject, file: Source) -> list[tuple[str, tuple[_Choice, ...]]]:
    """(id, choices) of every cell, the grid's without the excluded ones and then the named."""
    grid, named = own.get("grid") or {}, own.get("cells") or {}
    if not isinstance(grid, dict) or not isinstance(named, dict):
        wrong = "cells" if isinstance(grid, dict) else "grid"
        raise _fail(file, (wrong,), f"{wrong}: should be `key: …` lines")
    grid_cells = _without(own.get("exclude") or [], _product(grid, file), grid, file)
    result = [(axes_id([(c.key, c.label) for c in choices]), choices) for choices in grid_cells]
    result += [_named(name, settings, file) for name, settings in named.items()]
    seen: dict[str, str] = {}
    for cell_id, choices in result:
        known = seen.setdefault(cell_id.casefold(), cell_id)  # not every disk tells case apart
        if known is not cell_id:
            message = f"two cells are called {cell_id}" + (f" ({known})" if known != cell_id else "")
            raise _fail(file, choices[-1].at if choices else ("cells",), message)
    if not result:
        raise _fail(file, ("grid",), "no cell is left; a sweep needs grid: or cells:")
    return result


def _product(grid: JsonObject, file: Source) -> list[tuple[_Choice, ...]]:
    total = 1
    for key, values in grid.items():
        if key == "name":
            raise _fail(file, ("grid", key), "grid.name: a cell is named after its axes; leave this one out")
        if not isinstance(values, list) or not values:
            raise _fail(file, ("grid", key), f"grid.{short(key)}: should be a list of values (got {shown(values)})")
        total *= len(values)
    if total > MAX_CELLS:
        raise _fail(file, ("grid",), f"grid: {count_text(total, 'cell')}; the most is {MAX_CELLS:,}")
    axes = [[_Choice(key, value, ("grid", key, i)) for i, value in enumerate(values)] for key, values in grid.items()]
    return list(product(*axes)) if axes else []


def _without(
    exclude: Any, combinations: list[tuple[_Choice, ...]], grid: JsonObject, file: Source
) -> list[tuple[_Choice, ...]]:
    """The combinations that no rule of `exclude` names."""
    if not isinstance(exclude, list):
        raise _fail(file, ("exclude",), "exclude: should be a list of {key: value} mappings")
    for i, rule in enumerate(exclude):
        if not isinstance(rule, dict) or not rule:
            raise _fail(file, ("exclude", i), f"exclude.{i}: should be a {{key: value}} mapping (got {shown(rule)})")
        for key in rule:
            if key not in grid:
                axes = f"{short(', '.join(grid), 200)}){did_you_mean(key, grid)}"
                raise _fail(file, ("exclude", i, key), f"exclude.{i}.{short(key)}: is no axis of grid ({axes}")
        kept = [choices for choices in combinations if not all(_matches(c, rule) for c in choices if c.key in rule)]
        if len(kept) == len(combinations):
            raise _fail(file, ("exclude", i), f"exclude.{i}: matches no cell; check its values against grid")
        combinations = kept
    return combinations


def _named(name: str, settings: Any, file: Source) -> tuple[str, tuple[_Choice, ...]]:
    here = ("cells", name)
    if not isinstance(settings, dict):
        raise _fail(file, here, f"cells.{short(name)}: should be `key: value` lines (got {shown(settings)})")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,79}", name):
        raise _fail(file, here, f"cells.{short(name)}: a cell's name is letters, digits and . _ + -, 80 at most")
    if "name" in settings:
        raise _fail(file, (*here, "name"), f"cells.{name}.name: the cell is called {name} already; leave this out")
    return name, tuple(_Choice(key, value, (*here, key)) for key, value in settings.items())


def _choose(source: Source, choice: _Choice, file: Source, directory: Path, known: dict[Path, Source]) -> None:
    """Lay one choice over the cell."""
    mark = mark_of(file, choice.at)
    if choice.key == "extends":
        files = choice.value if isinstance(choice.value, list) else [choice.value]
        if not files or not all(isinstance(name, str) for name in files):
            message = f"extends: should be a file or a list of files (got {shown(choice.value)})"
            source.problems.append(Problem(mark, message))
            return
        for name in files:
            overlay(source, extended(directory, name, mark, (), known))
        return
    keys, word = todays_keys(choice.key)
    mark = marked(mark, word=word)
    try:
        place = replace(source, keys, copied(choice.value), mark)
    except ValueError as error:
        source.problems.append(Problem(mark, f"{short(choice.key)}: {error}"))
        return
    for inner in locations(choice.value):
        source.marks[(*place, *inner)] = marked(mark_of(file, (*choice.at, *inner)), word=word)


def _matches(choice: _Choice, rule: JsonObject) -> bool:
    wanted = rule[choice.key]
    return bool(choice.value == wanted) or (isinstance(wanted, list) and choice.value in wanted)
