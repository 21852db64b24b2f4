"""The report's first half: verdicts, success by task, paired differences, flips, execution."""

from __future__ import annotations

import re
from typing import Any

from qlibero.episode_key import EpisodeKey
from qlibero.reporting import charts
from qlibero.reporting.markup import Markup, el, join
from qlibero.reporting.material import Material
from qlibero.reporting.terminal import QUALITY, sequential_text
from qlibero.results.phrases import margin_text, p_text, percent, points, speed_text
from qlibero.results.records import EpisodeRecord
from qlibero.results.statistics import wilson
from qlibero.results.summary import counts, summarize_arm

NBSP = "\u00a0"
GLYPHS = {"non-inferior": ("✓", "good"), "inferior": ("✕", "bad")}  # anything else: ("?", "open")


def section(id_: str, title: str, *children: Any, lead: Any = None) -> Markup:
    """A part of the page; its id, capitalised, names it in the navigation."""
    return el("section", el("h2", title), el("p", lead, class_="lead") if lead else None, *children, id=id_, aria_label=title)


def numbers(title: str, head: list[str], rows: list[list[Any]], sortable: bool = False, open_: bool = False) -> Markup:
    """The figures of a chart as a table, folded away."""
    return el("details", el("summary", title), table(head, rows, sortable), class_="numbers", open=open_)


def table(head: list[str], rows: list[list[Any]], sortable: bool = False, caption: str = "") -> Markup:
    def heading(i: int, text: str) -> Markup:
        return el("th", el("button", text, type="button") if sortable else text, scope="col", data_column=i)

    body = [el("tr", el("th", row[0], scope="row"), [el("td", cell) for cell in row[1:]]) for row in rows]
    inside = el(
        "table",
        el("caption", caption) if caption else None,
        el("thead", el("tr", [heading(i, text) for i, text in enumerate(head)])),
        el("tbody", body),
        class_="sortable" if sortable else None,
    )
    return el("div", inside, class_="scroll", tabindex="0", role="region", aria_label=caption or head[0])


def swatch(m: Material, arm: str) -> Markup:
    return el("span", class_=f"swatch {m.colour(arm)}", aria_hidden="true")


def legend(m: Material, arms: list[str] | None = None) -> Markup:
    names = list(m.arms) if arms is None else arms
    return el("ul", [el("li", swatch(m, n), m.arms[n].label) for n in names], class_="legend")


# ------------------------------------------------------------------------------------------------------------ verdicts
def verdicts(m: Material) -> Markup:
    if not m.comparison:
        return section("verdicts", "Result", el("div", [_single(m, name) for name in m.arms], class_="cards"))
    scale = _difference_scale(m)
    tested = [n for n in m.compared if not m.compared[n]["control"]]
    control = [n for n in m.compared if m.compared[n]["control"]]
    cards = [_card(m, name, scale) for name in tested + control]
    floor = m.comparison["noise_floor"]
    lead = join(
        f"Every arm runs the same {m.comparison['reference_summary']['episodes']:,} episodes as ",
        el("b", m.comparison["reference_label"]),
        ": same scenes, same policy noise. An arm is non-inferior when the whole 95 % interval of its difference lies above "
        f"{margin_text(m.margin)}.",
        _floor_text(floor) if floor else " There is no A/A arm, so the noise floor is unknown.",
    )
    return section("verdicts", "Verdicts", el("div", cards, class_="cards"), lead=lead)


def _floor_text(floor: dict[str, Any]) -> str:
    low, high = floor["tango95"]
    return (
        f" The reference against itself (A/A) flips {percent(floor['discordance'])} of its pairs: "
        f"Δ {points(floor['delta'])} pp [{points(low)}, {points(high)}]. That is the noise floor."
    )


