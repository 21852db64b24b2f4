"""Paired differences as a forest plot, with every number behind them."""

from __future__ import annotations

from typing import Any

from qlibero.registry import SectionPlugin
from qlibero.reporting.html import charts
from qlibero.reporting.html.markup import Markup, el
from qlibero.reporting.html.report_data import ReportData
from qlibero.reporting.html.sections import parts
from qlibero.reporting.html.sections.parts import named, numbers, section
from qlibero.reporting.html.sections.standing import standing
from qlibero.results.comparison import Estimate, Row
from qlibero.results.wording import delta_text, interval_text, margin_text, p_text, points
from qlibero.stats.proportions import Interval
from qlibero.stats.sampling import population

PLUGIN = SectionPlugin("differences", "paired differences", provides="differences", order=30)


def difference_scale(m: ReportData) -> charts.Scale:
    ends = [x for r in m.compared.values() if r.estimate for x in r.estimate.interval]
    margins = [m.margin_of(name) for name in m.compared]
    return charts.scale_over(ends or [0.0], include=(-max(margins), 0.0, max(margins)))


def difference(m: ReportData, name: str, row: Row, found: Estimate, scale: charts.Scale) -> Markup:
    """One arm's difference (or that of one suite, `row`) on its strip, with its cell's margin and noise band."""
    low, high = found.interval
    t95 = row.over_new_tasks
    floor, margin = m.floor_of(name), m.margin_of(name)
    control = m.arms[name].is_control
    label = (
        f"Δ {points(found.delta)} pp, 95 % interval {points(low)} to {points(high)} pp, margin {margin_text(margin)}"
    )
    return charts.track(
        charts.interval(scale, *floor.band(row.table.pairs), kind="floor") if floor else None,
        None if control else charts.interval(scale, scale.low, -margin, kind="beyond"),
        None if control else charts.mark(scale, -margin, "margin"),
        charts.mark(scale, 0, "zero"),
        charts.interval(scale, *t95, kind="wide", colour=m.colour(name)) if t95 and not control else None,
        charts.interval(scale, low, high, "ci", m.colour(name)),
        charts.mark(scale, found.delta, "dot", m.colour(name)),
        label=label,
        class_="track tall",
    )


def differences(m: ReportData) -> Markup | None:
    if not m.compared:
        return None
    drawn, figures = [], []
    scale = difference_scale(m)
    for name, r in m.compared.items():
        suites = r.suites if len(r.suites) > 1 else {}
        for title, row in (("noise floor" if r.control else "", r), *r.axes.items(), *suites.items()):
            if row.estimate is None:
                continue
            margin = m.margin_of(name)
            text = f"{delta_text(*row.estimate, margin)} {interval_text(row.estimate.interval, margin)}"
            strip = parts.lane(difference(m, name, row, row.estimate, scale), text)
            drawn.append(parts.row(named(m, name, el("small", title) if title else None), strip))
        figures += [_figures(m, name, suite, row) for suite, row in r.suites.items()]
    tasks = [
        [
            named(m, name),
            f"{t.suite} {t.task}",
            t.table.pairs,
            t.table.broken,
            t.table.repaired,
            _points(t.table.delta, 1),
            _pp(t.table.tango95),
        ]
        for name, r in m.compared.items()
        for t in r.tasks
    ]
    references = dict.fromkeys(m.reference_of(name).label for name in m.compared)
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
        lead=f"Arm minus {reference} on the same episodes. Thick bars: the 95 % interval on which verdicts rest, for "
        f"{_asked(m)} (unadjusted; Holm-adjusted p-values are in the table). "
        f"Thin lines: for new tasks like these. Dashed line: the margin, {m.margins}."
        + (
            " Grey band: where 95 % of reruns lie when nothing but rounding differs (A/A)."
            if any(map(m.floor_of, m.compared))
            else ""
        ),
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
    "new tasks 95 %",
    "verdict",
]


def _asked(m: ReportData) -> str:
    found = {
        population(part.comparison.question.estimand, len(m.tasks_of(part.arms))) for part in m.parts if part.comparison
    }
    return next(iter(found)) if len(found) == 1 else "the question of their cell"


def _figures(m: ReportData, name: str, suite: str, row: Row) -> list[Any]:
    """A line of the table, in the order of FIGURES. A control is no hypothesis, so it has no verdict and no Holm."""
    arm, t, adjusted = m.compared[name], row.table, row.adjusted
    word = standing(arm).word if arm.control or len(arm.suites) == 1 else row.verdict.text
    return [
        named(m, name),
        suite,
        t.pairs,
        t.both_succeed,
        t.broken,
        t.repaired,
        t.both_fail,
        _points(row.delta, 2),
        _pp(t.tango95),
        _pp(t.newcombe95),
        p_text(t.mcnemar_p),
        p_text(adjusted.mcnemar_p) if adjusted else "–",
        "–" if row.noninferiority_p is None else p_text(row.noninferiority_p),
        p_text(adjusted.noninferiority_p) if adjusted and row.noninferiority_p is not None else "–",
        _pp(row.over_new_tasks),
        word,
    ]


def _tick(delta: float) -> str:
    return "0" if abs(delta) < 1e-9 else points(delta, 0 if abs(100 * delta - round(100 * delta)) < 1e-6 else 1)


def _points(delta: float | None, digits: int) -> str:
    return "–" if delta is None else points(delta, digits)


def _pp(interval: Interval | None) -> str:
    return f"[{points(interval[0], 2)}, {points(interval[1], 2)}]" if interval else "–"
