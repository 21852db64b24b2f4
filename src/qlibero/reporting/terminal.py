"""The end of a run and a comparison as tables for a terminal; the same text, wide enough, when nobody is at one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlibero.console import console
from qlibero.places import pasteable
from qlibero.results.arithmetic import same_arithmetic
from qlibero.results.compare import compare
from qlibero.results.phrases import NOISE_FLOOR, margin_text, p_text, points, sequential_text, speed_text
from qlibero.results.runs import REFERENCE, RunResults, read_run, video_path
from qlibero.results.statistics import wilson
from qlibero.results.summary import counts, summarize_arm

COLOURS = {"non-inferior": "green", "inferior": "red", "inconclusive": "yellow", NOISE_FLOOR: "cyan"}
SAVES_NOTHING = {
    "fake": "fake carries unpacked integers; a packed kernel saves",
    "int_ref": "the reference keeps unpacked integers",
    "w8a8": "w8a8 keeps a byte a code",
    "dequantized": "16-bit activations: dequantized weights",
}
QUALITY = {
    "steps_to_success": "steps to success",
    "path_length_m": "path (m)",
    "gripper_flips": "gripper flips",
    "jerk": "jerk (m/s³)",
}


def print_run(run_dir: Path | str, to: Console | None = None, reference: str = REFERENCE) -> None:
    """What a finished (or interrupted) run shows: success, flips, latency, simulator time, and where things lie."""
    run, to = read_run(run_dir), to or console()
    to.print(success_table(run))
    if reference in run.arms and len(run.arms) > 1:
        to.print(comparison_tables(compare([run], reference)))
    for same in same_arithmetic(run):
        to.print(Text(str(same), style="green" if same.equal == same.episodes else "red"))
    to.print(cost_table(run))
    if (memory := memory_table(run)).row_count:
        to.print(memory)
    to.print(_places(run))


def print_comparison(result: dict[str, Any], to: Console | None = None) -> None:
    """What `qlibero compare` shows for people."""
    to = to or console()
    for label, cell in result.get("cells", {"": result}).items():
        if label:
            to.print(Text(f"\n{label}", style="bold"))
        to.print(_foreign(cell) if cell.get("foreign") else comparison_tables(cell))


def _foreign(result: dict[str, Any]) -> Group:
    """Results of other tools: what was compared how, and one sentence each."""
    table = _table(f"against {result['reference']}, margin {margin_text(result['margin'])}")
    for title in (
        "result",
        "tool",
        "successes",
        "reference",
        "Δ pp",
        "95 % interval",
        "method",
        "p",
        "verdict",
    ):
        table.add_column(title)
    for name, r in result["arms"].items():
        delta, interval = ("", "") if r["interval95"] is None else (points(r["delta"]), _interval(r["interval95"]))
        counts, base = ("/".join(map(str, r[key])) for key in ("counts", "reference_counts"))
        p = "" if r["p"] is None else p_text(r["p"])
        table.add_row(
            name,
            r["tool"],
            counts,
            base,
            delta,
            interval,
            r["method"],
            p,
            Text(r["verdict"], style=COLOURS.get(r["verdict"], "yellow")),
        )
    lines = [line for r in result["arms"].values() for line in (r["sentence"], f"  {r['detectable']['line']}")]
    return Group(table, *(Text(line, style="dim") for line in lines))


def success_table(run: RunResults) -> Table:
    """k/n with Wilson interval, per task and arm; errors beside, never inside."""
    table = _table(f"{run.name}: successes, 95 % Wilson intervals")
    table.add_column("task")
    cells = {name: {} for name in run.arms}
    for name, arm in run.arms.items():
        table.add_column(str(arm.meta.get("label") or name), justify="right")
        for record in arm.records:
            cells[name].setdefault((record.suite, record.task), []).append(record)
    tasks = sorted({task for of_arm in cells.values() for task in of_arm})
    for suite, task in tasks:
        table.add_row(f"{suite} {task}", *(_success(cells[name].get((suite, task), [])) for name in run.arms))
    if len(tasks) > 1:
        table.add_section()
        table.add_row("all", *(_success(arm.records) for arm in run.arms.values()), style="bold")
    return table


def _success(records: list) -> str:
    if not records:
        return "–"
    k, n, errors = counts(records)
    low, high = wilson(k, n) if n else (0.0, 1.0)
    return f"{k}/{n} [{100 * low:.1f}, {100 * high:.1f}]" + (f", {errors} error{'s' * (errors > 1)}" if errors else "")


def cost_table(run: RunResults) -> Table:
    """Latency of a policy call as an episode waits for it, and simulator time, per arm."""
    table = _table("ms per policy call (warm-up left out); simulator and rendering s per episode")
    for title in ("arm", "calls", "p50", "p95", "p99", "simulator", "rendering", "steps"):
        table.add_column(title, justify="left" if title == "arm" else "right")
    for name, arm in run.arms.items():
        finished = [r for r in arm.records if r.outcome != "error"]
        if not finished:
            continue
        latency = summarize_arm(arm.records)["latency_ms"] or {}
        table.add_row(
            str(arm.meta.get("label") or name),
            f"{sum(len(r.policy_ms) for r in arm.records):,}",
            *(f"{latency[p]:.1f}" if latency else "–" for p in ("p50", "p95", "p99")),
            *(f"{np.mean([getattr(r, field) for r in finished]) / 1e3:.1f}" for field in ("sim_ms", "render_ms")),
            f"{np.mean([r.steps for r in finished]):.0f}",
        )
    return table


def memory_table(run: RunResults) -> Table:
    """What each arm's quantized linears occupy (live bytes, measured when the arm was loaded) beside the bf16
    bytes of the same linears, which are what the baseline would need for them."""
    table = _table("MB of the quantized linears; the same linears in bf16")
    for title in ("arm", "weights and scales", "bf16", "ratio", "with transforms", ""):
        table.add_column(title, justify="right" if title else "left")
    table.columns[0].justify = "left"
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


def comparison_tables(result: dict[str, Any]) -> Group:
    """Verdicts per arm and suite, execution quality, what could have been found, and one sentence per arm."""
    parts: list[RenderableType] = [_verdicts(result)]
    if quality := _quality(result):
        parts.append(quality)
    for arm in result["arms"].values():
        line = Text(arm["sentence"], style=COLOURS.get(arm["verdict"], "yellow"))
        parts += [line, Text(f"  {arm['detectable']['line']}", style="dim")]
        if sequential := arm["sequential"]:
            parts.append(Text(f"  Sequential: {sequential_text(sequential)}", style="dim"))
        for entry in arm["unpaired"][:5]:
            parts.append(Text(f"  unpaired: {entry['key']}, {entry['reason']}", style="yellow"))
        if len(arm["unpaired"]) > 5:
            parts.append(Text(f"  … {len(arm['unpaired'])} unpaired in all; the JSON lists every one", style="yellow"))
    if not result["noise_floor"]:
        parts.append(Text("Noise floor unknown: add the arm `aa` (the reference again) to measure it.", style="dim"))
    if conflicts := result["ledger"]["conflicting_episodes"]:
        parts.append(
            Text(
                f"{len(conflicts)} episodes ran twice with different results: {', '.join(conflicts[:3])} …",
                style="red",
            )
        )
    return Group(*parts)


def _verdicts(result: dict[str, Any]) -> Table:
    table = _table(
        f"against {result['reference_label']}, margin {margin_text(result['margin'])}: "
        "Δ in pp with 95 % Tango interval (unadjusted)"
    )
    for title in (
        "arm",
        "suite",
        "pairs",
        "broken",
        "repaired",
        "Δ",
        "95 % interval",
        "McNemar",
        "Holm",
        "NI Holm",
        "tasks like these",
        "speed",
        "verdict",
    ):
        table.add_column(title, justify="left" if title in ("arm", "suite", "verdict") else "right")
    for arm in result["arms"].values():
        rows = list(arm["suites"].items())
        if len(rows) != 1:
            rows.append(("all", arm))
        for suite, row in rows:
            if not row["pairs"]:
                table.add_row(arm["label"], suite, "0", *[""] * 9, "no pairs")
                continue
            verdict = arm["verdict"] if len(rows) == 1 else row["verdict"]
            shown = Text(verdict, style=COLOURS.get(verdict, "yellow"))
            if verdict == "non-inferior" and row["noninferior_after_holm"] is False and row is not arm:
                shown.append(" (not after Holm)", style="yellow")
            t95 = row["clusters"]["t95"]
            table.add_row(
                arm["label"],
                suite,
                str(row["pairs"]),
                str(row["broken"]),
                str(row["repaired"]),
                points(row["delta"]),
                _interval(row["tango95"]),
                *(_p(row.get(name)) for name in ("mcnemar_p", "mcnemar_p_holm", "noninferiority_p_holm")),
                _interval(t95) if t95 else "",
                "" if arm["control"] else speed_text(arm["speedup_p50"]),
                shown,
            )
    return table


def _p(p: float | None) -> str:
    return "" if p is None else p_text(p).removeprefix("p ").removeprefix("= ")


def _quality(result: dict[str, Any]) -> Table | None:
    table = _table("execution on paired episodes: reference → arm (p of the paired sign-flip test)")
    table.add_column("arm")
    for title in QUALITY.values():
        table.add_column(title, justify="right")
    table.add_column("actions diverge at step", justify="right")
    for arm in result["arms"].values():
        cells = [arm["quality"][name] for name in QUALITY]
        divergence = arm["divergence"]
        if any(cells) or divergence["compared"]:
            table.add_row(arm["label"], *map(_shift, cells), _diverged(divergence))
    return table if table.row_count else None


def _shift(cell: dict[str, float] | None) -> str:
    return f"{cell['reference']:.3g} → {cell['arm']:.3g} ({p_text(cell['p'])})" if cell else "–"


def _diverged(d: dict[str, Any]) -> str:
    if not d["compared"]:
        return "–"
    if not d["diverged"]:
        return f"never (0/{d['compared']})"
    return f"median {d['median_step']:.0f} ({d['diverged']}/{d['compared']})"


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


def _interval(interval: list[float]) -> str:
    return f"[{points(interval[0])}, {points(interval[1])}]"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", title_style="italic")
