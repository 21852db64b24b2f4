"""The report's second half: latency, memory, the trade-off, kernels, layer errors, videos, tables to copy, provenance."""

from __future__ import annotations

import base64
import os
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qlibero.reporting import charts
from qlibero.reporting.markup import Markup, el, join
from qlibero.reporting.material import Material, Video
from qlibero.reporting.sections_success import legend, numbers, section, swatch, table
from qlibero.reporting.tables import Row, latex, markdown
from qlibero.results.phrases import margin_text
from qlibero.results.summary import percentiles, phase_calls_ms, policy_calls_ms, summarize_arm


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
            charts.plot(charts.curve(charts.density(values, scale), m.colour(name), filled=True), label=f"{m.arms[name].label}: {text} ms", height=46),
            *(charts.mark(scale, p[q], "tick") for q in p),
            class_="canvas short",
        )  # fmt: skip
        rows.append(el("div", el("h3", swatch(m, name), m.arms[name].label, el("small", size)), el("div", picture, el("span", text, class_="count"), class_="lane long"), class_="row"))
    return section(
        "latency",
        "Latency of a policy call",
        el("div", rows, el("div", el("span"), charts.axis(scale, "milliseconds", lambda t: f"{t:g}"), class_="row foot"), class_="rows"),
        _warmup(m),
        _phases(m, list(calls)),
        _simulator(m),
        lead="As an episode waits for it: the time of the whole batch, device-synchronised, warm-up left out. Ticks are p50, p95, p99.",
    )


def _warmup(m: Material) -> Markup | None:
    shown = [f"{arm.label} {', '.join(f'{ms:.0f}' for ms in arm.meta['warmup_ms'][:6])}" for arm in m.arms.values() if arm.meta.get("warmup_ms")]
    return el("p", f"First calls in ms, warm-up that no statistic counts: {'; '.join(shown)}.", class_="fine") if shown else None


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
                *charts.grid_lines(scale), charts.interval(scale, p5, p95, "wide", colour), charts.interval(scale, p25, p75, "box", colour),
                charts.mark(scale, p50, "dot", colour), label=f"{phase}, {m.arms[name].label}: median {p50:.2f} ms, p95 {p95:.2f} ms",
            )  # fmt: skip
            lanes.append(el("div", strip, el("span", f"{p50:.2f}", class_="count"), class_="lane"))
            figures.append([phase, m.arms[name].label, *(f"{x:.2f}" for x in (p5, p25, p50, p75, p95, p99)), f"{values.mean():.2f}"])
        rows.append(el("div", el("h3", phase), el("div", lanes, class_="lanes"), class_="row"))
    return join(
        el("h3", "By phase"),
        legend(m, names),
        el("div", rows, el("div", el("span"), charts.axis(scale, "milliseconds: dot median, box quartiles, line 5 to 95 %", lambda t: f"{t:g}"), class_="row foot"), class_="rows"),
        numbers("Phase percentiles in ms", ["phase", "arm", "p5", "p25", "p50", "p75", "p95", "p99", "mean"], figures, sortable=True),
    )


def _simulator(m: Material) -> Markup:
    rows = []
    for name in m.arms:
        done = [r for r in m.records(name) if r.outcome != "error"]
        if done:
            mean = [np.mean([getattr(r, field) for r in done]) for field in ("sim_ms", "render_ms", "steps", "replans")]
            policy = np.mean([sum(r.policy_ms) for r in done])
            rows.append([m.arms[name].label, f"{mean[0] / 1e3:.1f}", f"{mean[1] / 1e3:.1f}", f"{policy / 1e3:.1f}", f"{mean[2]:.0f}", f"{mean[3]:.0f}"])
    return numbers("Where an episode's time goes", ["arm", "simulator s", "rendering s", "waiting for policy s", "steps", "policy calls"], rows)


