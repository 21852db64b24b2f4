"""Success against the latency that arms were executed with, and where the latency lies that each was measured to have:
the one chart in which speed and success meet."""

from __future__ import annotations

from qlibero.registry import SectionPlugin
from qlibero.reporting.html import charts
from qlibero.reporting.html.markup import Markup, el
from qlibero.reporting.html.report_data import ReportData
from qlibero.reporting.html.sections import parts
from qlibero.reporting.html.sections.parts import named, numbers, section
from qlibero.results.quality import control_steps
from qlibero.results.speed import is_simulation
from qlibero.results.summary import counts, summarize_arm
from qlibero.stats.proportions import wilson

PLUGIN = SectionPlugin("delay", "success against the latency of execution", provides="delay", order=82)


def delay(m: ReportData) -> Markup | None:
    """None where every arm was waited for."""
    late = {name: said for name, arm in m.arms.items() if (said := arm.meta.execution) is not None}
    shown = [name for name in m.arms if counts(m.records(name))[1] and not m.arms[name].is_control]
    if not any(name in late for name in shown):
        return None
    shown.sort(key=lambda name: (name in late, late[name].latency_ms if name in late else 0.0))
    own = {name: _own_steps(m, name) for name in shown}
    lows = [_interval(m, name)[0] for name in shown]
    scale = charts.success_scale(lows)
    drawn, figures, placed = [], [], set()
    for name in shown:
        k, n, _ = counts(m.records(name))
        low, high = _interval(m, name)
        said = late.get(name)
        steps = said.latency_steps if said else None
        here = [m.arms[a].label for a, s in own.items() if s is not None and s == steps and a not in placed]
        placed |= {a for a, s in own.items() if s is not None and s == steps}
        when = f"{said.latency_ms:g} ms late, {steps} control steps" if said else "waited for"
        note = f"here lies the measured call of {', '.join(here)}" if here else None
        strip = charts.track(
            *charts.grid_lines(scale),
            charts.interval(scale, low, high, "ci", m.colour(name)),
            charts.mark(scale, k / n, "dot", m.colour(name)),
            label=f"{m.arms[name].label}, {when}: {k}/{n}",
        )
        title = named(m, name, el("small", when), el("small", note, class_="told") if note else None)
        drawn.append(parts.row(title, parts.lane(strip, f"{k}/{n}")))
        figures.append([named(m, name), when, f"{k}/{n}", f"[{100 * low:.1f}, {100 * high:.1f}]", _own_text(m, name)])
    return section(
        "delay",
        "Success when nobody waits for the policy",
        parts.rows(drawn, axis=charts.axis(scale, "success rate", lambda t: f"{100 * t:g} %")),
        numbers("The rows", ["arm", "execution", "success", "Wilson 95 %", "its own call, p50"], figures),
        lead="Late arms go on with the chunk they have while the policy thinks, in control steps of 50 ms; all else is "
        "as in their reference. Bars are Wilson intervals of single arms: the paired differences above rank them.",
    )


def _interval(m: ReportData, name: str) -> tuple[float, float]:
    k, n, _ = counts(m.records(name))
    return wilson(k, n)


def _own_ms(m: ReportData, name: str) -> float | None:
    """Median call of the arm as it ran; None where a simulation's time says nothing."""
    timed = summarize_arm(m.records(name)).latency_ms
    return timed.p50 if timed and not is_simulation(m.arms[name].meta) else None


def _own_steps(m: ReportData, name: str) -> int | None:
    ms = _own_ms(m, name)
    return None if ms is None else control_steps(ms)


def _own_text(m: ReportData, name: str) -> str:
    ms, steps = _own_ms(m, name), _own_steps(m, name)
    return "simulation: no speed claim" if ms is None else f"{ms:.1f} ms, {steps} steps"
