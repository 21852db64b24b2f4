"""The end of a run and a comparison as tables for a terminal: whole at 80 columns, wider where nobody is at one.

Verdict, difference and interval stand first and are never cut; what explains them follows in tables of its own.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from qlibero.console import console
from qlibero.places import pasteable
from qlibero.results.arm_equality import rechecks, same_arithmetic
from qlibero.results.axes import UNPERTURBED
from qlibero.results.compare import compare
from qlibero.results.comparison import ArmComparison, Comparison, Row
from qlibero.results.execution import MEASURES, Divergence, Shift
from qlibero.results.external_results import ForeignComparison
from qlibero.results.paired_outcomes import Word
from qlibero.results.published import CountsComparison
from qlibero.results.runs import REFERENCE, RunResults, read_run, video_path
from qlibero.results.summary import calls, counts, summarize_arm
from qlibero.results.wording import (
    band_text,
    copies_text,
    delta_text,
    excess_text,
    interval_text,
    margin_text,
    p_text,
    pooled_text,
    sequential_text,
    speed_text,
)
from qlibero.stats.proportions import wilson
from qlibero.stats.sampling import population

COLOURS = {Word.NON_INFERIOR: "green", Word.INFERIOR: "red", Word.WORSE: "red", Word.NOISE_FLOOR: "cyan"}
OPEN = "yellow"
SAVES_NOTHING = {
    "fake": "fake carries unpacked integers; a packed kernel saves",
    "int_ref": "the reference keeps unpacked integers",
    "w8a8": "w8a8 keeps a byte a code",
    "dequantized": "16-bit activations: dequantized weights",
}
QUALITY = {
    "time_to_success": "time to success",
    "steps_to_success": "steps, both succeed",
    "path_length_m": "path (m)",
    "gripper_flips": "gripper flips",
    "jerk": "jerk (m/s³)",
}
assert tuple(QUALITY) == MEASURES
SUCCESS_COLUMN = 28  # room for "100/100 [96.3, 100.0], 1 error"


def print_run(run_dir: Path | str, to: Console | None = None, reference: str = REFERENCE) -> None:
    """What a finished (or interrupted) run shows: success, flips, latency, simulator time, and where things lie."""
    run, to = read_run(run_dir), to or console()
    for table in success_tables(run, to.width):
        to.print(table)
    if reference in run.arms and len(run.arms) > 1:
        to.print(comparison_tables(compare([run], reference)))
    for same in same_arithmetic(run):
        to.print(Text(str(same), style="green" if same.ok else "red"))
    for name in run.arms:
        if found := rechecks(run.run_dir, name):
            to.print(Text(_tried_again(name, found), style="red" if found["wrong"] else "green"))
    to.print(cost_table(run))
    if (memory := memory_table(run)).row_count:
        to.print(memory)
    to.print(_places(run))


def _tried_again(name: str, found: dict[str, Any]) -> str:
    if found["wrong"]:
        return "\n".join(f"{name}: {text} (NOT THE SAME ARITHMETIC)" for text in found["wrong"])
    repeated = f"{found['repeated']} of {found['calls']:,} policy calls were repeated with `fake`"
    return (
        f"{name}: its kernels gave the reference's integers in {found['products']:,} products of {found['layers']} "
        f"layers after the run; {repeated}" + (", with equal actions" if found["repeated"] else "")
    )


def print_comparison(
    cells: Mapping[str, Comparison | ForeignComparison | CountsComparison], to: Console | None = None
) -> None:
    """What `qlibero compare` shows for people, cell by cell."""
    to = to or console()
    for label, cell in cells.items():
        if label:
            to.print(Text(f"\n{label}", style="bold"))
        if isinstance(cell, CountsComparison):
            to.print(Group(*(Text(arm.sentence) for arm in cell.arms.values())))
        else:
            to.print(_foreign(cell) if isinstance(cell, ForeignComparison) else comparison_tables(cell))


def _foreign(found: ForeignComparison) -> Group:
    """Results of other tools: what was compared how, and one sentence each."""
    table = _table(f"against {found.reference}, margin {margin_text(found.margin)}", "result")
    for title in ("verdict", "Δ pp", "95 % interval", "successes", "p"):
        _column(table, title)
    for name, r in found.arms.items():
        delta, interval = (
            ("", "")
            if r.interval is None
            else (delta_text(r.delta, r.interval, found.margin), interval_text(r.interval, found.margin))
        )
        p = "" if r.p is None else _p(r.p)
        table.add_row(name, _shown(r.verdict.word), delta, interval, "/".join(map(str, r.counts)), p)
    lines = [line for r in found.arms.values() for line in (r.sentence, f"  {r.tool}, {r.method}. {r.detectable}")]
    return Group(table, *(Text(line, style="dim") for line in lines))


def success_tables(run: RunResults, width: int) -> list[Table]:
    """k/n with Wilson interval, per task and arm; errors beside, never inside. As many arms a table as fit."""
    cells: dict[str, dict] = {name: {} for name in run.arms}
    for name, arm in run.arms.items():
        for record in arm.records:
            cells[name].setdefault((record.suite, record.task), []).append(record)
    tasks = sorted({task for of_arm in cells.values() for task in of_arm})
    beside = max((len(f"{suite} {task}") for suite, task in tasks), default=0) + 2
    each = max(1, (width - beside) // SUCCESS_COLUMN)
    names = list(run.arms)
    tables = []
    for start in range(0, len(names), each):
        some = names[start : start + each]
        table = _table("" if start else f"{run.name}: successes, 95 % Wilson intervals", "task")
        for name in some:
            table.add_column(str(run.arms[name].meta.get("label") or name), justify="right", overflow="fold")
        for suite, task in tasks:
            table.add_row(f"{suite} {task}", *(_success(cells[name].get((suite, task), [])) for name in some))
        if len(tasks) > 1:
            table.add_section()
            table.add_row("all", *(_success(run.arms[name].records) for name in some), style="bold")
        tables.append(table)
    return tables


def _success(records: list) -> str:
    if not records:
        return "–"
    k, n, errors = counts(records)
    low, high = wilson(k, n) if n else (0.0, 1.0)
    return f"{k}/{n} [{100 * low:.1f}, {100 * high:.1f}]" + (f", {errors} error{'s' * (errors > 1)}" if errors else "")


def cost_table(run: RunResults) -> Table:
    """Latency of a policy call, a batch's time counted once, and simulator time, per arm."""
    table = _table("ms per policy call (warm-up left out); simulator and rendering s per episode", "arm")
    for title in ("calls", "p50", "p95", "p99", "simulator", "rendering", "steps"):
        _column(table, title, "right")
    for name, arm in run.arms.items():
        finished = [r for r in arm.records if r.outcome != "error"]
        if not finished:
            continue
        latency = summarize_arm(arm.records)["latency_ms"] or {}
        table.add_row(
            str(arm.meta.get("label") or name),
            f"{calls(arm.records):,.0f}",
            *(f"{latency[p]:.1f}" if latency else "–" for p in ("p50", "p95", "p99")),
            *(f"{np.mean([getattr(r, field) for r in finished]) / 1e3:.1f}" for field in ("sim_ms", "render_ms")),
            f"{np.mean([r.steps for r in finished]):.0f}",
        )
    return table