# -------------------------------------------------------------------------------------------------------------- memory
def memory(m: Material) -> Markup | None:
    """The quantized linears of each arm (codes, scales, online transforms) against the same linears in bf16."""
    found = {name: arm.meta["memory"] for name, arm in m.arms.items() if (arm.meta.get("memory") or {}).get("bf16_bytes")}
    if not found:
        return None
    scale = charts.Scale(0, 1.02 * max(of["bf16_bytes"] for of in found.values()))
    rows, figures = [], []
    for name, of in found.items():
        ends = list(accumulate(of.get(kind, 0) for kind in ("weight_bytes", "scale_bytes", "transform_bytes")))
        text = f"{_mega(ends[-1])} of {_mega(of['bf16_bytes'])} ({ends[-1] / of['bf16_bytes']:.2f}×)"
        strip = charts.track(
            charts.interval(scale, 0, of["bf16_bytes"], "bar faint"),
            *(charts.interval(scale, left, right, f"bar {kind}", m.colour(name)) for left, right, kind in zip([0, *ends], ends, ("codes", "scales", "online"), strict=False)),
            label=f"{m.arms[name].label}: {text}",
        )  # fmt: skip
        rows.append(el("div", el("h3", swatch(m, name), m.arms[name].label), el("div", strip, el("span", text, class_="count"), class_="lane long"), class_="row"))
        figures.append([m.arms[name].label, *(f"{of.get(kind, 0):,}" for kind in ("weight_bytes", "scale_bytes", "transform_bytes", "bf16_bytes"))])
    return section(
        "memory", "Memory of the quantized linears", el("div", rows, class_="rows"),
        numbers("Bytes", ["arm", "packed weights", "scales", "online transforms", "the same linears in bf16"], figures),
        lead="Measured from live tensor storages. Solid: packed weights, then scales, then the online transforms (lighter). Grey: "
        "the same linears in bf16.",
    )  # fmt: skip


