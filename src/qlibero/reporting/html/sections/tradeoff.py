"""What is bought and paid: memory of the quantized linears, success against latency."""

from __future__ import annotations

from itertools import accumulate

from qlibero.console import count_text
from qlibero.registry import SectionPlugin
from qlibero.reporting.html import charts
from qlibero.reporting.html.markup import Markup, el
from qlibero.reporting.html.report_data import ReportData
from qlibero.reporting.html.sections import parts
from qlibero.reporting.html.sections.parts import legend, named, numbers, section
from qlibero.results.arm_meta import ArmMeta, MemoryMeta
from qlibero.results.speed import is_simulation
from qlibero.results.summary import summarize_arm

PLUGINS = (
    SectionPlugin("pareto", "success against latency", provides="pareto", order=80),
    SectionPlugin("memory", "bytes of weights and transforms", provides="memory", order=81),
)


def memory(m: ReportData) -> Markup | None:
    """The quantized linears of each arm (codes, scales, online transforms) against the same linears in bf16."""
    found = {name: of for name, arm in m.arms.items() if (of := arm.meta.memory) is not None and of.bf16_bytes}
    if not found:
        return None
    scale = charts.Scale(0, 1.02 * max(max(of.bf16_bytes, of.kept) for of in found.values()))
    drawn, figures = [], []
    for name, of in found.items():
        meta = m.arms[name].meta
        held = of.weight_bytes, of.scale_bytes, of.transform_bytes
        ends = list(accumulate(held))
        text = f"{_mega(of.kept)}, {of.kept / of.bf16_bytes:.2f}× of {_mega(of.bf16_bytes)}"
        note = None
        if is_unpacked(meta):
            text = f"{_mega(of.kept)} unpacked"
            note = el("small", f"{_on_fake(meta)} on fake: not a kernel's memory")
        strip = charts.track(
            charts.interval(scale, 0, of.bf16_bytes, "bar faint"),
            *(
                charts.interval(scale, left, right, f"bar {kind}{' unpacked' * is_unpacked(meta)}", m.colour(name))
                for left, right, kind in zip([0, *ends], ends, ("codes", "scales", "online"), strict=False)
            ),
            _packed_mark(scale, of, meta),
            label=f"{m.arms[name].label}: {text}",
        )
        drawn.append(parts.row(named(m, name, note), parts.lane(strip, text)))
        codes = packed_bytes(of, meta)
        figures.append(
            [
                named(m, name),
                *(f"{size:,}" for size in (*held, of.bf16_bytes)),
                f"{codes:,}" if codes else "–",
                "unpacked in floating point" if is_unpacked(meta) else "as its kernel keeps them",
            ]
        )
    unpacked = any(is_unpacked(m.arms[name].meta) for name in found)
    return section(
        "memory",
        "Memory of the quantized linears",
        parts.rows(drawn, wide=True),
        numbers(
            "Bytes",
            [
                "arm",
                "weights as held",
                "scales",
                "online transforms",
                "the same linears in bf16",
                "codes at their bits",
                "how weights are held",
            ],
            figures,
            stacked=True,
        ),
        lead="Measured from live tensor storages: weights, then scales, then the online transforms (lighter). "
        "Grey: the same linears in bf16."
        + (
            " Hatched: the backend fake computes a kernel's integers in floating point and holds them unpacked, "
            "so its bar says nothing of what a kernel needs; "
            "the black line is what the integer codes alone take at their bits."
            if unpacked
            else ""
        ),
    )


def _on_fake(meta: ArmMeta) -> str:
    layers = len(meta.kernels)
    on_fake = meta.executed.count("fake")
    return "all layers" if on_fake == layers else f"{on_fake} of {count_text(layers, 'layer')}"


def is_unpacked(meta: ArmMeta) -> bool:
    """Whether any layer ran on `fake`, which holds its integers in floating point."""
    return "fake" in meta.executed


def packed_bytes(of: MemoryMeta, meta: ArmMeta) -> int | None:
    """The integer codes at their width, without scales; None where layers differ in bits or none are said."""
    quant = meta.quant
    if quant is None or quant.per_layer_bits or not quant.weight_bits:
        return None
    return of.bf16_bytes * quant.weight_bits // 16


def _packed_mark(scale: charts.Scale, of: MemoryMeta, meta: ArmMeta) -> Markup | None:
    codes = packed_bytes(of, meta)
    return charts.mark(scale, codes, "packed") if codes and is_unpacked(meta) else None


