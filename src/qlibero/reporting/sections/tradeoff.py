"""What is bought and paid: memory of the quantized linears, success against latency."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from qlibero.reporting import charts
from qlibero.reporting.markup import Markup, el
from qlibero.reporting.material import Material
from qlibero.reporting.sections.parts import numbers, section, swatch
from qlibero.results.summary import summarize_arm


def memory(m: Material) -> Markup | None:
    """The quantized linears of each arm (codes, scales, online transforms) against the same linears in bf16."""
    found = {
        name: arm.meta["memory"]
        for name, arm in m.arms.items()
        if (arm.meta.get("memory") or {}).get("bf16_bytes")
    }
    if not found:
        return None
    scale = charts.Scale(
        0,
        1.02 * max(max(of["bf16_bytes"], linear_bytes(m.arms[name].meta) or 0) for name, of in found.items()),
    )
    rows, figures = [], []
    for name, of in found.items():
        ends = list(
            accumulate(of.get(kind, 0) for kind in ("weight_bytes", "scale_bytes", "transform_bytes"))
        )
        text = f"{_mega(ends[-1])}, {ends[-1] / of['bf16_bytes']:.2f}× of {_mega(of['bf16_bytes'])}"
        strip = charts.track(
            charts.interval(scale, 0, of["bf16_bytes"], "bar faint"),
            *(
                charts.interval(scale, left, right, f"bar {kind}", m.colour(name))
                for left, right, kind in zip([0, *ends], ends, ("codes", "scales", "online"), strict=False)
            ),
            label=f"{m.arms[name].label}: {text}",
        )
        rows.append(
            el(
                "div",
                el("h3", swatch(m, name), m.arms[name].label),
                el("div", strip, el("span", text, class_="count"), class_="lane long"),
                class_="row",
            )
        )
        figures.append(
            [
                m.arms[name].label,
                *(
                    f"{of.get(kind, 0):,}"
                    for kind in ("weight_bytes", "scale_bytes", "transform_bytes", "bf16_bytes")
                ),
            ]
        )
    return section(
        "memory",
        "Memory of the quantized linears",
        el("div", rows, class_="rows"),
        numbers(
            "Bytes",
            ["arm", "packed weights", "scales", "online transforms", "the same linears in bf16"],
            figures,
        ),
        lead="Measured from live tensor storages. Solid: packed weights, then scales, then the online transforms (lighter). Grey: "
        "the same linears in bf16.",
    )


def _mega(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size > 2e9 else f"{size / 1e6:.1f} MB"


def linear_bytes(meta: dict[str, Any]) -> int | None:
    of = meta.get("memory") or {}
    return sum(of.get(kind, 0) for kind in ("weight_bytes", "scale_bytes", "transform_bytes")) or None


def pareto(m: Material) -> Markup | None:
    dots = []
    for name in m.arms:
        s = summarize_arm(m.records(name))
        if s["latency_ms"] and s["episodes"]:
            dots.append((name, s["latency_ms"]["p50"], s["successes"] / s["episodes"], *s["wilson95"]))
    if len(dots) < 2:
        return None
    x = charts.scale_over([d[1] for d in dots], room=0.25)
    y = charts.success_scale([d[3] for d in dots])
    front = [
        d
        for d in sorted(dots, key=lambda d: d[1])
        if not any(e[1] <= d[1] and e[2] > d[2] or e[1] < d[1] and e[2] == d[2] for e in dots)
    ]
    stairs = []
    for i, d in enumerate(front):
        if i:
            stairs.append((x(d[1]), 100 - y(front[i - 1][2])))
        stairs.append((x(d[1]), 100 - y(d[2])))
    marks = []
    for name, ms, rate, low, high in dots:
        colour, left = m.colour(name), x(ms)
        near = [
            x(d[1]) for d in dots if d[0] != name and abs(x(d[1]) - left) < 20 and abs(y(d[2]) - y(rate)) < 8
        ]
        side = "left" if (min(near) > left if near else left > 70) else "right"
        marks.append(
            el(
                "i",
                class_=f"vci {colour}",
                style=f"left:{left}%;bottom:{y(low)}%;height:{round(y(high) - y(low), 2)}%",
            )
        )
        marks.append(el("i", class_=f"dot {colour}", style=f"left:{left}%;bottom:{y(rate)}%"))
        marks.append(
            el("span", m.arms[name].label, class_=f"tag {side}", style=f"left:{left}%;bottom:{y(rate)}%")
        )
    text = "; ".join(f"{m.arms[d[0]].label}: {100 * d[2]:.1f} % at {d[1]:.1f} ms" for d in dots)
    chart = el(
        "div",
        el(
            "div",
            [el("span", f"{100 * t:g} %", style=f"top:{100 - y(t)}%") for t in y.ticks()],
            class_="ylabels",
            aria_hidden="true",
        ),
        el(
            "div",
            *charts.grid_lines(x),
            charts.plot(charts.curve(stairs, "front"), label=text, height=320),
            *marks,
            class_="canvas",
        ),
        charts.axis(x, "median policy call, milliseconds", lambda t: f"{t:g}"),
        class_="xy",
    )
    return section(
        "pareto",
        "Success against latency",
        chart,
        el("ul", [el("li", swatch(m, d[0]), m.arms[d[0]].label) for d in dots], class_="legend tags"),
        numbers(
            "The points",
            ["arm", "p50 ms", "success", "Wilson 95 %"],
            [
                [
                    m.arms[d[0]].label,
                    f"{d[1]:.2f}",
                    f"{100 * d[2]:.1f} %",
                    f"[{100 * d[3]:.1f}, {100 * d[4]:.1f}]",
                ]
                for d in dots
            ],
        ),
        lead="Up and left is better. The line joins the arms that no other arm beats in both; bars are Wilson intervals, so "
        "overlapping bars are no ranking: the paired differences above are.",
    )
