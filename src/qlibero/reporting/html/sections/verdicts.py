"""The verdicts at the top: a sentence on all arms, a card and a table row for each."""

from __future__ import annotations

from collections import Counter

from qlibero.console import count_text
from qlibero.registry import SectionPlugin
from qlibero.reporting.html import charts
from qlibero.reporting.html.markup import Markup, el, join
from qlibero.reporting.html.report_data import Part, ReportData, planned_episodes
from qlibero.reporting.html.sections.differences import difference, difference_scale
from qlibero.reporting.html.sections.parts import named, numbers, section, unbroken
from qlibero.reporting.html.sections.standing import holm_text, standing
from qlibero.results.comparison import ArmComparison, Comparison
from qlibero.results.controls import NoiseFloor
from qlibero.results.paired_outcomes import Word
from qlibero.results.summary import summarize_arm
from qlibero.results.wording import (
    band_text,
    copies_text,
    delta_text,
    excess_text,
    interval_text,
    p_text,
    percent,
    pooled_text,
    sequential_text,
    speed_text,
)
from qlibero.stats.proportions import tango

PLUGIN = SectionPlugin("verdicts", "what each arm's verdict is", provides="verdicts", order=10)

FEW = 2  # cells of so few arms share one grid of cards
MANY = 6  # more tested arms than this are read in the table; their cards fold their fine print away


def verdicts(m: ReportData) -> Markup:
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


def _headline(m: ReportData) -> str:
    """How many arms are what, and how many of the non-inferior stay so when all of them are counted."""
    tested = {name: m.compared[name] for part in m.parts for name in part.tested}
    if not tested:
        return "Only the reference and its A/A control ran: there is a noise floor and nothing under test."
    if len(tested) == 1:
        return unbroken(next(iter(tested.values())).sentence)
    counts = Counter(r.verdict.word for r in tested.values())
    ordered = [word for word in Word if word in counts]
    pieces = [f"{counts[w]} {w}{f' at {m.margins}' if w == Word.NON_INFERIOR else ''}" for w in ordered]
    text = f"Of {count_text(len(tested), 'tested arm')}: {', '.join(pieces)}."
    fixed = [r for r in tested.values() if r.verdict.word == Word.NON_INFERIOR and r.passed_holm is not None]
    if fixed:
        kept = sum(bool(r.passed_holm) for r in fixed)
        share = "every one" if kept == len(fixed) else f"{kept} of the {len(fixed)}" if kept else "none"
        claims = {r.family for r in fixed}
        over = f"all {claims.pop()} claims" if len(claims) == 1 and len(m.parts) == 1 else "the claims of its cell"
        text += f" Non-inferior after Holm's adjustment for {over}: {share}."
        if not kept and not any(r.adjusted and r.adjusted.possible for r in fixed):
            text += " With so few pairs not even an arm without a flip could pass it."
    return unbroken(text)


def _lead(m: ReportData) -> Markup:
    alone = m.parts[0].comparison if len(m.parts) == 1 else None
    opening: str = "Every arm is compared with the reference of its own cell, on the same episodes"
    if alone:
        n = alone.reference_summary.episodes
        planned = sum(planned_episodes(run) or 0 for run in m.runs if alone.reference in run.arms)
        of = f" of {planned:,} planned" if planned > n else ""
        opening = join(f"Every arm runs the same episodes ({n:,}{of}) as ", el("b", alone.reference_label))
    return join(
        opening,
        ": same scenes, same policy noise. "
        "An arm is non-inferior when the whole 95 % interval of its difference lies above "
        f"{m.margins}. Every term is explained at the end of this page.",
        _floor_text(alone) if alone else None,
    )


def _floor_text(comparison: Comparison) -> str:
    floor = comparison.floor
    again = f" {copies_text(comparison.copies)}" if comparison.copies else ""
    if not floor:
        return again or " There is no A/A arm, so the noise floor is unknown."
    return _band_text(floor) + again


