"""An arm with `grid:` stands for one arm of every combination, as a sweep's grid stands for its cells.

    arms:
      - baseline
      - {name: steps, grid: {policy.flow_steps: [1, 2, 4]}}      # steps.flow_steps-1, steps.flow_steps-2, …

Expanded before validation, with the place of every value, so that a mistake in one is told where it was written.
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

from qlibero.config.labels import axes_id, setting_label
from qlibero.config.yaml_source import copied, put
from qlibero.config.yaml_text import Location, Mark, Problem, Source, locations, short, shown
from qlibero.documents import JsonObject

MAX_ARMS = 200  # of one grid; a scene is run once for each


def expand_arms(source: Source) -> None:
    """Put the arms of every grid in the place of its entry, and their values' marks with them, in place."""
    entries = source.data.get("arms")
    if not isinstance(entries, list) or not any(isinstance(entry, dict) and "grid" in entry for entry in entries):
        return
    below = {here[1:]: mark for here, mark in source.marks.items() if here[:1] == ("arms",) and len(here) > 1}
    expanded: list[tuple[Any, dict[Location, Mark]]] = []
    for i, entry in enumerate(entries):
        marks = {here[1:]: mark for here, mark in below.items() if here[0] == i}
        if isinstance(entry, dict) and "grid" in entry:
            expanded += _arms_of(entry, marks, i, source)
        else:
            expanded.append((entry, marks))
    source.data["arms"] = [entry for entry, _ in expanded]
    source.marks = {here: mark for here, mark in source.marks.items() if here[:1] != ("arms",) or len(here) == 1}
    source.marks |= {("arms", i, *here): mark for i, (_, marks) in enumerate(expanded) for here, mark in marks.items()}


def _arms_of(
    entry: JsonObject, marks: dict[Location, Mark], place: int, source: Source
) -> list[tuple[Any, dict[Location, Mark]]]:
    grid = entry["grid"]

    def refuse(at: Location, message: str) -> None:
        while at not in marks and at:
            at = at[:-1]
        source.problems.append(Problem(marks.get(at, Mark("?")), f"arms.{place}.{message}"))

    if not isinstance(grid, dict) or not grid:
        refuse(("grid",), f"grid: should be `key: [values]` lines (got {shown(grid)})")
        return []
    wrong = [(key, values) for key, values in grid.items() if not isinstance(values, list) or not values]
    for key, values in wrong:
        refuse(("grid", key), f"grid.{short(key)}: should be a list of values (got {shown(values)})")
    if "name" in grid:
        refuse(("grid", "name"), "grid.name: an arm of a grid is named after its values; leave this one out")
    if not wrong and (count := prod(map(len, grid.values()))) > MAX_ARMS:
        refuse(("grid",), f"grid: {count:,} arms; the most is {MAX_ARMS}")
        return []
    if wrong or "name" in grid:
        return []
    own = {key: value for key, value in entry.items() if key != "grid"}
    kept = {here: mark for here, mark in marks.items() if here[:1] != ("grid",)}
    prefix = own.get("name") or own.get("backend")
    found = []
    for choices in product(*([(key, k, value) for k, value in enumerate(values)] for key, values in grid.items())):
        arm, of_arm = copied(own), dict(kept)
        label = axes_id([(key, setting_label(key, value, stem=_is_path(value))) for key, _, value in choices])
        arm["name"] = f"{prefix}.{label}" if prefix else label
        of_arm.setdefault(("name",), marks.get((), Mark("?")))
        for key, k, value in choices:
            keys = tuple(key.split("."))
            try:
                put(arm, keys, copied(value))
            except ValueError as error:
                refuse(("grid", key), f"grid.{short(key)}: {error}")
                return []
            for inner in locations(value):
                at: Location = ("grid", key, k, *inner)
                of_arm[(*keys, *inner)] = marks.get(at, marks.get(at[:3], Mark("?")))
        found.append((arm, of_arm))
    return found


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and "/" in value