def _mega(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size > 2e9 else f"{size / 1e6:.1f} MB"


def pareto(m: ReportData) -> Markup | None:
    """Success against latency of everything but the A/A controls: their latency is that of other batches, and what they
    say, the noise floor, is drawn as a band around the reference."""
    dots = []
    for name in m.arms:
        if m.arms[name].is_control:
            continue
        s = summarize_arm(m.records(name))
        if s.latency_ms and s.wilson95:
            dots.append((name, s.latency_ms.p50, s.successes / s.episodes, *s.wilson95))
    if len(dots) < 2:
        return None
    x = charts.scale_over([d[1] for d in dots], room=0.25)
    y = charts.success_scale([d[3] for d in dots])
    real = [d for d in dots if not is_simulation(m.arms[d[0]].meta)]  # a simulation's time beats nobody's
    front = [
        d
        for d in sorted(real, key=lambda d: d[1])
        if not any(e[1] <= d[1] and e[2] > d[2] or e[1] < d[1] and e[2] == d[2] for e in real)
    ]
    stairs = []
    for i, d in enumerate(front):
        if i:
            stairs.append((x(d[1]), 100 - y(front[i - 1][2])))
        stairs.append((x(d[1]), 100 - y(d[2])))
    marks = [_floor_band(m, y)]
    simulated = [name for name, *_ in dots if is_simulation(m.arms[name].meta)]
    for name, ms, rate, low, high in dots:
        colour, left = m.colour(name) + " hollow" * (name in simulated), x(ms)
        marks.append(
            el(
                "i",
                class_=f"vci {colour}",
                style=f"left:{left}%;bottom:{y(low)}%;height:{round(y(high) - y(low), 2)}%",
            )
        )
        marks.append(el("i", class_=f"dot {colour}", style=f"left:{left}%;bottom:{y(rate)}%"))
    tagged = len(dots) <= MAX_TAGS and max(len(m.arms[name].label) for name, *_ in dots) <= LONGEST_TAG
    if tagged:
        marks += _tags(m, [(name, x(ms), y(rate)) for name, ms, rate, *_ in dots])
    text = "; ".join(f"{m.arms[d[0]].label}: {100 * d[2]:.1f} % at {d[1]:.1f} ms" for d in dots)
    chart = charts.xy(
        [(100 - y(t), f"{100 * t:g} %") for t in y.ticks()],
        el(
            "div",
            *charts.grid_lines(x),
            charts.plot(charts.curve(stairs, "front"), label=text, height=320),
            *marks,
            class_="canvas",
        ),
        charts.axis(x, "median policy call, milliseconds", lambda t: f"{t:g}"),
    )
    return section(
        "pareto",
        "Success against latency",
        chart,
        legend(m, [d[0] for d in dots], "legend tags" if tagged else "legend under"),
        numbers(
            "The points",
            ["arm", "p50 ms", "success", "Wilson 95 %"],
            [
                [
                    named(m, d[0]),
                    f"{d[1]:.2f}" + (" (simulation: no speed claim)" if d[0] in simulated else ""),
                    f"{100 * d[2]:.1f} %",
                    f"[{100 * d[3]:.1f}, {100 * d[4]:.1f}]",
                ]
                for d in dots
            ],
        ),
        lead="Up and left is better. The line joins the arms that no other arm beats in both; "
        "bars are Wilson intervals, so overlapping bars are no ranking: the paired differences above are."
        + (" Grey band: what rounding alone moves in 95 % of reruns (A/A's noise floor)." if marks[0] else "")
        + (" Hollow dots are simulations of a kernel: their place says nothing of its speed." if simulated else ""),
    )


def _tags(m: ReportData, places: list[tuple[str, float, float]]) -> list[Markup]:
    """Names beside their dots, on the side with room, moved down where two would lie upon each other."""
    tags: list[Markup] = []
    taken: dict[str, list[tuple[float, float]]] = {"left": [], "right": []}
    for name, left, bottom in sorted(places, key=lambda place: -place[2]):
        side = "left" if left > 60 else "right"
        reach = (left - NAME, left) if side == "left" else (left, left + NAME)
        dots = [b for _, at, b in places if reach[0] <= at <= reach[1] and at != left]
        names = [b for at, b in taken[side] if abs(left - at) < 2 * NAME]
        while any(abs(bottom - other) < LINE for other in dots + names):
            bottom -= LINE / 4
        taken[side].append((left, bottom))
        tags.append(
            el("span", m.arms[name].label, class_=f"tag {side}", style=f"left:{left}%;bottom:{round(bottom, 2)}%")
        )
    return tags


LINE, NAME = 7.5, 22  # height and width of a name in percent of the chart
MAX_TAGS = 6  # more names than this on the chart lie upon each other; the legend below has them
LONGEST_TAG = 18  # so do longer ones


def _floor_band(m: ReportData, y: charts.Scale) -> Markup | None:
    """What rounding alone moves around the reference's success; only for a single cell, whose reference is one dot."""
    part = m.parts[0]
    if (
        len(m.parts) > 1
        or not part.comparison
        or not part.comparison.floor
        or not part.comparison.reference_summary.episodes
    ):
        return None
    s = part.comparison.reference_summary
    rate = s.successes / s.episodes
    low, high = (rate + end for end in part.comparison.floor.band(s.episodes))
    return el("i", class_="band", style=f"bottom:{y(low)}%;height:{round(y(high) - y(low), 2)}%")
