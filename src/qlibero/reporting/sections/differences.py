"""Paired differences as a forest plot, with every number behind them."""

from __future__ import annotations

from typing import Any

from qlibero.reporting import charts
from qlibero.reporting.markup import Markup, el
from qlibero.reporting.material import Material
from qlibero.reporting.sections import parts
from qlibero.reporting.sections.parts import named, numbers, section
from qlibero.reporting.sections.standing import standing
from qlibero.results.phrases import margin_text, p_text, points


def difference_scale(m: Material) -> charts.Scale:
    ends = [x for r in m.compared.values() if r["pairs"] for x in (*r["tango95"], *(r["clusters"]["t95"] or ()))]
    margins = [m.margin_of(name) for name in m.compared]
    return charts.scale_over(ends or [0.0], include=(-max(margins), 0.0, max(margins)))


def difference(m: Material, name: str, row: dict[str, Any], scale: charts.Scale) -> Markup:
    """One arm's difference (or that of one suite, `row`) on its strip, with its cell's margin and noise floor."""
    low, high = row["tango95"]
    t95 = row["clusters"]["t95"] if "clusters" in row else None
    floor, margin = m.floor_of(name), m.margin_of(name)
    control = m.arms[name].is_control
    label = (
        f"Δ {points(row['delta'])} pp, 95 % interval {points(low)} to {points(high)} pp, margin {margin_text(margin)}"
    )
    return charts.track(
        charts.interval(scale, *floor["tango95"], kind="floor") if floor else None,
        None if control else charts.interval(scale, scale.low, -margin, kind="beyond"),
        None if control else charts.mark(scale, -margin, "margin"),
        charts.mark(scale, 0, "zero"),
        charts.interval(scale, *t95, kind="wide", colour=m.colour(name)) if t95 and not control else None,
        charts.interval(scale, low, high, "ci", m.colour(name)),
        charts.mark(scale, row["delta"], "dot", m.colour(name)),
        label=label,
        class_="track tall",
    )


def differences(m: Material) -> Markup | None:
    if not m.compared:
        return None
    drawn, figures = [], []
    scale = difference_scale(m)
    for name, r in m.compared.items():
        if not r["pairs"]:
            continue
        suites = r["suites"] if len(r["suites"]) > 1 else {}
        for title, row in (("noise floor" if r["control"] else "", r), *suites.items()):
            low, high = row["tango95"]
            strip = parts.lane(
                difference(m, name, row, scale), f"{points(row['delta'])} [{points(low)}, {points(high)}]"
            )
            drawn.append(parts.row(named(m, name, el("small", title) if title else None), strip))
        figures += [_figures(m, name, suite, row) for suite, row in r["suites"].items()]
    tasks = [
        [
            named(m, name),
            f"{t['suite']} {t['task']}",
            t["pairs"],
            t["broken"],
            t["repaired"],
            points(t["delta"]),
            _pp(t["tango95"]),
        ]
        for name, r in m.compared.items()
        for t in r["tasks"]
    ]
    references = dict.fromkeys(m.arms[part.reference].label for part in m.parts if part.comparison)
    reference = next(iter(references)) if len(references) == 1 else "the reference of its cell"
    return section(
        "differences",
        "Paired differences",
        parts.rows(drawn, axis=charts.axis(scale, "Δ success, percentage points", _tick), wide=True),
        numbers("2×2 tables, intervals and p-values", FIGURES, figures, stacked=True),
        numbers(
            "By task (descriptive)",
            ["arm", "task", "pairs", "broken", "repaired", "Δ pp", "Tango 95 %"],
            tasks,
            sortable=True,
        ),
        lead=f"Arm minus {reference} on the same episodes. Thick bars: 95 % Tango interval for these tasks "
        "(unadjusted; p-values are Holm-adjusted over arms × suites in the table), on which verdicts rest. "
        "Thin lines: t interval over the tasks' own differences, for tasks like these; it answers another question "
        "from few values, and being narrower makes it no better evidence. "
        f"Dashed line: the margin, {m.margins}."
        + (" Grey band: the noise floor (A/A)." if any(map(m.floor_of, m.compared)) else ""),
    )


FIGURES = [
    "arm",
    "suite",
    "pairs",
    "both succeed",
    "broken",
    "repaired",
    "both fail",
    "Δ pp",
    "Tango 95 %",
    "Newcombe 95 %",
    "McNemar",
    "McNemar, Holm",
    "non-inferiority",
    "non-inferiority, Holm",
    "tasks: t 95 %",
    "tasks: bootstrap 95 %",
    "verdict",
]


def _figures(m: Material, name: str, suite: str, row: dict[str, Any]) -> list[Any]:
    """A line of the table, in the order of FIGURES. A control is no hypothesis, so it has no verdict and no Holm."""
    result = m.compared[name]
    word = row["verdict"]
    if result["control"] or len(result["suites"]) == 1:  # the arm's own: errors, sequential tests and Holm count there
        word = standing(result).word
    return [
        named(m, name),
        suite,
        row["pairs"],
        row["both_succeed"],
        row["broken"],
        row["repaired"],
        row["both_fail"],
        points(row["delta"], 2),
        _pp(row["tango95"]),
        _pp(row["newcombe95"]),
        p_text(row["mcnemar_p"]),
        _p(row, "mcnemar_p_holm"),
        "–" if result["control"] else p_text(row["noninferiority_p"]),
        _p(row, "noninferiority_p_holm"),
        _pp(row["clusters"]["t95"]),
        _pp(row["clusters"]["bootstrap95"]),
        word,
    ]


def _p(row: dict[str, Any], name: str) -> str:
    """Absent for a control, None where a stopping rule leaves nothing to adjust."""
    p = row.get(name)
    return "–" if p is None else p_text(p)


def _tick(delta: float) -> str:
    return "0" if abs(delta) < 1e-9 else points(delta, 0 if abs(100 * delta - round(100 * delta)) < 1e-6 else 1)


def _pp(interval: list[float] | None) -> str:
    return f"[{points(interval[0], 2)}, {points(interval[1], 2)}]" if interval else "–"
