"""The verdicts at the top: a sentence on all arms, a card and a table row for each."""

from __future__ import annotations

from collections import Counter
from typing import Any

from qlibero.reporting import charts
from qlibero.reporting.markup import Markup, el, join
from qlibero.reporting.material import Material, Part, planned_episodes
from qlibero.reporting.sections.differences import difference, difference_scale
from qlibero.reporting.sections.parts import named, numbers, section, unbroken
from qlibero.reporting.sections.standing import holm_text, standing, survives_holm
from qlibero.results.phrases import p_text, percent, points, sequential_text, speed_text
from qlibero.results.summary import summarize_arm

FEW = 2  # cells of so few arms share one grid of cards
MANY = 6  # more tested arms than this are read in the table; their cards fold their fine print away


def verdicts(m: Material) -> Markup:
    if not m.compared:
        return section("verdicts", "Result", el("div", [_single(m, name) for name in m.arms], class_="cards"))
    scale = difference_scale(m)
    many = len(m.compared) > MANY
    if len(m.parts) > 1 and max(len(part.tested) for part in m.parts) <= FEW:  # labels tell their cells apart
        tested = [_card(m, name, scale, many) for part in m.parts for name in part.tested]
        blocks = [el("div", tested, class_="cards")]
    else:
        blocks = [_part(m, part, scale, many) for part in m.parts]
    facts = _table(m, many)
    return section(
        "verdicts",
        "Verdicts",
        el("p", _headline(m), class_="headline"),
        el("p", _lead(m), class_="lead"),
        *((facts, *blocks) if many else (*blocks, facts)),
    )


def _headline(m: Material) -> str:
    """How many arms are what, and how many of the non-inferior stay so when all of them are counted."""
    tested = {name: m.compared[name] for part in m.parts for name in part.tested}
    if not tested:
        return "Only the reference and its A/A control ran: there is a noise floor and nothing under test."
    if len(tested) == 1:
        only = next(iter(tested.values()))
        kept = only["verdict"] != "non-inferior" or only["sequential"] or survives_holm(only)
        return unbroken(
            only["sentence"] + ("" if kept else f" After Holm's adjustment: non-inferior {holm_text(only)}.")
        )
    counts = Counter(r["verdict"] for r in tested.values())
    pieces = [
        f"{counts.pop(verdict)} {verdict}{'' if verdict != 'non-inferior' else f' at {m.margins}'}"
        for verdict in ("non-inferior", "inferior")
        if verdict in counts
    ]
    pieces += [f"{n} {verdict}" for verdict, n in counts.items()]
    text = f"Of {len(tested)} tested arms: {', '.join(pieces)}."
    fixed = [r for r in tested.values() if r["verdict"] == "non-inferior" and not r["sequential"]]
    if fixed:
        kept = sum(map(survives_holm, fixed))
        suites = max(len(r["suites"]) for r in fixed)
        family = (
            f"all {len(tested)} arms" if len(m.parts) == 1 else "the arms of its cell"
        ) + f" × {suites} suites" * (suites > 1)
        share = "every one" if kept == len(fixed) else f"{kept} of the {len(fixed)}" if kept else "none"
        text += f" Non-inferior after Holm's adjustment for {family}: {share}."
    return unbroken(text)


def _lead(m: Material) -> Markup:
    alone = m.parts[0] if len(m.parts) == 1 else None
    opening = "Every arm is compared with the reference of its own cell, on the same episodes"
    if alone:
        n = alone.comparison["reference_summary"]["episodes"]
        planned = sum(planned_episodes(run) or 0 for run in m.runs if alone.comparison["reference"] in run.arms)
        of = f" of {planned:,} planned" if planned and planned != n else ""
        opening = join(f"Every arm runs the same episodes ({n:,}{of}) as ", el("b", m.arms[alone.reference].label))
    return join(
        opening,
        ": same scenes, same policy noise. "
        "An arm is non-inferior when the whole 95 % interval of its difference lies above "
        f"{m.margins}.",
        _floor_text(alone.comparison["noise_floor"]) if alone else None,
    )


def _floor_text(floor: dict[str, Any] | None) -> str:
    if not floor:
        return " There is no A/A arm, so the noise floor is unknown."
    low, high = floor["tango95"]
    return unbroken(
        f" The reference against itself (A/A) flips {percent(floor['discordance'])} of its pairs: "
        f"Δ {points(floor['delta'])} pp [{points(low)}, {points(high)}]. That is the noise floor."
    )


def _part(m: Material, part: Part, scale: charts.Scale, many: bool) -> Markup:
    cards = [_card(m, name, scale, many) for name in part.compared] or [_single(m, name) for name in part.arms]
    grid = el("div", cards, class_="cards pairs" if len(part.tested) in (2, 4) else "cards")
    if not part.cell.label:
        return grid
    floor = part.comparison and part.comparison["noise_floor"]
    aside = _floor_text(floor) if part.comparison else " Nothing to compare with."
    return join(el("h3", part.cell.label, el("small", aside), class_="cell-title"), grid)