def _band_text(floor: NoiseFloor) -> str:
    again = "against itself (A/A)" if len(floor.arms) == 1 else f"against itself ({len(floor.arms)} A/A arms)"
    band = floor.band(floor.table.pairs // len(floor.arms))[1]
    return unbroken(
        f" The reference {again} flips {percent(floor.discordance)} of its pairs, so rounding alone moves Δ within "
        f"±{100 * band:.1f} pp in 95 % of reruns."
    )


def _part(m: ReportData, part: Part, scale: charts.Scale, many: bool) -> Markup:
    cards = [_card(m, name, scale, many) for name in part.compared] or [_single(m, name) for name in part.arms]
    grid = el("div", cards, class_="cards pairs" if len(part.tested) in (2, 4) else "cards")
    if not part.cell.label:
        return grid
    aside = _floor_text(part.comparison) if part.comparison else " Nothing to compare with."
    return join(el("h3", part.cell.label, el("small", aside), class_="cell-title"), grid)


def _card(m: ReportData, name: str, scale: charts.Scale, folded: bool) -> Markup:
    r = m.compared[name]
    found = standing(r)
    head = el(
        "header",
        el("h3", named(m, name)),
        el("span", el("i", found.glyph, aria_hidden="true"), found.word, class_="chip"),
    )
    if r.estimate is None:
        return el("article", head, el("p", r.sentence), _error_text(r), class_=f"card {found.tone}")
    margin = r.question.margin
    big = el(
        "p",
        el("b", delta_text(*r.estimate, margin), class_="big"),
        " pp ",
        el("span", interval_text(r.estimate.interval, margin)),
        class_="delta",
    )
    facts = [
        (r.table.broken, "broken"),
        (r.table.repaired, "repaired"),
        (f"{r.table.pairs:,}", "pairs"),
        (speed_text(r.speed) or "–", "policy call"),
    ]
    fine = [
        f"{excess_text(r)}; {band_text(r)}." if excess_text(r) else None,
        f"Sharper: {pooled_text(r)}." if pooled_text(r) else None,
        _holm_line(r),
        r.detectable if r.verdict.word.is_open else None,
        f"Sequential test: {sequential_text(r.sequential)}." if r.sequential else None,
    ]
    small = [el("p", unbroken(text), class_="fine") for text in fine if text]
    return el(
        "article",
        head,
        big,
        difference(m, name, r, r.estimate, scale),
        None if r.control else el("dl", [el("div", el("dt", t), el("dd", v)) for v, t in facts], class_="facts"),
        el("p", unbroken(_control_text(r) if r.control else r.sentence), class_="sentence"),
        el("details", el("summary", "What this could have found"), small) if folded and small else small,
        _error_text(r),
        class_=f"card {found.tone}",
    )


def _control_text(r: ArmComparison) -> str:
    t = r.table
    flips = t.broken + t.repaired
    band = tango(flips / 2, flips / 2, t.pairs)[1]
    return (
        f"The same policy again, its sums in another order, not under test: {t.broken} broken, {t.repaired} repaired "
        f"of {count_text(t.pairs, 'pair')}. Its true difference is 0, so this draw's place says nothing and "
        "its flips do: a "
        f"difference within ±{100 * band:.1f} pp arises by rounding alone in 95 % of reruns."
    )


def _holm_line(r: ArmComparison) -> str | None:
    """Why a pass counts, or does not, when all claims of the comparison are counted."""
    if r.verdict.word != Word.NON_INFERIOR or r.passed_holm is None or r.family == 1:
        return None
    says = "still non-inferior" if r.passed_holm else "no longer shown non-inferior"
    holm = holm_text(r)
    return f"Counting all {r.family} claims of this comparison (Holm): {says}, {holm.partition(', ')[2] or holm}."


def _error_text(r: ArmComparison) -> Markup | None:
    parts = []
    e = r.errors
    if e.removed_pairs:
        parts.append(
            f"{count_text(e.removed_pairs, 'pair')} lost to errors "
            f"({e.arm} in this arm, {e.reference} in the reference). "
            f"Were they counted against this arm, the verdict would be: {r.verdict.worst_case}."
        )
    if r.unpaired:
        reasons = Counter(r.unpaired.values())
        first = {reason: next(key for key, why in r.unpaired.items() if why == reason) for reason in reasons}
        told = "; ".join(f"{n} {reason} ({first[reason]}{', …' * (n > 1)})" for reason, n in reasons.most_common(3))
        parts.append(f"{len(r.unpaired)} unpaired: {told}{'; …' * (len(reasons) > 3)}.")
    if r.missing:
        parts.append(f"{count_text(r.missing, 'planned pair')} not run yet.")
    changed = r.verdict.word in (Word.ERRORS, Word.CONFLICT, Word.INTERIM) or r.unpaired
    return el("p", " ".join(parts), class_="fine warn" if changed else "fine") if parts else None


def _table(m: ReportData, open_: bool) -> Markup:
    """Best first, and sortable by any column."""
    rows = []
    for name, r in sorted(m.compared.items(), key=lambda item: -(item[1].delta if item[1].delta is not None else -2)):
        found, shown = standing(r), "–"
        if r.estimate:
            margin = r.question.margin
            shown = f"{delta_text(*r.estimate, margin)} {interval_text(r.estimate.interval, margin)}"
        rows.append(
            [
                named(m, name),
                el("span", found.word, class_=f"word {found.tone}"),
                _nobr(shown),
                f"{r.table.broken} / {r.table.repaired} of {r.table.pairs:,}",
                _sorts(holm_text(r) or "–", r.adjusted.noninferiority_p if r.adjusted else None),
                _sorts(p_text(r.adjusted.mcnemar_p), r.adjusted.mcnemar_p) if r.adjusted else "–",
                "–" if r.control else _sorts(_nobr(speed_text(r.speed) or "–"), _claimed_ratio(r)),
            ]
        )
    head = [
        "arm",
        "verdict",
        "Δ pp, 95 %",
        "broken / repaired",
        "non-inferior after Holm",
        "Δ = 0, Holm",
        "policy call",
    ]
    return numbers("Verdicts as a table, best first", head, rows, open_=open_, stacked=True, sortable=True)


def _nobr(text: str) -> Markup:
    return el("span", text, class_="nobr")


def _sorts(shown: str | Markup, value: float | None) -> Markup:
    """A cell that does not begin with the number by which its column sorts."""
    return el("span", shown, data_value=value)


def _claimed_ratio(r: ArmComparison) -> float | None:
    """None without an interval and for a simulation, which claims no speed."""
    return None if r.speed.claim == "simulation" or r.speed.interval is None else r.speed.ratio


def _single(m: ReportData, name: str) -> Markup:
    s = summarize_arm(m.records(name))
    low, high = s.wilson95 or (0, 1)
    return el(
        "article",
        el("header", el("h3", named(m, name))),
        el(
            "p",
            el("b", f"{s.successes}/{s.episodes}", class_="big"),
            f" [{100 * low:.1f}, {100 * high:.1f}] %",
            class_="delta",
        ),
        class_="card open",
    )