def _card(m: Material, name: str, scale: charts.Scale) -> Markup:
    r = m.compared[name]
    glyph, tone = GLYPHS.get(r["verdict"], ("?", "open"))
    if r["control"]:
        glyph, tone = "≡", "control"
    head = el("header", el("h3", swatch(m, name), r["label"]), el("span", el("i", glyph, aria_hidden="true"), _chip(r), class_="chip"))
    if not r["pairs"]:
        return el("article", head, el("p", r["sentence"]), class_=f"card {tone}")
    low, high = r["tango95"]
    big = el("p", el("b", points(r["delta"]), class_="big"), " pp ", el("span", f"[{points(low)}, {points(high)}]"), class_="delta")
    facts = [
        (r["broken"], "broken"),
        (r["repaired"], "repaired"),
        (f"{r['pairs']:,}", "pairs"),
        (speed_text(r["speedup_p50"]) or "–", "policy call"),
    ]
    return el(
        "article",
        head,
        big,
        _difference(m, name, r, scale),
        el("dl", [el("div", el("dt", term), el("dd", value)) for value, term in facts], class_="facts"),
        el("p", unbroken(r["sentence"]), class_="sentence"),
        el("p", unbroken(r["detectable"]["line"]), class_="fine"),
        el("p", unbroken(f"Sequential test: {sequential_text(r['sequential'])}."), class_="fine") if r["sequential"] else None,
        _error_text(r),
        class_=f"card {tone}",
    )


def _chip(r: dict[str, Any]) -> str:
    if r["control"]:
        return "A/A control"
    return r["verdict"] if not r["qualifier"] else "better" if r["qualifier"] == "better" else f"{r['verdict']}, {r['qualifier']}"


def _error_text(r: dict[str, Any]) -> Markup | None:
    parts = []
    e = r["errors"]
    if e["removed_pairs"]:
        parts.append(
            f"{e['removed_pairs']} pair{'s' * (e['removed_pairs'] > 1)} lost to errors ({e['arm']} in this arm, {e['reference']} in "
            f"the reference). Were they counted against this arm, the verdict would be: {e['worst_case_verdict']}."
        )
    if r["unpaired"]:
        shown = "; ".join(f"{u['key']} ({u['reason']})" for u in r["unpaired"][:8])
        more = f"; and {len(r['unpaired']) - 8} more" if len(r["unpaired"]) > 8 else ""
        parts.append(f"{len(r['unpaired'])} unpaired: {shown}{more}.")
    changed = r["verdict"] == "inconclusive (errors)" or r["unpaired"]
    return el("p", " ".join(parts), class_="fine warn" if changed else "fine") if parts else None


def unbroken(text: str) -> str:
    """No line break inside an interval or between a number and its unit."""
    text = re.sub(r"\[[^\]]*\]", lambda found: found[0].replace(" ", NBSP), text)
    return re.sub(r"(?<=[\d)]) (?=(?:pp|%|pairs|×)\b|%)|(?<=Δ) | (?=\[)", NBSP, text)


def _single(m: Material, name: str) -> Markup:
    s = summarize_arm(m.records(name))
    low, high = s["wilson95"] or (0, 1)
    return el(
        "article",
        el("header", el("h3", swatch(m, name), m.arms[name].label)),
        el("p", el("b", f"{s['successes']}/{s['episodes']}", class_="big"), f" [{100 * low:.1f}, {100 * high:.1f}] %", class_="delta"),
        class_="card open",
    )


