"""A comparison as tables for a terminal: verdict, difference and interval first, then what they rest on."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlibero.console import count_text
from qlibero.reporting.execution_text import QUALITY, shift_text
from qlibero.reporting.rich_tables import COLOURS, OPEN, bare_p, fixed_column, titled_table, word_text
from qlibero.results.axes import UNPERTURBED
from qlibero.results.comparison import ArmComparison, Comparison, Row
from qlibero.results.execution import Divergence, Shift
from qlibero.results.external_results import ExternalComparison
from qlibero.results.paired_outcomes import Word
from qlibero.results.wording import (
    band_text,
    copies_text,
    delta_text,
    excess_text,
    interval_text,
    margin_text,
    pooled_text,
    sequential_text,
    speed_text,
)
from qlibero.stats.sampling import population


def comparison_tables(found: Comparison) -> Group:
    """Verdicts per arm and suite, then what they rest on, execution quality, and one sentence per arm."""
    parts: list[RenderableType] = [_verdicts(found), _evidence(found)]
    parts += [table for table in (_speeds(found), _quality(found)) if table is not None]
    for arm in found.arms.values():
        parts.append(Text(arm.sentence, style=COLOURS.get(arm.verdict.word, OPEN)))
        more = [excess_text(arm), band_text(arm), pooled_text(arm)]
        if arm.verdict.word.is_open:
            more.append(arm.detectable)
        if arm.sequential:
            more.append(f"Sequential: {sequential_text(arm.sequential)}")
        parts += [Text(f"  {line}", style="dim") for line in more if line]
        unpaired = list(arm.unpaired.items())
        parts += [Text(f"  unpaired: {key}, {reason}", style=OPEN) for key, reason in unpaired[:5]]
        if len(unpaired) > 5:
            parts.append(Text(f"  and {len(unpaired) - 5} more unpaired; the JSON lists every one", style=OPEN))
    for problem in (problem for run in found.arithmetic for problem in run.problems):
        parts.append(Text(problem if "NOT THE" in problem else f"{problem} (NOT THE SAME ARITHMETIC)", style="red"))
    if found.copies:
        parts.append(Text(copies_text(found.copies), style="yellow"))
    elif not found.floor:
        parts.append(Text("Noise floor unknown: add the arm `aa` (the reference again) to measure it.", style="dim"))
    if conflicts := found.ledger.conflicting_episodes:
        parts.append(
            Text(
                f"{count_text(len(conflicts), 'episode')} ran twice with different results "
                f"(the later one counts here): {', '.join(conflicts[:3])}{'' if len(conflicts) <= 3 else ' and more'}",
                style="red",
            )
        )
    parts.append(Text("Every term is explained in docs/statistics.md.", style="dim"))
    return Group(*parts)


def _verdicts(found: Comparison) -> Table:
    tasks = max((len(arm.tasks) for arm in found.arms.values()), default=0)
    table = titled_table(
        f"against {found.reference_label}, margin {margin_text(found.margin)}: Δ in pp, 95 % interval (unadjusted) for "
        f"{population(found.question.estimand, tasks)}",
        "arm",
    )
    for title in ("verdict", "Δ", "95 % interval", "broken/repaired of pairs"):
        fixed_column(table, title, "left" if title == "verdict" else "right")
    table.columns[-1].no_wrap = False  # the heading may break, its numbers do not reach its width
    for name, row in _rows(found):
        if row.estimate is None:
            table.add_row(name, word_text(row.verdict.word), "", "", "0")
            continue
        shown = word_text(row.verdict.word)
        if row.adjusted and not row.adjusted.passed and row.verdict.word == Word.NON_INFERIOR:
            shown.append("\n(not after Holm)", style=OPEN)
        t = row.table
        table.add_row(
            name,
            shown,
            delta_text(*row.estimate, found.margin),
            interval_text(row.estimate.interval, found.margin),
            f"{t.broken}/{t.repaired} of {t.pairs:,}",
        )
    return table


def _rows(found: Comparison) -> list[tuple[str, Row]]:
    """A line for every arm, and beneath it one for each perturbation axis and suite where there are several."""
    rows: list[tuple[str, Row]] = []
    for arm in found.arms.values():
        rows.append((arm.label, arm))
        rows += [(f"  by {axis}" if axis != UNPERTURBED else f"  {axis}", row) for axis, row in arm.axes.items()]
        if len(arm.suites) > 1:
            rows += [(f"  {suite}", row) for suite, row in arm.suites.items()]
    return rows


def _evidence(found: Comparison) -> Table:
    """The p-values behind the verdicts; a control is no hypothesis."""
    adjusted = f"after Holm over {found.family}" if found.family > 1 else "after Holm"
    table = titled_table(
        f"p-values: Δ = 0 and Δ ≤ {margin_text(found.margin)}, each {adjusted}; Δ for new tasks", "arm"
    )
    for title in ("Δ = 0", "Holm", "margin", "Holm", "new tasks"):
        fixed_column(table, title, "right")
    for name, row in _rows(found):
        if not row.table.pairs:
            continue
        own, holm = row.seen, row.adjusted
        table.add_row(
            name,
            bare_p(own.difference_p),
            bare_p(holm.mcnemar_p) if holm else "",
            bare_p(row.noninferiority_p),
            bare_p(holm.noninferiority_p) if holm and row.noninferiority_p is not None else "",
            interval_text(new_tasks, found.margin) if (new_tasks := row.over_new_tasks) else "",
        )
    return table


def _speeds(found: Comparison) -> Table | None:
    table = titled_table(f"a policy call against {found.reference_label}: median per scene at equal batch size", "arm")
    table.add_column("speed, 95 % interval over scenes", overflow="fold")
    for arm in found.arms.values():
        if not arm.control and (text := speed_text(arm.speed)):
            table.add_row(arm.label, text)
    return table if table.row_count else None


def _quality(found: Comparison) -> Table | None:
    table = titled_table(
        "execution on paired episodes: shift with 95 % interval, and whether it is beyond A/A's", "arm, measure"
    )
    for title in ("reference → arm", "shift", "vs A/A"):
        fixed_column(table, title, "right")
    for arm in found.arms.values():
        measured = [(QUALITY[name], shift) for name, shift in arm.quality.items() if shift]
        if measured or arm.divergence.compared:
            table.add_row(arm.label)
        for title, shift in measured:
            between = f"{shift.reference:.3g} → {shift.arm:.3g}"
            table.add_row(f"  {title}", between, shift_text(shift), _beyond(arm, shift))
        if arm.divergence.compared:
            table.add_row("  actions diverge at", _diverged(arm.divergence))
    return table if table.row_count else None


def _beyond(arm: ArmComparison, shift: Shift) -> str:
    if arm.control or shift.beyond_floor is None:
        return ""
    return "beyond" if shift.beyond_floor else "within"


def _diverged(d: Divergence) -> str:
    if not d.diverged:
        return f"never (0/{d.compared})"
    return f"step {d.median_step:.0f} ({d.diverged}/{d.compared})"


def external_table(found: ExternalComparison) -> Group:
    """Results of other tools: what was compared how, and one sentence each."""
    table = titled_table(f"against {found.reference}, margin {margin_text(found.margin)}", "result")
    for title in ("verdict", "Δ pp", "95 % interval", "successes", "p"):
        fixed_column(table, title)
    for name, r in found.arms.items():
        delta, interval = "", ""
        if r.estimate is not None:
            delta = delta_text(*r.estimate, found.margin)
            interval = interval_text(r.estimate.interval, found.margin)
        p = "" if r.p is None else bare_p(r.p)
        table.add_row(name, word_text(r.verdict.word), delta, interval, "/".join(map(str, r.counts)), p)
    lines = [line for r in found.arms.values() for line in (r.sentence, f"  {r.tool}, {r.method}. {r.detectable}")]
    return Group(table, *(Text(line, style="dim") for line in lines))
