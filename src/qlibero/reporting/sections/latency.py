"""Latency of policy calls: distributions, phases, warm-up, and where the rest of an episode's time goes."""

from __future__ import annotations

import numpy as np

from qlibero.reporting import charts
from qlibero.reporting.markup import Markup, el, join
from qlibero.reporting.material import Material
from qlibero.reporting.sections.parts import legend, numbers, section, swatch
from qlibero.results.summary import percentiles, phase_calls_ms, policy_calls_ms


def latency(m: Material) -> Markup | None:
    calls = {name: policy_calls_ms(m.records(name)) for name in m.arms}
    calls = {name: values for name, values in calls.items() if len(values)}
    if not calls:
        return None
    # one slow call in a thousand must not squeeze the rest into a line
    scale = charts.Scale(0, 1.05 * max(float(np.percentile(v, 99.5)) for v in calls.values()))
    rows = []
    for name, values in calls.items():
        p = percentiles(values)
        beyond = int(np.count_nonzero(values > scale.high))
        text = f"p50 {p['p50']:.1f} · p95 {p['p95']:.1f} · p99 {p['p99']:.1f}"
        size = f"{len(values):,} calls" + (f", {beyond} off the chart" if beyond else "")
        picture = el(
            "div",
            charts.plot(
                charts.curve(charts.density(values, scale), m.colour(name), filled=True),
                label=f"{m.arms[name].label}: {text} ms",
                height=46,
            ),
            *(charts.mark(scale, p[q], "tick") for q in p),
            class_="canvas short",
        )
        rows.append(
            el(
                "div",
                el("h3", swatch(m, name), m.arms[name].label, el("small", size)),
                el("div", picture, el("span", text, class_="count"), class_="lane long"),
                class_="row",
            )
        )
    return section(
        "latency",
        "Latency of a policy call",
        el(
            "div",
            rows,
            el("div", el("span"), charts.axis(scale, "milliseconds", lambda t: f"{t:g}"), class_="row foot"),
            class_="rows",
        ),
        _warmup(m),
        _phases(m, list(calls)),
        _simulator(m),
        lead="As an episode waits for it: the time of the whole batch, device-synchronised, warm-up left out. Ticks are p50, p95, p99.",
    )


def _warmup(m: Material) -> Markup | None:
    shown = [
        f"{arm.label} {', '.join(f'{ms:.0f}' for ms in arm.meta['warmup_ms'][:6])}"
        for arm in m.arms.values()
        if arm.meta.get("warmup_ms")
    ]
    return (
        el("p", f"First calls in ms, warm-up that no statistic counts: {'; '.join(shown)}.", class_="fine")
        if shown
        else None
    )


def _phases(m: Material, names: list[str]) -> Markup | None:
    phases = {name: phase_calls_ms(m.records(name)) for name in names}
    titles = list(dict.fromkeys(phase for of_arm in phases.values() for phase in of_arm))
    if not titles:
        return None
    every = [v for of_arm in phases.values() for v in of_arm.values() if len(v)]
    scale = charts.Scale(0, 1.05 * max(float(np.percentile(v, 99)) for v in every))
    rows, figures = [], []
    for phase in titles:
        lanes = []
        for name in names:
            values = phases[name].get(phase)
            if values is None or not len(values):
                continue
            p5, p25, p50, p75, p95, p99 = (float(x) for x in np.percentile(values, (5, 25, 50, 75, 95, 99)))
            colour = m.colour(name)
            strip = charts.track(
                *charts.grid_lines(scale),
                charts.interval(scale, p5, p95, "wide", colour),
                charts.interval(scale, p25, p75, "box", colour),
                charts.mark(scale, p50, "dot", colour),
                label=f"{phase}, {m.arms[name].label}: median {p50:.2f} ms, p95 {p95:.2f} ms",
            )
            lanes.append(el("div", strip, el("span", f"{p50:.2f}", class_="count"), class_="lane"))
            figures.append(
                [
                    phase,
                    m.arms[name].label,
                    *(f"{x:.2f}" for x in (p5, p25, p50, p75, p95, p99)),
                    f"{values.mean():.2f}",
                ]
            )
        rows.append(el("div", el("h3", phase), el("div", lanes, class_="lanes"), class_="row"))
    return join(
        el("h3", "By phase"),
        legend(m, names),
        el(
            "div",
            rows,
            el(
                "div",
                el("span"),
                charts.axis(
                    scale, "milliseconds: dot median, box quartiles, line 5 to 95 %", lambda t: f"{t:g}"
                ),
                class_="row foot",
            ),
            class_="rows",
        ),
        numbers(
            "Phase percentiles in ms",
            ["phase", "arm", "p5", "p25", "p50", "p75", "p95", "p99", "mean"],
            figures,
            sortable=True,
        ),
    )


def _simulator(m: Material) -> Markup:
    rows = []
    for name in m.arms:
        done = [r for r in m.records(name) if r.outcome != "error"]
        if done:
            mean = [
                np.mean([getattr(r, field) for r in done])
                for field in ("sim_ms", "render_ms", "steps", "replans")
            ]
            policy = np.mean([sum(r.policy_ms) for r in done])
            rows.append(
                [
                    m.arms[name].label,
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
    )