def _card(m: Material, name: str, scale: charts.Scale, folded: bool) -> Markup:
    r = m.compared[name]
    found = standing(r)
    head = el(
        "header",
        el("h3", named(m, name)),
        el("span", el("i", found.glyph, aria_hidden="true"), found.word, class_="chip"),
    )
    if not r["pairs"]:
        return el("article", head, el("p", r["sentence"]), _error_text(r), class_=f"card {found.tone}")
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
    fine = [
        _holm_line(m, name),
        None if r["control"] else r["detectable"]["line"],
        f"Sequential test: {sequential_text(r['sequential'])}." if r["sequential"] else None,
    ]
    small = [el("p", unbroken(text), class_="fine") for text in fine if text]
    return el(
        "article",
        head,
        big,
        difference(m, name, r, scale),
        None if r["control"] else el("dl", [el("div", el("dt", t), el("dd", v)) for v, t in facts], class_="facts"),
        el("p", unbroken(_control_text(m, name) if r["control"] else r["sentence"]), class_="sentence"),
        el("details", el("summary", "What this could have found"), small) if folded and small else small,
        _error_text(r),
        class_=f"card {found.tone}",
    )


def _control_text(m: Material, name: str) -> str:
    r = m.compared[name]
    return (
        "The same policy again in batches of another size, not under test: "
        f"{r['broken']} broken, {r['repaired']} repaired of {r['pairs']} pairs is what rounding alone does. "
        "Differences inside this interval need no other cause."
    )


def _holm_line(m: Material, name: str) -> str | None:
    """Why a pass counts, or does not, when all tests of the comparison are counted."""
    r, part = m.compared[name], m.part_of(name)
    if r["verdict"] != "non-inferior" or r["control"] or r["sequential"]:
        return None
    family = sum(len(m.compared[id_]["suites"]) for id_ in part.tested)
    if family == 1:
        return None
    says = "still non-inferior" if survives_holm(r) else "no longer shown non-inferior"
    holm = holm_text(r)
    return f"Counting all {family} tests of this comparison (Holm): {says}, {holm.partition(', ')[2] or holm}."


def _error_text(r: dict[str, Any]) -> Markup | None:
    parts = []
    e = r["errors"]
    if e["removed_pairs"]:
        parts.append(
            f"{e['removed_pairs']} pair{'s' * (e['removed_pairs'] > 1)} lost to errors "
            f"({e['arm']} in this arm, {e['reference']} in the reference). "
            f"Were they counted against this arm, the verdict would be: {e['worst_case_verdict']}."
        )
    if r["unpaired"]:
        reasons = Counter(u["reason"] for u in r["unpaired"])
        first = {reason: next(u["key"] for u in r["unpaired"] if u["reason"] == reason) for reason in reasons}
        told = "; ".join(f"{n} {reason} ({first[reason]}{', …' * (n > 1)})" for reason, n in reasons.most_common(3))
        parts.append(f"{len(r['unpaired'])} unpaired: {told}{'; …' * (len(reasons) > 3)}.")
    changed = r["verdict"] == "inconclusive (errors)" or r["unpaired"]
    return el("p", " ".join(parts), class_="fine warn" if changed else "fine") if parts else None


def _table(m: Material, open_: bool) -> Markup:
    rows = []
    for name, r in m.compared.items():
        found = standing(r)
        interval = r["tango95"]
        suites = list(r["suites"].values())
        mcnemar = p_text(suites[0]["mcnemar_p_holm"]) if len(suites) == 1 and not r["control"] else "–"
        rows.append(
            [
                named(m, name),
                el("span", found.word, class_=f"word {found.tone}"),
                _nobr(f"{points(r['delta'])} [{points(interval[0])}, {points(interval[1])}]" if interval else "–"),
                f"{r['broken']} / {r['repaired']} of {r['pairs']:,}",
                "–" if r["sequential"] else holm_text(r) or "–",
                mcnemar,
                _nobr("–" if r["control"] else speed_text(r["speedup_p50"]) or "–"),
            ]
        )
    head = [
        "arm",
        "verdict",
        "Δ pp, 95 %",
        "broken / repaired",
        "non-inferior after Holm",
        "McNemar, Holm",
        "policy call",
    ]
    return numbers("Verdicts as a table", head, rows, open_=open_, stacked=True)


def _nobr(text: str) -> Markup:
    return el("span", text, class_="nobr")


def _single(m: Material, name: str) -> Markup:
    s = summarize_arm(m.records(name))
    low, high = s["wilson95"] or (0, 1)
    return el(
        "article",
        el("header", el("h3", named(m, name))),
        el(
            "p",
            el("b", f"{s['successes']}/{s['episodes']}", class_="big"),
            f" [{100 * low:.1f}, {100 * high:.1f}] %",
            class_="delta",
        ),
        class_="card open",
    )