# ------------------------------------------------------------------------------------------------------------- success
def success(m: Material) -> Markup:
    by_task: dict[str, dict[tuple[str, int], list[EpisodeRecord]]] = {}
    for name in m.arms:
        for record in m.records(name):
            by_task.setdefault(name, {}).setdefault((record.suite, record.task), []).append(record)
    groups = [("all tasks", {name: m.records(name) for name in m.arms})]
    many = len({suite for suite, _ in m.tasks}) > 1
    for suite, task in m.tasks:
        title = f"{suite} {task}" if many else f"task {task}"
        groups.append((title, {name: by_task[name].get((suite, task), []) for name in m.arms}))
    lows = [_wilson(records)[0] for _, arms in groups for records in arms.values() if _finished(records)]
    scale = charts.success_scale(lows)
    rows, figures = [], []
    for title, arms in groups:
        lanes = [_lane(m, title, name, records, scale) for name, records in arms.items()]
        rows.append(el("div", el("h3", title), el("div", lanes, class_="lanes"), class_="row total" if title == "all tasks" else "row"))
        figures.append([title, *(_figure(records) for records in arms.values())])
    return section(
        "success",
        "Success by task and arm",
        legend(m),
        el("div", rows, el("div", el("span"), charts.axis(scale, "success rate", lambda t: f"{100 * t:g} %"), class_="row foot"), class_="rows"),
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
        return f"0 finished, {errors} errors" if errors else "–"
    low, high = wilson(k, n)
    return f"{k}/{n} [{100 * low:.1f}, {100 * high:.1f}]" + (f", {errors} e" if errors else "")


def _lane(m: Material, title: str, name: str, records: list[EpisodeRecord], scale: charts.Scale) -> Markup:
    k, n, errors = counts(records)
    label = f"{title}, {m.arms[name].label}: {_figure(records)}"
    if not n:
        return el("div", charts.track(*charts.grid_lines(scale), label=label), el("span", "–", class_="count"), class_="lane")
    low, high = wilson(k, n)
    colour = m.colour(name)
    marks = (*charts.grid_lines(scale), charts.interval(scale, low, high, "ci", colour), charts.mark(scale, k / n, "dot", colour))
    count = el("span", f"{k}/{n}", el("em", f" {errors} e") if errors else None, class_="count", title=label)
    return el("div", charts.track(*marks, label=label), count, class_="lane")


# --------------------------------------------------------------------------------------------------------- differences
def _difference_scale(m: Material) -> charts.Scale:
    ends = [x for r in m.compared.values() if r["pairs"] for x in (*r["tango95"], *(r["clusters"]["t95"] or ()))]
    return charts.scale_over(ends or [0.0], include=(-m.margin, 0.0, m.margin))


def _difference(m: Material, name: str, row: dict[str, Any], scale: charts.Scale, clusters: bool = True) -> Markup:
    low, high = row["tango95"]
    t95 = row["clusters"]["t95"] if clusters and "clusters" in row else None
    floor = m.comparison["noise_floor"]
    label = f"Δ {points(row['delta'])} pp, 95 % interval {points(low)} to {points(high)} pp, margin {margin_text(m.margin)}"
    return charts.track(
        charts.interval(scale, *floor["tango95"], kind="floor") if floor and name != floor["arm"] else None,
        charts.interval(scale, scale.low, -m.margin, kind="beyond"),
        charts.mark(scale, -m.margin, "margin"),
        charts.mark(scale, 0, "zero"),
        charts.interval(scale, *t95, kind="wide", colour=m.colour(name)) if t95 else None,
        charts.interval(scale, low, high, "ci", m.colour(name)),
        charts.mark(scale, row["delta"], "dot", m.colour(name)),
        label=label,
        class_="track tall",
    )


def differences(m: Material) -> Markup | None:
    if not m.comparison:
        return None
    rows, figures = [], []
    scale = _difference_scale(m)
    for name, r in m.compared.items():
        if not r["pairs"]:
            continue
        suites = r["suites"] if len(r["suites"]) > 1 else {}
        for title, row in (("", r), *suites.items()):
            label = join(swatch(m, name), r["label"], el("small", title) if title else None)
            low, high = row["tango95"]
            count = el("span", f"{points(row['delta'])} [{points(low)}, {points(high)}]", class_="count")
            rows.append(el("div", el("h3", label), el("div", _difference(m, name, row, scale), count, class_="lane"), class_="row"))
        for suite, row in r["suites"].items():
            figures.append(
                [
                    r["label"], suite, row["pairs"], row["both_succeed"], row["broken"], row["repaired"], row["both_fail"],
                    points(row["delta"], 2), _pp(row["tango95"]), _pp(row["newcombe95"]), p_text(row["mcnemar_p"]),
                    p_text(row["mcnemar_p_holm"]) if "mcnemar_p_holm" in row else "control", p_text(row["noninferiority_p"]),
                    _pp(row["clusters"]["t95"]), _pp(row["clusters"]["bootstrap95"]), row["verdict"],
                ]
            )  # fmt: skip
    head = ["arm", "suite", "pairs", "both succeed", "broken", "repaired", "both fail", "Δ pp", "Tango 95 %", "Newcombe 95 %",
            "McNemar", "Holm", "non-inferiority", "tasks: t 95 %", "tasks: bootstrap 95 %", "verdict"]  # fmt: skip
    tasks = [
        [r["label"], f"{t['suite']} {t['task']}", t["pairs"], t["broken"], t["repaired"], points(t["delta"]), _pp(t["tango95"])]
        for r in m.compared.values()
        for t in r["tasks"]
    ]
    return section(
        "differences",
        "Paired differences",
        el("div", rows, el("div", el("span"), charts.axis(scale, "Δ success, percentage points", _tick), class_="row foot"), class_="rows"),
        numbers("2×2 tables, intervals and p-values", head, figures),
        numbers("By task (descriptive)", ["arm", "task", "pairs", "broken", "repaired", "Δ pp", "Tango 95 %"], tasks, sortable=True),
        lead=f"Arm minus {m.comparison['reference_label']} on the same episodes. Thick bars: 95 % Tango interval for these tasks (unadjusted; "
        "p-values are Holm-adjusted over arms × suites in the table). Thin bars: for tasks like these (whole tasks as units). "
        f"Dashed line: the margin, {margin_text(m.margin)}. Grey band: the noise floor.",
    )


def _tick(delta: float) -> str:
    return "0" if abs(delta) < 1e-9 else points(delta, 0 if abs(100 * delta - round(100 * delta)) < 1e-6 else 1)


def _pp(interval: list[float] | None) -> str:
    return f"[{points(interval[0], 2)}, {points(interval[1], 2)}]" if interval else "–"


# --------------------------------------------------------------------------------------------------------------- flips
CODES = {("success", "success"): "s", ("failure", "failure"): "f", ("success", "failure"): "b", ("failure", "success"): "r"}


def flip_rows(m: Material, arm: str) -> list[str]:
    """Per task a string with one letter per initial state: s both succeed, f both fail, b broken, r repaired, e error,
    u unpaired, · not run."""
    unpaired = {u["key"] for u in m.compared[arm]["unpaired"]}
    columns = flip_columns(m)
    rows = []
    for suite, task in m.tasks:
        row = []
        for init, seed in columns:
            pair = [m.arms[n].records.get(EpisodeKey(suite, task, init, seed)) for n in (m.reference, arm)]
            if None in pair:
                row.append("u" if any(pair) else "·")
            elif str(pair[0].key) in unpaired:
                row.append("u")
            else:
                row.append(CODES.get((pair[0].outcome, pair[1].outcome), "e"))
        rows.append("".join(row))
    return rows


def flip_columns(m: Material) -> list[tuple[int, int]]:
    return sorted({(key.init, key.seed) for arm in m.arms.values() for key in arm.records}, key=lambda c: (c[1], c[0]))


def flips(m: Material) -> Markup | None:
    if not m.comparison:
        return None
    maps = []
    for name, r in m.compared.items():
        rows = flip_rows(m, name)
        text = f"Flips of {r['label']}: {r['broken']} broken, {r['repaired']} repaired of {r['pairs']} pairs. Arrow keys move, Enter plays a video."
        labels = [el("span", str(task)) for _, task in m.tasks]
        grid = el(
            "div", el("div", labels, class_="rowlabels", aria_hidden="true"), _heat(rows, text, name),
            el("div", f"initial state 0 … {max(i for i, _ in flip_columns(m))}", class_="axis-label"), class_="heat",
        )  # fmt: skip
        maps.append(el("figure", el("figcaption", swatch(m, name), r["label"], el("small", f" {r['broken']} broken ▼ {r['repaired']} repaired ▲")), grid))
    key = [("s", "both succeed"), ("b", "broken ▼"), ("r", "repaired ▲"), ("f", "both fail"), ("e", "error"), ("u", "unpaired or not run")]
    return section(
        "flips",
        "Flips: task × initial state",
        el("ul", [el("li", el("span", class_=f"cell k-{code}", aria_hidden="true"), text) for code, text in key], class_="legend"),
        el("div", maps, class_="maps"),
        el("p", "Point at a cell, or focus a map and use the arrow keys.", class_="readout", id="flip-readout", aria_live="polite"),
        lead="One cell per episode. A column of flips is a hard initial state, a row a fragile task, scattered flips are noise.",
    )


def _heat(rows: list[str], label: str, arm: str) -> Markup:
    """All cells of a kind in one path, so that 2,000 episodes are a few kilobytes."""
    width, height = max(map(len, rows)), len(rows)
    cells: dict[str, list[str]] = {}
    for y, row in enumerate(rows):
        for x, code in enumerate(row):
            cells.setdefault(code, []).append(f"M{10 * x + 0.7:g} {10 * y + 0.7:g}h8.6v8.6h-8.6z")
    shapes = [el("path", d="".join(d), class_=f"k-{code if code != '·' else 'u'}") for code, d in sorted(cells.items())]
    arrows = {"b": "M{x} {y}h5l-2.5 4.5z", "r": "M{x} {y}l2.5 -4.5l2.5 4.5z", "e": "M{x} {y}l5 4.5"}
    for code, form in arrows.items():
        drawn = [
            form.format(x=f"{10 * x + 2.5:g}", y=f"{10 * y + (7.2 if code == 'r' else 2.8):g}")
            for y, row in enumerate(rows)
            for x, c in enumerate(row)
            if c == code
        ]
        if drawn:
            shapes.append(el("path", d="".join(drawn), class_=f"arrow a-{code}"))
    shapes.append(el("rect", class_="cursor", width=10, height=10, x=-20, y=0))
    return el(
        "svg", *shapes, viewBox=f"0 0 {10 * width} {10 * height}", preserveAspectRatio="none", role="img", aria_label=label, tabindex="0",
        class_="heatmap", data_arm=arm, style=f"height:{16 * height}px;max-width:{24 * width}px",
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- execution
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
        "div", el("div", [el("span", f"{100 - y} %", style=f"top:{y}%") for y in (0, 25, 50, 75, 100)], class_="ylabels", aria_hidden="true"),
        el("div", charts.plot(*curves, label="Share of episodes that have succeeded by each step, per arm", height=240), *charts.grid_lines(scale), class_="canvas"),
        charts.axis(scale, "control steps (20 per second)", lambda t: f"{t:g}"), class_="xy",
    )  # fmt: skip
    rows = []
    for r in m.compared.values():
        cells = []
        for name in QUALITY:
            q = r["quality"][name]
            shift = el("span", f"{q['reference']:.3g} → {q['arm']:.3g}", class_="nobr") if q else "–"
            cells.append(join(shift, el("span", p_text(q["p"]), class_="p") if q else None))
        d = r["divergence"]
        parted = f"median step {d['median_step']:.0f}, {d['diverged']} of {d['compared']}" if d["diverged"] else f"none of {d['compared']}"
        rows.append([r["label"], *cells, parted if d["compared"] else "–"])
    first = next(iter(m.compared.values()), None)
    return section(
        "execution",
        "Execution",
        legend(m),
        chart,
        table(["arm", *QUALITY.values(), "first divergence of actions"], rows, caption="Reference → arm on paired episodes, p of the paired sign-flip test") if rows else None,
        el("p", f"Actions part where they differ by more than {first['divergence']['threshold']:.3g} ({first['divergence']['threshold_from']}).", class_="fine") if first else None,
        lead="How soon episodes succeed: a curve ends at its arm's success rate. Movement often changes before success does.",
    )