def memory_table(run: RunResults) -> Table:
    """What each arm's quantized linears occupy (live bytes, measured when the arm was loaded) beside the bf16
    bytes of the same linears, which are what the baseline would need for them."""
    table = _table("MB of the quantized linears; the same linears in bf16", "arm")
    for title in ("kept", "bf16", "ratio", "with transforms"):
        _column(table, title, "right")
    table.add_column("", overflow="fold")
    for name, arm in run.arms.items():
        found = arm.meta.get("memory")
        if not found or not found["bf16_bytes"]:
            continue
        kept, bf16 = found["weight_bytes"] + found["scale_bytes"], found["bf16_bytes"]
        executed = {kernel["kernel"] for kernel in (arm.meta.get("kernels") or {}).values()}
        table.add_row(
            str(arm.meta.get("label") or name),
            f"{kept / 1e6:.2f}",
            f"{bf16 / 1e6:.2f}",
            f"{kept / bf16:.2f}",
            f"{(kept + found['transform_bytes']) / bf16:.2f}",
            "; ".join(SAVES_NOTHING[kernel] for kernel in sorted(executed & SAVES_NOTHING.keys())),
        )
    return table


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
    for problem in found.arithmetic["problems"]:
        parts.append(Text(problem if "NOT THE" in problem else f"{problem} (NOT THE SAME ARITHMETIC)", style="red"))
    if found.copies:
        parts.append(Text(copies_text(found.copies), style="yellow"))
    elif not found.floor:
        parts.append(Text("Noise floor unknown: add the arm `aa` (the reference again) to measure it.", style="dim"))
    if conflicts := found.ledger.conflicting_episodes:
        one = len(conflicts) == 1
        parts.append(
            Text(
                f"{len(conflicts)} episode{'' if one else 's'} ran twice with different results "
                f"(the later one counts here): {', '.join(conflicts[:3])}{'' if len(conflicts) <= 3 else ' and more'}",
                style="red",
            )
        )
    parts.append(Text("Every term is explained in docs/statistics.md.", style="dim"))
    return Group(*parts)


