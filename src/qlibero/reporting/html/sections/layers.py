"""Layer by layer: what validation found of each kernel, and the quantization error."""

from __future__ import annotations

import os
from collections import Counter

from qlibero.registry import SectionPlugin
from qlibero.reporting.html import charts
from qlibero.reporting.html.markup import Markup, el
from qlibero.reporting.html.report_data import ReportData
from qlibero.reporting.html.sections.parts import legend, named, numbers, section, table

PLUGINS = (
    SectionPlugin("kernels", "which kernel ran in how many layers", provides="kernels", order=90),
    SectionPlugin("layers", "rounding noise layer by layer", provides="layers", order=91),
)


def kernels(m: ReportData) -> Markup | None:
    parts = []
    for name, arm in m.arms.items():
        verdicts = arm.meta.kernels
        if not verdicts:
            continue
        kinds = Counter(v.verdict for v in verdicts.values())
        shared = _shared_prefix(list(verdicts))
        alike: dict[tuple[str, ...], list[str]] = {}  # layers of one shape and verdict are one row
        for layer, v in verdicts.items():
            said = v.shape, v.kernel or "none", v.verdict, v.reason
            alike.setdefault(said, []).append(layer.removeprefix(shared))
        rows = []
        for (shape, kernel, verdict, reason), of in alike.items():
            tone = {"pass": "good", "refuse": "bad"}.get(verdict, "open")
            rows.append([shape, kernel, el("span", verdict, class_=f"word {tone}"), reason, len(of), ", ".join(of)])
        title = named(m, name, ": ", ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
        parts.append(
            el(
                "details",
                el("summary", title),
                table(
                    ["N × K, bits, device", "kernel", "verdict", "reason", "layers", "which"],
                    rows,
                    sortable=True,
                    caption=_prefix_caption(shared),
                ),
                class_="numbers",
            )
        )
    if not parts:
        return None
    return section(
        "kernels",
        "Kernel verdicts",
        *parts,
        lead="Before the first episode every layer's kernel is tried on its own shapes against the integer reference: "
        "equal accumulators, or it does not run. Nothing falls back in silence.",
    )


def _shared_prefix(names: list[str]) -> str:
    """What all layer names begin with, up to a dot: said once instead of in every row."""
    prefix = os.path.commonprefix(names)
    return prefix[: prefix.rfind(".") + 1] if len(names) > 1 else ""


def _prefix_caption(prefix: str) -> str:
    return f"All below {prefix}" if prefix else ""


def layers(m: ReportData) -> Markup | None:
    series: dict[str, list[tuple[str, float]]] = {}
    for name, arm in m.arms.items():
        if kept := [(layer.name, layer.sqnr_db) for layer in arm.meta.layers if layer.sqnr_db is not None]:
            series[name] = kept
    if not series:
        return None
    order = list(dict.fromkeys(layer for of_arm in series.values() for layer, _ in of_arm))
    shared = _shared_prefix(order)
    x = charts.Scale(-0.5, len(order) - 0.5)
    y = charts.scale_over([db for of_arm in series.values() for _, db in of_arm])
    marks = []
    for name, of_arm in series.items():
        for layer, db in of_arm:
            marks.append(
                el(
                    "i",
                    class_=f"dot small {m.colour(name)}",
                    style=f"left:{x(order.index(layer))}%;bottom:{y(db)}%",
                    title=f"{layer.removeprefix(shared)}: {db:.1f} dB",
                )
            )
    chart = charts.xy(
        [(100 - y(t), f"{t:g} dB") for t in y.ticks()],
        el(
            "div",
            *[el("i", class_="hgrid", style=f"bottom:{y(t)}%") for t in y.ticks()],
            *marks,
            class_="canvas fixed",
            role="img",
            aria_label="Signal to quantization noise of every layer; the table below has the numbers",
        ),
        el(
            "div",
            el("div", "layers, from input to output", class_="axis-label"),
            class_="axis",
            aria_hidden="true",
        ),
    )
    rows = [
        [
            layer.removeprefix(shared),
            *(next((f"{db:.2f}" for at, db in of_arm if at == layer), "–") for of_arm in series.values()),
        ]
        for layer in order
    ]
    return section(
        "layers",
        "Error by layer",
        legend(m, list(series)),
        chart,
        numbers(
            f"Every layer, dB ({_prefix_caption(shared).lower()})" if shared else "Every layer, dB",
            ["layer", *(m.arms[name].label for name in series)],
            rows,
            sortable=True,
        ),
        lead="Signal to quantization noise of each quantized layer's output on calibration inputs; "
        "higher is better, 6 dB is one bit.",
    )
