"""Which episodes flipped: a map of tasks and initial states for every arm."""

from __future__ import annotations

from collections import Counter

from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.episode_key import OFFICIAL, EpisodeKey
from qlibero.registry import SectionPlugin
from qlibero.reporting.html.markup import Markup, el
from qlibero.reporting.html.report_data import Part, ReportData
from qlibero.reporting.html.sections.parts import named, section

PLUGIN = SectionPlugin("flips", "which episodes flipped", provides="flips", order=40)

CODES = {
    ("success", "success"): "s",
    ("failure", "failure"): "f",
    ("success", "failure"): "b",
    ("failure", "success"): "r",
}

LONGEST_LINE = 100
"""Cells in a line of a map: what has more is folded, a line for each seed where that fits."""


def flip_data(m: ReportData) -> JsonObject:
    """What the page's script knows of the maps.

    {"cells": [{"tasks": […], "keys": […], "columns": […], "line": number of cells in a line}],
     "arms": {id: {"cell": index, "rows": […]}}}
    """
    shown = [part for part in m.parts if part.compared]
    return {
        "cells": [
            {
                "tasks": [_task(m, suite, task) for suite, task in m.tasks_of(part.arms)],
                "keys": m.tasks_of(part.arms),
                "columns": [
                    (EpisodeKey("", 0, init, seed, inits).init_name, seed)
                    for inits, seed, init in flip_columns(m, part)
                ],
                "line": line_of(flip_columns(m, part)),
            }
            for part in shown
        ],
        "arms": {
            name: {"cell": i, "rows": flip_rows(m, part, name)}
            for i, part in enumerate(shown)
            for name in part.compared
        },
    }


def _task(m: ReportData, suite: str, task: int) -> str:
    told = m.instruction(suite, task)
    return f"{suite} task {task}" + (f" “{told}”" if told else "")


def flip_rows(m: ReportData, part: Part, arm: str) -> list[str]:
    """Per task a string with one letter per initial state: s both succeed, f both fail, b broken, r repaired,
    e error, u unpaired, · not run."""
    unpaired, sides = m.compared[arm].unpaired, (m.reference_of(arm), m.arms[arm])
    columns = flip_columns(m, part)
    rows = []
    for suite, task in m.tasks_of(part.arms):
        row = []
        for inits, seed, init in columns:
            key = EpisodeKey(suite, task, init, seed, inits)
            left, right = (side.records.get(key) for side in sides)
            if left is None or right is None:
                row.append("u" if left or right else "·")
            elif str(key) in unpaired:
                row.append("u")
            else:
                row.append(CODES.get((left.outcome, right.outcome), "e"))
        rows.append("".join(row))
    return rows


def flip_columns(m: ReportData, part: Part) -> list[tuple[str, int, int]]:
    """(kind of initial states, seed, initial state): official ones first."""
    found = {(key.inits, key.seed, key.init) for name in part.arms for key in m.arms[name].records}
    return sorted(found, key=lambda column: (column[0] != OFFICIAL, *column))


def line_of(columns: list[tuple[str, int, int]]) -> int:
    """Cells in a line: those of one seed where every seed has as many, else as many as fit."""
    seeds = Counter(column[:2] for column in columns)
    each = set(seeds.values())
    fits = len(seeds) > 1 and len(each) == 1 and max(each) <= LONGEST_LINE
    return each.pop() if fits else min(len(columns), LONGEST_LINE)


def _columns_text(columns: list[tuple[str, int, int]]) -> str:
    """What the columns are, left to right: `initial state 0 … 49, then fresh 0 … 19`."""
    kinds = list(dict.fromkeys(inits for inits, _, _ in columns))
    spans = [f"0 … {max(init for inits, _, init in columns if inits == kind)}" for kind in kinds]
    named = [span if kind == OFFICIAL else f"{kind} {span}" for kind, span in zip(kinds, spans, strict=True)]
    folded = ", folded" if line_of(columns) < len(columns) else ""
    return f"initial state {', then '.join(named)}{folded}"


def flips(m: ReportData) -> Markup | None:
    if not m.compared:
        return None
    maps = []
    for name, r in m.compared.items():
        part = m.part_of(name)
        text = (
            f"Flips of {r.label}: {r.table.broken} broken, {r.table.repaired} repaired of "
            f"{count_text(r.table.pairs, 'pair')}. "
            "Arrow keys move, Enter plays a video."
        )
        columns = flip_columns(m, part)
        line = line_of(columns)
        lines = -(-len(columns) // line)
        labels = [el("span", str(task), style=f"--lines:{lines}") for _, task in m.tasks_of(part.arms)]
        grid = el(
            "div",
            el("div", labels, class_="rowlabels", aria_hidden="true"),
            _heat(flip_rows(m, part, name), line, text, name),
            el("div", _columns_text(columns), class_="axis-label"),
            class_="heat many" if lines > 3 else "heat",
        )
        floor = "noise floor: " if r.control else ""
        counts = el("small", f"{floor}{r.table.broken} broken ▼ {r.table.repaired} repaired ▲")
        maps.append(el("figure", el("figcaption", named(m, name, counts)), grid))
    key = [
        ("s", "both succeed"),
        ("b", "broken ▼"),
        ("r", "repaired ▲"),
        ("f", "both fail"),
        ("e", "error"),
        ("u", "unpaired or not run"),
    ]
    return section(
        "flips",
        "Flips: task × initial state",
        el(
            "ul",
            [el("li", el("span", class_=f"cell k-{code}", aria_hidden="true"), text) for code, text in key],
            class_="legend",
        ),
        el("div", maps, class_="maps"),
        el(
            "p",
            "Point at a cell, or focus a map and use the arrow keys.",
            class_="readout",
            id="flip-readout",
            aria_live="polite",
        ),
        lead="One cell per episode. "
        "A row of flips is a fragile task; a cell that flips in arm after arm is a hard initial state of its task "
        "(the same column of another task is another scene); scattered flips are noise.",
    )


def _heat(tasks: list[str], line: int, label: str, arm: str) -> Markup:
    """All cells of a kind in one path, so that 2,000 episodes are a few kilobytes. A task takes as many lines as it
    has cells for."""
    rows = [task[i : i + line] for task in tasks for i in range(0, len(task), line)]
    width, height = line, len(rows)
    cells: dict[str, list[str]] = {}
    for y, row in enumerate(rows):
        for x, code in enumerate(row):
            cells.setdefault(code, []).append(f"M{10 * x + 0.7:g} {10 * y + 0.7:g}h8.6v8.6h-8.6z")
    shapes = [el("path", d="".join(d), class_=f"k-{code if code != '·' else 'u'}") for code, d in sorted(cells.items())]
    arrows = {"b": "M{x} {y}h5l-2.5 4.5z", "r": "M{x} {y}l2.5 -4.5l2.5 4.5z", "e": "M{x} {y}l5 4.5"}
    for code, form in arrows.items():
        drawn = [
            form.format(x=f"{10 * x + 2.5:g}", y=f"{10 * y + (7.2 if code == 'r' else 2.8):g}")
            for y, row in enumerate(rows)
            for x, c in enumerate(row)
            if c == code
        ]
        if drawn:
            shapes.append(el("path", d="".join(drawn), class_=f"arrow a-{code}"))
    shapes.append(el("rect", class_="cursor", width=10, height=10, x=-20, y=0))
    return el(
        "svg",
        *shapes,
        viewBox=f"0 0 {10 * width} {10 * height}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
        tabindex="0",
        class_="heatmap",
        data_arm=arm,
        style=f"--rows:{height};max-width:{24 * width}px",
    )
