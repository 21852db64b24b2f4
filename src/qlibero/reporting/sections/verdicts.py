"""The verdict cards at the top: what each arm's comparison says, in a word, a number and a sentence."""

from __future__ import annotations

from typing import Any

from qlibero.reporting import charts
from qlibero.reporting.markup import Markup, el, join
from qlibero.reporting.material import Material
from qlibero.reporting.sections.differences import difference, difference_scale
from qlibero.reporting.sections.parts import section, swatch, unbroken
from qlibero.results.phrases import margin_text, percent, points, sequential_text, speed_text
from qlibero.results.summary import summarize_arm

GLYPHS = {"non-inferior": ("✓", "good"), "inferior": ("✕", "bad")}  # anything else: ("?", "open")


def verdicts(m: Material) -> Markup:
    if not m.comparison:
        return section("verdicts", "Result", el("div", [_single(m, name) for name in m.arms], class_="cards"))
    scale = difference_scale(m)
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
    head = el(
        "header",
        el("h3", swatch(m, name), r["label"]),
        el("span", el("i", glyph, aria_hidden="true"), _chip(r), class_="chip"),
    )
    if not r["pairs"]:
        return el("article", head, el("p", r["sentence"]), class_=f"card {tone}")
    low, high = r["tango95"]
    big = el(
        "p",
        el("b", points(r["delta"]), class_="big"),
        " pp ",
        el("span", f"[{points(low)}, {points(high)}]"),
        class_="delta",
    )
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
        difference(m, name, r, scale),
        el("dl", [el("div", el("dt", term), el("dd", value)) for value, term in facts], class_="facts"),
        el("p", unbroken(r["sentence"]), class_="sentence"),
        el("p", unbroken(r["detectable"]["line"]), class_="fine"),
        el("p", unbroken(f"Sequential test: {sequential_text(r['sequential'])}."), class_="fine")
        if r["sequential"]
        else None,
        _error_text(r),
        class_=f"card {tone}",
    )


def _chip(r: dict[str, Any]) -> str:
    if r["control"]:
        return "A/A control"
    return (
        r["verdict"]
        if not r["qualifier"]
        else "better"
        if r["qualifier"] == "better"
        else f"{r['verdict']}, {r['qualifier']}"
    )


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


def _single(m: Material, name: str) -> Markup:
    s = summarize_arm(m.records(name))
    low, high = s["wilson95"] or (0, 1)
    return el(
        "article",
        el("header", el("h3", swatch(m, name), m.arms[name].label)),
        el(
            "p",
            el("b", f"{s['successes']}/{s['episodes']}", class_="big"),
            f" [{100 * low:.1f}, {100 * high:.1f}] %",
            class_="delta",
        ),
        class_="card open",
    )
