"""The end of a run and a comparison as tables for a terminal: whole at 80 columns, wider where nobody is at one.

Verdict, difference and interval stand first and are never cut; what explains them follows in tables of its own.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from qlibero.console import console, count_text
from qlibero.places import pasteable
from qlibero.reporting.comparison_tables import comparison_tables, external_table
from qlibero.reporting.rich_tables import fixed_column, titled_table
from qlibero.results.arm_equality import Rechecks, rechecks, same_arithmetic
from qlibero.results.compare import compare
from qlibero.results.comparison import Comparison
from qlibero.results.external_results import ExternalComparison
from qlibero.results.published import CountsComparison
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import REFERENCE, RunResults, read_run, video_path
from qlibero.results.summary import calls, counts, summarize_arm
from qlibero.results.wording import grouped_text
from qlibero.stats.proportions import wilson

SAVES_NOTHING = {
    "fake": "fake carries unpacked integers; a packed kernel saves",
    "int_ref": "the reference keeps unpacked integers",
    "w8a8": "w8a8 keeps a byte a code",
    "dequantized": "16-bit activations: dequantized weights",
}
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
            to.print(Text(_tried_again(name, found), style="red" if found.wrong else "green"))
    to.print(cost_table(run))
    if (memory := memory_table(run)).row_count:
        to.print(memory)
    to.print(_places(run))


def _tried_again(name: str, found: Rechecks) -> str:
    if found.wrong:
        return "\n".join(f"{name}: {text} (NOT THE SAME ARITHMETIC)" for text in found.wrong)
    repeated = f"repeated with `fake`: {found.repeated} of {count_text(found.calls, 'policy call')}"
    return (
        f"{name}: its kernels gave the reference's integers in {count_text(found.products, 'product')} of "
        f"{count_text(found.layers, 'layer')} after the run; {repeated}"
        + (", with equal actions" if found.repeated else "")
    )


def print_comparison(
    cells: Mapping[str, Comparison | ExternalComparison | CountsComparison], to: Console | None = None
) -> None:
    """What `qlibero compare` shows for people, cell by cell."""
    to = to or console()
    for label, cell in cells.items():
        if label:
            to.print(Text(f"\n{label}", style="bold"))
        if isinstance(cell, CountsComparison):
            to.print(Group(*(Text(arm.sentence) for arm in cell.arms.values())))
        else:
            if isinstance(cell, Comparison) and (len(cell.runs) > 1 or len(cells) > 1):
                to.print(Text(grouped_text(cell), style="dim"))
            to.print(external_table(cell) if isinstance(cell, ExternalComparison) else comparison_tables(cell))


def success_tables(run: RunResults, width: int) -> list[Table]:
    """k/n with Wilson interval, per task and arm; errors beside, never inside. As many arms a table as fit."""
    cells: dict[str, dict[tuple[str, int], list[EpisodeRecord]]] = {name: {} for name in run.arms}
    for name, arm in run.arms.items():
        for record in arm.records:
            cells[name].setdefault((record.suite, record.task), []).append(record)
    tasks = sorted({task for of_arm in cells.values() for task in of_arm})
    beside = max((len(f"{suite} {task}") for suite, task in tasks), default=0) + 2
    names = list(run.arms)
    labels = {name: run.arms[name].meta.label or name for name in names}
    groups: list[list[str]] = []
    room = 0
    for name in names:
        needs = max(SUCCESS_COLUMN, len(labels[name]) + 2)
        if needs > room or not groups:
            groups.append([])
            room = width - beside
        groups[-1].append(name)
        room -= needs
    tables: list[Table] = []
    for some in groups:
        table = titled_table("" if tables else f"{run.name}: successes, 95 % Wilson intervals", "task")
        for name in some:
            table.add_column(labels[name], justify="right", overflow="fold")
        for suite, task in tasks:
            table.add_row(f"{suite} {task}", *(_success(cells[name].get((suite, task), [])) for name in some))
        if len(tasks) > 1:
            table.add_section()
            table.add_row("all", *(_success(run.arms[name].records) for name in some), style="bold")
        tables.append(table)
    return tables


def _success(records: list[EpisodeRecord]) -> str:
    if not records:
        return "–"
    k, n, errors = counts(records)
    low, high = wilson(k, n) if n else (0.0, 1.0)
    return f"{k}/{n} [{100 * low:.1f}, {100 * high:.1f}]" + (f", {count_text(errors, 'error')}" if errors else "")


def cost_table(run: RunResults) -> Table:
    """Latency of a policy call, a batch's time counted once, and simulator time, per arm."""
    table = titled_table("ms per policy call (warm-up left out); simulator and rendering s per episode", "arm")
    for title in ("calls", "p50", "p95", "p99", "simulator", "rendering", "steps"):
        fixed_column(table, title, "right")
    for name, arm in run.arms.items():
        finished = [r for r in arm.records if r.outcome != "error"]
        if not finished:
            continue
        latency = summarize_arm(arm.records).latency_ms
        table.add_row(
            arm.meta.label or name,
            f"{calls(arm.records):,.0f}",
            *(f"{ms:.1f}" for ms in latency) if latency else ("–",) * 3,
            *(f"{np.mean([getattr(r, field) for r in finished]) / 1e3:.1f}" for field in ("sim_ms", "render_ms")),
            f"{np.mean([r.steps for r in finished]):.0f}",
        )
    return table


def memory_table(run: RunResults) -> Table:
    """What each arm's quantized linears occupy (live bytes, measured when the arm was loaded) beside the bf16
    bytes of the same linears, which are what the baseline would need for them."""
    table = titled_table("MB of the quantized linears; the same linears in bf16", "arm")
    for title in ("kept", "bf16", "ratio", "with transforms"):
        fixed_column(table, title, "right")
    table.add_column("", overflow="fold")
    for name, arm in run.arms.items():
        found = arm.meta.memory
        if not found or not found.bf16_bytes:
            continue
        kept, bf16 = found.weight_bytes + found.scale_bytes, found.bf16_bytes
        executed = set(arm.meta.executed)
        table.add_row(
            arm.meta.label or name,
            f"{kept / 1e6:.2f}",
            f"{bf16 / 1e6:.2f}",
            f"{kept / bf16:.2f}",
            f"{found.kept / bf16:.2f}",
            "; ".join(SAVES_NOTHING[kernel] for kernel in sorted(executed & SAVES_NOTHING.keys())),
        )
    return table


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
