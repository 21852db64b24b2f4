"""Latency of policy calls: distributions, phases, warm-up, and where the rest of an episode's time goes."""

from __future__ import annotations

import numpy as np

from qlibero.console import count_text
from qlibero.registry import SectionPlugin
from qlibero.reporting.html import charts
from qlibero.reporting.html.markup import Markup, el, join
from qlibero.reporting.html.report_data import ReportData
from qlibero.reporting.html.sections import parts
from qlibero.reporting.html.sections.parts import legend, named, numbers, section
from qlibero.results.summary import percentiles, phase_calls, policy_calls

PLUGIN = SectionPlugin("latency", "latency of policy calls", provides="latency", order=70)


def latency(m: ReportData) -> Markup | None:
    calls = {name: policy_calls(m.records(name)) for name in m.arms}
    calls = {name: found for name, found in calls.items() if len(found)}
    if not calls:
        return None
    # one slow call in a thousand must not squeeze the rest into a line: what lies beyond is counted instead
    scale = charts.duration_scale([found.ms for found in calls.values()], 99.5)
    drawn = []
    for name, found in calls.items():
        p, values = percentiles(found), found.ms
        assert p is not None, "there are calls"
        beyond = int(np.count_nonzero(values > scale.high))
        text = " · ".join(f"{q} {_ms(ms)}" for q, ms in p._asdict().items())
        size = f"{count_text(round(found.count), 'call')}" + (f", {beyond} beyond the axis" if beyond else "")
        control = "; batches of another size" if m.arms[name].is_control else ""
        picture = el(
            "div",
            charts.plot(
                charts.curve(charts.density(values, scale, weights=found.weights), m.colour(name), filled=True),
                label=f"{m.arms[name].label}: {text} ms",
                height=46,
            ),
            *charts.grid_lines(scale, 7),
            *(charts.mark(scale, ms, "tick") for ms in p),
            class_="canvas short",
        )
        drawn.append(parts.row(named(m, name, el("small", size + control)), parts.lane(picture, text)))
    off = sum(int(np.count_nonzero(found.ms > scale.high)) for found in calls.values())
    return section(
        "latency",
        "Latency of a policy call",
        parts.rows(drawn, axis=charts.axis(scale, "milliseconds, logarithmic", _ms, 7), wide=True),
        _warmup(m),
        _phases(m, list(calls)),
        _simulator(m),
        lead="The time of a whole batch, counted once, device-synchronised, warm-up left out. "
        "Ticks are p50, p95, p99; the axis is logarithmic"
        + (f" and ends at {_ms(scale.high)} ms, with {count_text(off, 'call')} beyond it." if off else ".")
        + _control_note(m),
    )


def _control_note(m: ReportData) -> str:
    if not any(arm.is_control for arm in m.arms.values()):
        return ""
    return " The A/A arm runs in batches of another size, on purpose: its latency is not a backend's."


def _ms(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _warmup(m: ReportData) -> Markup | None:
    shown = [
        [named(m, name), ", ".join(f"{ms:.0f}" for ms in arm.meta.warmup_ms[:8])]
        for name, arm in m.arms.items()
        if arm.meta.warmup_ms
    ]
    return numbers("First calls, warm-up that no statistic counts", ["arm", "ms"], shown) if shown else None


def _phases(m: ReportData, names: list[str]) -> Markup | None:
    phases = {name: phase_calls(m.records(name)) for name in names}
    titles = list(dict.fromkeys(phase for of_arm in phases.values() for phase in of_arm))
    every = [v.ms[v.ms > 0] for of_arm in phases.values() for v in of_arm.values() if np.any(v.ms > 0)]
    if not titles or not every:
        return None
    scale = charts.duration_scale(every, 99)
    drawn, figures = [], []
    for phase in titles:
        lanes = []
        for name in names:
            values = phases[name].get(phase)
            if values is None or not len(values):
                continue
            p5, p25, p50, p75, p95, p99 = values.percentile(5, 25, 50, 75, 95, 99)
            colour = m.colour(name)
            strip = charts.track(
                *charts.grid_lines(scale),
                charts.interval(scale, p5, p95, "wide", colour),
                charts.interval(scale, p25, p75, "box", colour),
                charts.mark(scale, p50, "dot", colour),
                label=f"{phase}, {m.arms[name].label}: median {p50:.2f} ms, p95 {p95:.2f} ms",
            )
            lanes.append(parts.lane(strip, f"{p50:.2f}"))
            figures.append(
                [
                    phase,
                    named(m, name),
                    *(f"{x:.2f}" for x in (p5, p25, p50, p75, p95, p99)),
                    f"{values.mean:.2f}",
                ]
            )
        drawn.append(parts.row(phase, *lanes))
    what = "milliseconds, logarithmic: dot median, box quartiles, line 5 to 95 %"
    return join(
        el("h3", "By phase"),
        legend(m, names),
        parts.rows(drawn, axis=charts.axis(scale, what, _ms)),
        numbers(
            "Phase percentiles in ms",
            ["phase", "arm", "p5", "p25", "p50", "p75", "p95", "p99", "mean"],
            figures,
            sortable=True,
        ),
    )


def _simulator(m: ReportData) -> Markup:
    rows = []
    for name in m.arms:
        done = [r for r in m.records(name) if r.outcome != "error"]
        if done:
            mean = [np.mean([getattr(r, field) for r in done]) for field in ("sim_ms", "render_ms", "steps", "replans")]
            policy = np.mean([sum(r.policy_ms) for r in done])
            rows.append(
                [
                    named(m, name),
                    f"{mean[0] / 1e3:.1f}",
                    f"{mean[1] / 1e3:.1f}",
                    f"{policy / 1e3:.1f}",
                    f"{mean[2]:.0f}",
                    f"{mean[3]:.0f}",
                ]
            )
    return numbers(
        "Where an episode's time goes",
        ["arm", "simulator s", "rendering s", "waiting for policy s", "steps", "policy calls"],
        rows,
        stacked=True,
    )
