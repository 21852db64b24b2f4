"""How arms move: success over time, execution quality, first divergence."""

from __future__ import annotations

from qlibero.reporting import charts
from qlibero.reporting.markup import Markup, el, join
from qlibero.reporting.material import Material
from qlibero.reporting.sections.parts import legend, section, table
from qlibero.reporting.terminal import QUALITY
from qlibero.results.phrases import p_text


def execution(m: Material) -> Markup | None:
    horizon = max((r.steps for name in m.arms for r in m.records(name)), default=0)
    if not horizon:
        return None
    scale = charts.Scale(0, horizon)
    curves = []
    for name in m.arms:
        records = [r for r in m.records(name) if r.outcome != "error"]
        if records:
            steps = [r.success_step for r in records if r.succeeded]
            curves.append(charts.curve(charts.success_over_time(steps, len(records), scale), m.colour(name)))
    chart = el(
        "div",
        el(
            "div",
            [el("span", f"{100 - y} %", style=f"top:{y}%") for y in (0, 25, 50, 75, 100)],
            class_="ylabels",
            aria_hidden="true",
        ),
        el(
            "div",
            charts.plot(
                *curves, label="Share of episodes that have succeeded by each step, per arm", height=240
            ),
            *charts.grid_lines(scale),
            class_="canvas",
        ),
        charts.axis(scale, "control steps (20 per second)", lambda t: f"{t:g}"),
        class_="xy",
    )
    rows = []
    for r in m.compared.values():
        cells = []
        for name in QUALITY:
            q = r["quality"][name]
            shift = el("span", f"{q['reference']:.3g} → {q['arm']:.3g}", class_="nobr") if q else "–"
            cells.append(join(shift, el("span", p_text(q["p"]), class_="p") if q else None))
        d = r["divergence"]
        parted = (
            f"median step {d['median_step']:.0f}, {d['diverged']} of {d['compared']}"
            if d["diverged"]
            else f"none of {d['compared']}"
        )
        rows.append([r["label"], *cells, parted if d["compared"] else "–"])
    first = next(iter(m.compared.values()), None)
    return section(
        "execution",
        "Execution",
        legend(m),
        chart,
        table(
            ["arm", *QUALITY.values(), "first divergence of actions"],
            rows,
            caption="Reference → arm on paired episodes, p of the paired sign-flip test",
        )
        if rows
        else None,
        el(
            "p",
            f"Actions part where they differ by more than {first['divergence']['threshold']:.3g} ({first['divergence']['threshold_from']}).",
            class_="fine",
        )
        if first
        else None,
        lead="How soon episodes succeed: a curve ends at its arm's success rate. Movement often changes before success does.",
    )