def _mega(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size > 2e9 else f"{size / 1e6:.1f} MB"


# --------------------------------------------------------------------------------------------------------------- pareto
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
    front = [d for d in sorted(dots, key=lambda d: d[1]) if not any(e[1] <= d[1] and e[2] > d[2] or e[1] < d[1] and e[2] == d[2] for e in dots)]
    stairs = []
    for i, d in enumerate(front):
        if i:
            stairs.append((x(d[1]), 100 - y(front[i - 1][2])))
        stairs.append((x(d[1]), 100 - y(d[2])))
    marks = []
    for name, ms, rate, low, high in dots:
        colour, left = m.colour(name), x(ms)
        near = [x(d[1]) for d in dots if d[0] != name and abs(x(d[1]) - left) < 20 and abs(y(d[2]) - y(rate)) < 8]
        side = "left" if (min(near) > left if near else left > 70) else "right"
        marks.append(el("i", class_=f"vci {colour}", style=f"left:{left}%;bottom:{y(low)}%;height:{round(y(high) - y(low), 2)}%"))
        marks.append(el("i", class_=f"dot {colour}", style=f"left:{left}%;bottom:{y(rate)}%"))
        marks.append(el("span", m.arms[name].label, class_=f"tag {side}", style=f"left:{left}%;bottom:{y(rate)}%"))
    text = "; ".join(f"{m.arms[d[0]].label}: {100 * d[2]:.1f} % at {d[1]:.1f} ms" for d in dots)
    chart = el(
        "div", el("div", [el("span", f"{100 * t:g} %", style=f"top:{100 - y(t)}%") for t in y.ticks()], class_="ylabels", aria_hidden="true"),
        el("div", *charts.grid_lines(x), charts.plot(charts.curve(stairs, "front"), label=text, height=320), *marks, class_="canvas"),
        charts.axis(x, "median policy call, milliseconds", lambda t: f"{t:g}"), class_="xy",
    )  # fmt: skip
    return section(
        "pareto", "Success against latency", chart, el("ul", [el("li", swatch(m, d[0]), m.arms[d[0]].label) for d in dots], class_="legend tags"),
        numbers("The points", ["arm", "p50 ms", "success", "Wilson 95 %"], [[m.arms[d[0]].label, f"{d[1]:.2f}", f"{100 * d[2]:.1f} %", f"[{100 * d[3]:.1f}, {100 * d[4]:.1f}]"] for d in dots]),
        lead="Up and left is better. The line joins the arms that no other arm beats in both; bars are Wilson intervals, so "
        "overlapping bars are no ranking: the paired differences above are.",
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- kernels
def kernels(m: Material) -> Markup | None:
    parts = []
    for name, arm in m.arms.items():
        verdicts = arm.meta.get("kernels") or {}
        if not verdicts:
            continue
        kinds: dict[str, int] = {}
        shared = _shared_prefix(list(verdicts))
        rows = []
        for layer, v in verdicts.items():
            kinds[v["verdict"]] = kinds.get(v["verdict"], 0) + 1
            tone = {"pass": "good", "refuse": "bad"}.get(v["verdict"], "open")
            word = el("span", v["verdict"], class_=f"word {tone}")
            rows.append([layer.removeprefix(shared), v.get("shape", ""), v.get("kernel") or "none", word, v.get("reason", "")])
        title = join(m.arms[name].label, ": ", ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
        parts.append(el("details", el("summary", swatch(m, name), title), table(["layer", "N × K, bits, device", "kernel", "verdict", "reason"], rows, sortable=True, caption=_prefix_caption(shared)), class_="numbers"))
    if not parts:
        return None
    return section(
        "kernels", "Kernel verdicts", *parts,
        lead="Before the first episode every layer's kernel is tried on its own shapes against the integer reference: equal "
        "accumulators, or it does not run. Nothing falls back in silence.",
    )  # fmt: skip


def _shared_prefix(names: list[str]) -> str:
    """What all layer names begin with, up to a dot: said once instead of in every row."""
    prefix = os.path.commonprefix(names)
    return prefix[: prefix.rfind(".") + 1] if len(names) > 1 else ""


def _prefix_caption(prefix: str) -> str:
    return f"All below {prefix}" if prefix else ""


def layers(m: Material) -> Markup | None:
    series: dict[str, list[tuple[str, float]]] = {}
    for name, arm in m.arms.items():
        found = [(str(x.get("name") or x.get("layer")), x.get("sqnr_db")) for x in arm.meta.get("layers") or [] if isinstance(x, dict)]
        if kept := [(layer, float(db)) for layer, db in found if db is not None]:
            series[name] = kept
    if not series:
        return None
    order = list(dict.fromkeys(layer for of_arm in series.values() for layer, _ in of_arm))
    x = charts.Scale(-0.5, len(order) - 0.5)
    y = charts.scale_over([db for of_arm in series.values() for _, db in of_arm])
    marks = []
    for name, of_arm in series.items():
        for layer, db in of_arm:
            marks.append(el("i", class_=f"dot small {m.colour(name)}", style=f"left:{x(order.index(layer))}%;bottom:{y(db)}%", title=f"{layer}: {db:.1f} dB"))
    chart = el(
        "div", el("div", [el("span", f"{t:g} dB", style=f"top:{100 - y(t)}%") for t in y.ticks()], class_="ylabels", aria_hidden="true"),
        el("div", *[el("i", class_="hgrid", style=f"bottom:{y(t)}%") for t in y.ticks()], *marks, class_="canvas fixed", role="img", aria_label="Signal to quantization noise of every layer; the table below has the numbers"),
        el("div", el("div", "layers, from input to output", class_="axis-label"), class_="axis", aria_hidden="true"), class_="xy",
    )  # fmt: skip
    shared = _shared_prefix(order)
    rows = [[layer.removeprefix(shared), *(next((f"{db:.2f}" for at, db in of_arm if at == layer), "–") for of_arm in series.values())] for layer in order]
    return section(
        "layers", "Error by layer", legend(m, list(series)), chart,
        numbers(f"Every layer, dB ({_prefix_caption(shared).lower()})" if shared else "Every layer, dB", ["layer", *(m.arms[name].label for name in series)], rows, sortable=True),
        lead="Signal to quantization noise of each quantized layer's output on calibration inputs; higher is better, 6 dB is one bit.",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- videos
def videos(m: Material, chosen: list[Video], left_out: int) -> Markup | None:
    if not chosen:
        return None
    files = {path: f"v{i}" for i, path in enumerate(dict.fromkeys(p for v in chosen for p in (v.reference_file, v.arm_file)))}
    options = [
        el(
            "option", f"{m.arms[v.arm].label}: {'broken' if v.arm_outcome == 'failure' else 'repaired'}, {v.key.suite} task {v.key.task}, initial state {v.key.init}",
            value=i, data_key=str(v.key), data_arm=v.arm,
            data_left=files[v.reference_file], data_right=files[v.arm_file],
            data_left_outcome=v.reference_outcome, data_right_outcome=v.arm_outcome, data_right_label=m.arms[v.arm].label,
            data_actions=v.actions_part, data_visible=v.visibly_part,
        )
        for i, v in enumerate(chosen)
    ]  # fmt: skip
    sides = [
        el("figure", el("video", muted=True, playsinline=True, preload="auto", id=f"video-{side}", aria_label=f"{side} video"), el("figcaption", id=f"caption-{side}"))
        for side in ("left", "right")
    ]
    controls = el(
        "div", el("button", "Play", type="button", id="play"), el("button", "To divergence", type="button", id="to-divergence"),
        el("input", type="range", id="scrub", min=0, max=1000, value=0, step=1, aria_label="position in the episode"),
        el("output", "step 0", id="step", for_="scrub"), class_="controls",
    )  # fmt: skip
    store = el("div", [el("data", id=id_, value=_data_uri(path)) for path, id_ in files.items()], hidden=True)
    return section(
        "videos", "Flipped episodes, side by side",
        el("label", "Episode ", el("select", options, id="episode")), el("div", sides, class_="videos", data_reference=m.arms[m.reference].label), controls,
        el("p", "", id="divergence-text", class_="fine", aria_live="polite"), store,
        lead="Both videos share one clock and the same scene and policy noise, so they are the same until they part."
        + (f" {left_out} more flipped episodes were filmed but left out to keep this file small." if left_out else ""),
    )  # fmt: skip


def _data_uri(path: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


# --------------------------------------------------------------------------------------------------- tables, provenance
def copyable(m: Material) -> Markup:
    rows = [Row(arm.label, summarize_arm(m.records(name)), m.compared.get(name), _linears(arm.meta)) for name, arm in m.arms.items()]
    caption = f"{m.name}: paired comparison, margin {margin_text(m.margin)}." if m.comparison else m.name
    blocks = [
        el("figure", el("figcaption", title, el("button", "Copy", type="button", data_copy=id_)), el("pre", text, id=id_, tabindex="0"))
        for title, id_, text in (("Markdown", "as-markdown", markdown(rows)), ("LaTeX", "as-latex", latex(rows, caption)))
    ]
    return section("tables", "Tables to copy", el("div", blocks, class_="copyable"))


def _linears(meta: dict[str, Any]) -> int | None:
    of = meta.get("memory") or {}
    return sum(of.get(kind, 0) for kind in ("weight_bytes", "scale_bytes", "transform_bytes")) or None


def provenance(m: Material) -> Markup:
    parts = []
    for run in m.runs:
        rows = _flat(run.environment)
        if rows:
            parts.append(numbers(f"Environment of {run.name}", ["what", "value"], rows))
        if run.experiment:
            text = yaml.safe_dump(run.experiment, sort_keys=False, allow_unicode=True)
            parts.append(el("details", el("summary", f"Configuration of {run.name}"), el("pre", text, tabindex="0"), class_="numbers"))
    for name, arm in m.arms.items():
        hidden = ("kernels", "layers", "memory", "label", "schema", "arm", "control", "warmup_ms")
        rows = _flat({k: v for k, v in arm.meta.items() if k not in hidden})
        if rows:
            parts.append(numbers(f"Hashes and settings of {arm.label}", ["what", "value"], rows))
    ledgers = [(run, a) for run in m.runs for a in run.arms.values()]
    torn, repeated = sum(a.torn for _, a in ledgers), sum(a.repeated for _, a in ledgers)
    conflicts = [f"{a.arm} {key}" for _, a in ledgers for key in a.conflicts]
    state = f"{sum(len(a.records) for _, a in ledgers):,} episodes in the ledger, {repeated} superseded lines, {torn} torn lines"
    warning = el("p", f"Ran twice with different results: {', '.join(conflicts)}. Pure episodes never do; look for the cause first.", class_="fine warn") if conflicts else None
    return section("provenance", "Environment and hashes", warning, *parts, lead=f"{state}. Everything on this page is computed from it.")


def _flat(data: Any, prefix: str = "") -> list[list[Any]]:
    """Nested mappings as rows `a.b`, lists in one line."""
    rows = []
    for key, value in (data or {}).items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows += _flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            rows.append([name, ", ".join(map(str, value)) or "–"])
        elif value is not None and value != "":
            rows.append([name, str(value)])
    return rows