def _verdicts(found: Comparison) -> Table:
    tasks = max((len(arm.tasks) for arm in found.arms.values()), default=0)
    table = _table(
        f"against {found.reference_label}, margin {margin_text(found.margin)}: Δ in pp, 95 % interval (unadjusted) for "
        f"{population(found.question.estimand, tasks)}",
        "arm",
    )
    for title in ("verdict", "Δ", "95 % interval", "broken/repaired of pairs"):
        _column(table, title, "left" if title == "verdict" else "right")
    table.columns[-1].no_wrap = False  # the heading may break, its numbers do not reach its width
    for name, row in _rows(found):
        if not row.table.pairs:
            table.add_row(name, _shown(row.verdict.word), "", "", "0")
            continue
        shown = _shown(row.verdict.word)
        if row.adjusted and not row.adjusted.passed and row.verdict.word == Word.NON_INFERIOR:
            shown.append("\n(not after Holm)", style=OPEN)
        t = row.table
        table.add_row(
            name,
            shown,
            delta_text(row.delta, row.interval, found.margin),
            interval_text(row.interval, found.margin),
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
    table = _table(f"p-values: Δ = 0 and Δ ≤ {margin_text(found.margin)}, each {adjusted}; Δ for new tasks", "arm")
    for title in ("Δ = 0", "Holm", "margin", "Holm", "new tasks"):
        _column(table, title, "right")
    for name, row in _rows(found):
        if not row.table.pairs:
            continue
        own, holm = row.seen, row.adjusted
        table.add_row(
            name,
            _p(own.difference_p),
            _p(holm.mcnemar_p) if holm else "",
            _p(row.noninferiority_p),
            _p(holm.noninferiority_p) if holm and row.noninferiority_p is not None else "",
            interval_text(row.new_tasks.interval, found.margin) if row.new_tasks.clusters != 1 else "",
        )
    return table


def _p(p: float | None) -> str:
    return "" if p is None else p_text(p).removeprefix("p ").removeprefix("= ")


def _speeds(found: Comparison) -> Table | None:
    table = _table(f"a policy call against {found.reference_label}: median per scene at equal batch size", "arm")
    table.add_column("speed, 95 % interval over scenes", overflow="fold")
    for arm in found.arms.values():
        if not arm.control and (text := speed_text(arm.speed)):
            table.add_row(arm.label, text)
    return table if table.row_count else None


def _quality(found: Comparison) -> Table | None:
    table = _table("execution on paired episodes: shift with 95 % interval, and whether it is beyond A/A's", "arm")
    for title in ("measure", "reference → arm", "shift", "vs A/A"):
        _column(table, title, "left" if title == "measure" else "right")
    for arm in found.arms.values():
        measured = [(QUALITY[name], shift) for name, shift in arm.quality.items() if shift]
        for i, (title, shift) in enumerate(measured):
            between = f"{shift.reference:.3g} → {shift.arm:.3g}"
            table.add_row(arm.label if i == 0 else "", title, between, shift_text(shift), _beyond(arm, shift))
        if arm.divergence.compared:
            table.add_row("" if measured else arm.label, "actions diverge at", _diverged(arm.divergence), "", "")
    return table if table.row_count else None


def shift_text(shift: Shift) -> str:
    """'+3.1 [+0.4, +5.8]'."""
    if shift.interval95 is None:
        return _signed(shift.shift)
    return f"{_signed(shift.shift)} [{', '.join(map(_signed, shift.interval95))}]"


def _signed(x: float) -> str:
    return f"{x:+.2g}".replace("-", "−") if abs(x) < 10 else f"{x:+.0f}".replace("-", "−")


def _beyond(arm: ArmComparison, shift: Shift) -> str:
    if arm.control or shift.beyond_floor is None:
        return ""
    return "beyond" if shift.beyond_floor else "within"


def _diverged(d: Divergence) -> str:
    if not d.diverged:
        return f"never (0/{d.compared})"
    return f"step {d.median_step:.0f} ({d.diverged}/{d.compared})"


def _places(run: RunResults) -> Group:
    lines = [f"ledger   {run.run_dir}/<arm>/episodes-*.jsonl"]
    videos = sum(video_path(run.run_dir, r).exists() for arm in run.arms.values() for r in arm.records)
    if videos:
        lines.append(f"videos   {run.run_dir}/<arm>/videos/ ({videos})")
    mirrors = sorted({path.parent for path in run.run_dir.glob("*/wandb/*run-*")})
    if mirrors:
        lines.append(f"wandb    wandb sync {shlex.quote(str(run.run_dir))}/*/wandb/offline-run-*")
    lines.append(f"report   qlibero report {shlex.quote(str(run.run_dir))}")
    return Group(*(Text(pasteable(line)) for line in lines))


def _shown(word: Word) -> Text:
    return Text(word, style=COLOURS.get(word, OPEN))


class _Titled(Table):
    """A table under a `heading` that may be wider than it."""

    heading = ""

    def __rich_console__(self, to: Console, options: ConsoleOptions) -> RenderResult:
        if self.heading:
            yield Text(self.heading, style="italic")
        yield from super().__rich_console__(to, options)


def _table(title: str, first: str) -> Table:
    """A table whose first column, names, folds where room is short; `_column` adds those that never do."""
    table = _Titled(box=None, pad_edge=False, header_style="bold")
    table.heading = title
    table.add_column(first, overflow="fold")
    return table


def _column(table: Table, title: str, justify: str = "left") -> None:
    table.add_column(title, justify=justify, overflow="fold", no_wrap=True)
