"""Success by task and arm, as intervals; the numbers in a table beneath."""

from __future__ import annotations

from qlibero.console import count_text
from qlibero.registry import SectionPlugin
from qlibero.reporting.html import charts
from qlibero.reporting.html.markup import Markup, el, join
from qlibero.reporting.html.report_data import ReportData
from qlibero.reporting.html.sections import parts
from qlibero.reporting.html.sections.parts import legend, numbers, section
from qlibero.results.records import EpisodeRecord
from qlibero.results.summary import counts
from qlibero.stats.proportions import wilson

PLUGIN = SectionPlugin("success", "success by task and arm", provides="success", order=20)


def success(m: ReportData) -> Markup:
    by_task: dict[str, dict[tuple[str, int], list[EpisodeRecord]]] = {}
    for name in m.arms:
        for record in m.records(name):
            by_task.setdefault(name, {}).setdefault((record.suite, record.task), []).append(record)
    many = len({suite for suite, _ in m.tasks}) > 1
    groups = [("all tasks", "", {name: m.records(name) for name in m.arms})]
    for suite, task in m.tasks:
        title = f"{suite} {task}" if many else f"task {task}"
        of_task = {name: found for name in m.arms if (found := by_task.get(name, {}).get((suite, task)))}
        groups.append((title, m.instruction(suite, task), of_task))
    lows = [_wilson(records)[0] for *_, arms in groups for records in arms.values() if _finished(records)]
    scale = charts.success_scale(lows)
    drawn: list[Markup] = []
    figures = []
    for title, told, arms in groups:
        lanes = [_lane(m, title, name, records, scale) for name, records in arms.items()]
        heading = [title, el("small", told, class_="told") if told else None]
        drawn.append(parts.row(heading, *lanes, class_="row" if drawn else "row total"))
        figures.append([title, *(_figure(arms.get(name, [])) for name in m.arms)])
    return section(
        "success",
        "Success by task and arm",
        legend(m),
        parts.rows(drawn, axis=charts.axis(scale, "success rate", lambda t: f"{100 * t:g} %")),
        numbers("Counts and Wilson intervals", ["task", *(a.label for a in m.arms.values())], figures),
        lead="Dots are success rates, bars 95 % Wilson intervals, numbers successes of finished episodes. "
        "Errors of the simulator are neither success nor failure and are left out of n. Single tasks are descriptive.",
    )


def _finished(records: list[EpisodeRecord]) -> int:
    return counts(records)[1]


def _wilson(records: list[EpisodeRecord]) -> tuple[float, float]:
    k, n, _ = counts(records)
    return wilson(k, n)


def _figure(records: list[EpisodeRecord]) -> str:
    k, n, errors = counts(records)
    if not n:
        return f"0 finished, {count_text(errors, 'error')}" if errors else "–"
    low, high = wilson(k, n)
    return f"{k}/{n} [{100 * low:.1f}, {100 * high:.1f}]" + (f", {errors} e" if errors else "")


def _lane(m: ReportData, title: str, name: str, records: list[EpisodeRecord], scale: charts.Scale) -> Markup:
    k, n, errors = counts(records)
    label = f"{title}, {m.arms[name].label}: {_figure(records)}"
    if not n:
        return parts.lane(charts.track(*charts.grid_lines(scale), label=label), "–")
    low, high = wilson(k, n)
    colour = m.colour(name)
    marks = (
        *charts.grid_lines(scale),
        charts.interval(scale, low, high, "ci", colour),
        charts.mark(scale, k / n, "dot", colour),
    )
    count = join(f"{k}/{n}", el("em", f" {errors} e") if errors else None)
    return parts.lane(charts.track(*marks, label=label), count, title=label)
