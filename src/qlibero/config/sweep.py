"""A sweep file → its cells, each a validated `Experiment`.

A sweep is an experiment file with `grid:` (dotted key → list of values; every combination is a cell), `exclude:`
(combinations to leave out) and `cells:` (further cells by name). The expansion is ours, so no server is needed and
the same file gives the same cell ids everywhere. An experiment file without these keys is a sweep of one cell.
The key `extends` may be an axis too: each value names a file laid over the experiment, e.g. one policy after another.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

from qlibero.config.labels import axes_id, suffix_of_sets, value_label
from qlibero.config.load import SWEEP_KEYS, ConfigError, _effective, _say, finish
from qlibero.config.schema import Experiment
from qlibero.config.yaml_source import Location, Mark, Problem, Source, overlay, put, read

MOST_CELLS = 10_000


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
        return value_label(self.value, stem=self.key == "extends")


def load_sweep(
    path: str | Path,
    sets: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    announce: Callable[[str], None] = _say,
    check_files: bool = True,
) -> Sweep:
    """Read a sweep (or experiment) file and validate every cell. `sets` apply to all cells. Raises ConfigError."""
    path, sets, environ = Path(path), tuple(sets), os.environ if environ is None else environ
    base = read(path)
    if base.problems:
        raise ConfigError(base.problems)
    base.data.setdefault("name", path.stem)
    for text in sets:
        if text.startswith("name="):
            base.data["name"] = text.removeprefix("name=")
    base.data["name"] = f"{base.data['name']}{suffix_of_sets(sets, _effective(base, environ))}"
    own = {key: base.data.pop(key) for key in SWEEP_KEYS if key in base.data}
    combinations = _combinations(own, base) if own else [("", ())]
    sets = tuple(text for text in sets if not text.startswith("name="))  # it named the whole sweep
    heard: set[str] = set()  # a variable is announced once, not once per cell

    def announce_once(line: str) -> None:
        if line not in heard:
            heard.add(line)
            announce(line)

    cells, problems = [], []
    for cell_id, choices in combinations:
        source = copy.deepcopy(base)
        name = source.data["name"]
        for choice in choices:
            _choose(source, choice, base, path.resolve().parent)
        if cell_id:
            source.data["name"] = f"{name}.{cell_id}"
        try:
            experiment = finish(source, sets, environ, announce_once, check_files)
        except ConfigError as error:
            problems += error.problems
            continue
        cells.append(SweepCell(cell_id or experiment.name, tuple((c.key, c.label) for c in choices), experiment))
    if problems:
        raise ConfigError(problems)
    return Sweep(str(base.data["name"]), tuple(cells))


def _combinations(own: dict[str, Any], base: Source) -> list[tuple[str, tuple[_Choice, ...]]]:
    def fail(at: Location, message: str) -> ConfigError:
        while at not in base.marks and at:
            at = at[:-1]
        return ConfigError([Problem(base.marks.get(at, Mark("?")), message)])

    grid, exclude, named = own.get("grid") or {}, own.get("exclude") or [], own.get("cells") or {}
    if not isinstance(grid, dict) or not isinstance(named, dict):
        wrong = "cells" if isinstance(grid, dict) else "grid"
        raise fail((wrong,), f"{wrong}: should be `key: …` lines")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise fail(("grid", key), f"grid.{key}: should be a list of values (got {values!r})")
    total = 1
    for values in grid.values():
        total *= len(values)
    if total > MOST_CELLS:
        raise fail(("grid",), f"grid: {total} cells; the most is {MOST_CELLS}")
    axes = [[_Choice(key, value, ("grid", key, i)) for i, value in enumerate(values)] for key, values in grid.items()]
    combinations = [choices for choices in product(*axes)] if axes else []
    if not isinstance(exclude, list):
        raise fail(("exclude",), "exclude: should be a list of {key: value} mappings")
    for i, rule in enumerate(exclude):
        if not isinstance(rule, dict) or not rule:
            raise fail(("exclude", i), f"exclude.{i}: should be a {{key: value}} mapping (got {rule!r})")
        for key in rule:
            if key not in grid:
                close = get_close_matches(key, list(grid), n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise fail(("exclude", i, key), f"exclude.{i}.{key}: is no axis of grid ({', '.join(grid)}){hint}")
        kept = [choices for choices in combinations if not all(_matches(c, rule) for c in choices if c.key in rule)]
        if len(kept) == len(combinations):
            raise fail(("exclude", i), f"exclude.{i}: matches no cell; check its values against grid")
        combinations = kept
    result = [(axes_id([(c.key, c.label) for c in choices]), choices) for choices in combinations]
    for name, settings in named.items():
        if not isinstance(settings, dict):
            raise fail(("cells", name), f"cells.{name}: should be `key: value` lines (got {settings!r})")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise fail(("cells", name), f"cells.{name}: a cell's name is letters, digits and . _ + -")
        result.append((name, tuple(_Choice(key, value, ("cells", name, key)) for key, value in settings.items())))
    seen: set[str] = set()
    for cell_id, choices in result:
        if cell_id in seen:
            raise fail(choices[-1].at if choices else ("cells",), f"two cells are called {cell_id}")
        seen.add(cell_id)
    if not result:
        raise fail(("grid",), "no cell is left; a sweep needs grid: or cells:")
    return result


def _choose(source: Source, choice: _Choice, base: Source, directory: Path) -> None:
    if choice.key == "extends":
        for parent in [choice.value] if isinstance(choice.value, str) else choice.value:
            overlay(source, read(directory / str(parent)))
        return
    keys = tuple(choice.key.split("."))
    try:
        put(source.data, keys, copy.deepcopy(choice.value))
    except ValueError as error:
        source.problems.append(Problem(base.marks[choice.at], f"{choice.key}: {error}"))
        return
    for known in [known for known in source.marks if known[: len(keys)] == keys]:
        del source.marks[known]
    for known, mark in base.marks.items():
        if known[: len(choice.at)] == choice.at:
            source.marks[(*keys, *known[len(choice.at) :])] = mark


def _matches(choice: _Choice, rule: dict[str, Any]) -> bool:
    wanted = rule[choice.key]
    return choice.value == wanted or (isinstance(wanted, list) and choice.value in wanted)
