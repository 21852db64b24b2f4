"""Success against the latency that arms were executed with, and where the latency lies that each was measured to have:
the one chart in which speed and success meet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from qlibero.registry import SectionPlugin
from qlibero.reporting.html import charts
from qlibero.reporting.html.markup import Markup, el
from qlibero.reporting.html.report_data import ReportData
from qlibero.reporting.html.sections.parts import legend, named, numbers, section
from qlibero.results.arm_meta import ExecutionMeta
from qlibero.results.quality import control_steps
from qlibero.results.speed import is_simulation
from qlibero.results.summary import counts, summarize_arm
from qlibero.results.wording import delta_text, interval_text
from qlibero.stats.proportions import wilson

PLUGIN = SectionPlugin("delay", "success against the latency of execution", provides="delay", order=82)


def delay(m: ReportData) -> Markup | None:
    """None where every arm was waited for."""
    late = {name: said for name, arm in m.arms.items() if (said := arm.meta.execution) is not None}
    shown = [name for name in m.arms if counts(m.records(name))[1] and not m.arms[name].is_control]
    if not any(name in late for name in shown):
        return None
    shown.sort(key=lambda name: (name in late, late[name].latency_ms if name in late else 0.0))
    figures = []
    for name in shown:
        k, n, _ = counts(m.records(name))
        low, high = wilson(k, n)
        said = late.get(name)
        when = f"{said.latency_ms:g} ms late, {said.latency_steps} control steps" if said else "waited for"
        result = m.compared.get(name)
        paired = "–"
        if result is not None and (found := result.estimate) is not None:
            margin = result.verdict.margin
            paired = f"{delta_text(*found, margin)} {interval_text(found.interval, margin)}"
        wilson95 = f"[{100 * low:.1f}, {100 * high:.1f}]"
        figures.append([named(m, name), when, f"{k}/{n}", wilson95, paired, _own_text(m, name)])
    return section(
        "delay",
        "Success when nobody waits for the policy",
        _chart(m, late, shown),
        legend(m, shown, "legend under"),
        numbers(
            "The points", ["arm", "execution", "success", "Wilson 95 %", "Δ pp, 95 %", "its own call, p50"], figures
        ),
        lead="Late arms go on with the chunk they have while the policy thinks, in control steps of 50 ms; all else is "
        "as in their reference. Dots stand at the latency that an arm was executed with, lines join arms that differ "
        "in it alone, the band is the success of the reference, which is waited for. Ticks below the dots: the median "
        "call that each arm was measured to have on the machine of this run. Bars are Wilson intervals of single "
        "arms: the paired differences rank them.",
    )


def _chart(m: ReportData, late: Mapping[str, ExecutionMeta], shown: Sequence[str]) -> Markup:
    own = {name: ms for name in shown if (ms := _own_ms(m, name)) is not None}
    x = charts.scale_over([0.0, *(late[name].latency_ms for name in shown if name in late), *own.values()])
    success = {name: counts(m.records(name))[:2] for name in shown}
    y = charts.success_scale([wilson(*success[name])[0] for name in shown])
    marks, lines = [], dict[str, list[tuple[float, float]]]()
    for name in shown:
        k, n = success[name]
        low, high = wilson(k, n)
        colour = m.colour(name)
        if name not in late:
            marks.append(el("i", class_="band", style=f"bottom:{y(low)}%;height:{round(y(high) - y(low), 2)}%"))
            continue
        left = x(late[name].latency_ms)
        lines.setdefault(_else(m, name), []).append((left, 100 - y(k / n)))
        box = f"left:{left}%;bottom:{y(low)}%;height:{round(y(high) - y(low), 2)}%"
        marks.append(el("i", class_=f"vci {colour}", style=box))
        marks.append(
            el("i", class_=f"dot {colour}", style=f"left:{left}%;bottom:{y(k / n)}%", title=m.arms[name].label)
        )
    marks += [
        el("i", class_=f"own {m.colour(name)}", style=f"left:{x(ms)}%", title=f"{m.arms[name].label}: {ms:.1f} ms")
        for name, ms in own.items()
    ]
    text = "; ".join(
        f"{m.arms[name].label}: {success[name][0]}/{success[name][1]} at {late[name].latency_ms:g} ms"
        for name in shown
        if name in late
    )
    joined = (charts.curve(points, "front") for points in lines.values() if len(points) > 1)
    return charts.xy(
        [(100 - y(t), f"{100 * t:g} %") for t in y.ticks()],
        el("div", *charts.grid_lines(x), charts.plot(*joined, label=text, height=320), *marks, class_="canvas"),
        charts.axis(x, "latency of execution, milliseconds", lambda t: f"{t:g}"),
    )


def _else(m: ReportData, name: str) -> str:
    """What an arm is but for its latency: arms of which this is equal are one line."""
    result = m.compared.get(name)
    other = {what: sides[1] for what, sides in result.unlike.items() if what != "latency_steps"} if result else {}
    quant = m.arms[name].meta.quant
    return json.dumps([quant and quant.model_dump(mode="json"), other], sort_keys=True)


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
