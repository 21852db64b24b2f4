"""Verdicts, not averages: every arm against the reference on the same episodes, as one dict.

`compare_runs` is the whole of `qlibero compare`; the table, the report and the wandb workspace print what it
returns. Fractions are fractions (0.02 is 2 pp); Δ is arm − reference, so a loss is negative.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlibero.errors import UserError
from qlibero.results import statistics as st
from qlibero.results.cells import cells_of
from qlibero.results.clusters import task_bootstrap, task_t_interval
from qlibero.results.execution import action_noise, divergences, execution_quality
from qlibero.results.foreign import compare_foreign
from qlibero.results.judgement import (
    ERRORS_DECIDE,
    check_margin,
    counted,
    detectable,
    errors_counted,
    judged,
    observed_discordance,
    rounded,
    rounded_interval,
)
from qlibero.results.pairing import Arm, Pair, collect_arms, outcomes_of, pair_arms
from qlibero.results.phrases import NOISE_FLOOR, margin_text, sentence
from qlibero.results.runs import REFERENCE, RunResults, common_margin, read_runs
from qlibero.results.stopping import Declaration, pair_step, read_declaration
from qlibero.results.summary import summarize_arm

ONE_SIDED_ALPHA = 0.025


def compare_runs(
    paths: Sequence[Path | str], reference: str | None = None, margin: float | None = None
) -> dict[str, Any]:
    """Read run directories and compare. With result files of other tools among them see `foreign.compare_foreign`.

    A sweep's directory stands for its cells, and each cell is compared with its own reference: several give
    {"cells": {label: what one gives}}. `reference` None is the baseline (among files the first); `margin` None is what
    the runs declare. Raises UserError for a bad margin, reference, directory or file.
    """
    if any(Path(path).is_file() for path in paths):
        return compare_foreign(paths, reference, margin)
    cells = cells_of(read_runs(paths), reference or REFERENCE)
    results = {cell.label: compare(cell.runs, reference or REFERENCE, margin) for cell in cells}
    return {"cells": results} if len(cells) > 1 else results[cells[0].label]


def compare(runs: Sequence[RunResults], reference: str = REFERENCE, margin: float | None = None) -> dict[str, Any]:
    """{"reference", "margin", "runs", "arms": {name: …}, "holm_family", "reference_summary", "noise_floor", "ledger"}.

    An arm's "noninferior_after_holm" says whether it is non-inferior in each of its suites after Holm over
    "holm_family" arms × suites; None for the control, without pairs, and under a stopping rule.
    """
    margin = check_margin(common_margin(runs) if margin is None else margin)
    arms = collect_arms(runs)
    if reference not in arms:
        raise UserError(f"--reference {reference}: no such arm; this run has {', '.join(arms)}")
    if len(arms) == 1:
        raise UserError(f"only one arm here ('{reference}'): nothing to compare. Add a backend and run again")
    base = arms.pop(reference)
    # the A/A arm is the baseline again, so it is the noise floor of nothing else
    controls = [name for name, arm in arms.items() if arm.is_control and base.name.rsplit("/", 1)[-1] == REFERENCE]
    control = arms[controls[0]] if controls else None
    control_pairs = pair_arms(base, control).pairs if control else ()
    noise = action_noise(control_pairs, base, control) if control else 0.0
    floor = {"arm": control.name, **counted(outcomes_of(control_pairs))} if control and control_pairs else None
    declarations = [d for run in runs if (d := read_declaration(run.run_dir)) is not None]
    results = {}
    for name, arm in arms.items():
        result = _compare_arm(base, arm, margin, noise, None if name in controls else floor, bool(declarations))
        result["control"] = name in controls
        result["divergence"]["threshold_from"] = (
            f"99th percentile of the arm-motion differences between {base.name} and {control.name} "
            "in the first executed chunk"
            if control
            else "no A/A arm: any difference at all"
        )
        results[name] = result
    family = _adjust([r for name, r in results.items() if name not in controls])
    if declarations:
        _sequential(results, base, arms, declarations, margin, len(runs) == 1)
    for result in results.values():
        if result["control"]:
            _show_as_floor(result)
        result["sentence"] = sentence(result, base.label, margin, family)
    return {
        "reference": reference,
        "reference_label": base.label,
        "margin": margin,
        "runs": [str(run.run_dir) for run in runs],
        "arms": results,
        "holm_family": family,
        "reference_summary": summarize_arm(list(base.records.values())),
        "noise_floor": floor,
        "ledger": _ledger_state(runs),
    }


def _compare_arm(
    base: Arm, arm: Arm, margin: float, noise: float, floor: dict[str, Any] | None, sequential: bool
) -> dict[str, Any]:
    pairing = pair_arms(base, arm)
    pairs, lost = outcomes_of(pairing.pairs), outcomes_of(pairing.errors)
    result: dict[str, Any] = {"label": arm.label, "control": False, **judged(pairs, margin)}
    result["errors"] = errors_counted(pairs, lost, margin) | {"keys": [str(p.key) for p in pairing.errors]}
    if result["errors"]["worst_case_verdict"] != result["verdict"] and result["pairs"]:
        result["verdict"] = ERRORS_DECIDE
        result["qualifier"] = None
    result["unpaired"] = [{"key": str(key), "reason": reason} for key, reason in pairing.unpaired.items()]
    result["suites"], result["tasks"] = {}, []
    for suite, of_suite in _grouped(pairing.pairs, lambda p: p.key.suite).items():
        result["suites"][suite] = {**judged(outcomes_of(of_suite), margin), "clusters": _clusters(of_suite)}
        for task, of_task in _grouped(of_suite, lambda p: p.key.task).items():
            result["tasks"].append({"suite": suite, "task": task, **counted(outcomes_of(of_task))})
    result["clusters"] = _clusters(pairing.pairs)
    result["noise_floor"] = floor
    psi, source = observed_discordance(pairs, floor and floor["discordance"])
    result["detectable"] = detectable(len(pairs), psi, source, margin, sequential)
    result["noninferior_after_holm"] = result["sequential"] = result["note"] = None
    result["quality"] = execution_quality(pairing.pairs, base, arm)
    result["divergence"] = divergences(pairing.pairs, base, arm, noise)
    result["summary"] = summarize_arm(list(arm.records.values()))
    mine, theirs = result["summary"]["latency_ms"], summarize_arm(list(base.records.values()))["latency_ms"]
    result["speedup_p50"] = round(theirs["p50"] / mine["p50"], 4) if mine and theirs and mine["p50"] > 0 else None
    return result


def _show_as_floor(result: dict[str, Any]) -> None:
    """The A/A arm is measured, not judged: its difference is what the others' are read against."""
    for row in (result, *result["suites"].values()):
        row["verdict"], row["qualifier"] = NOISE_FLOOR if row["pairs"] else row["verdict"], None


def _clusters(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Intervals for "tasks like these": whole tasks are the units. With few tasks read `t95`."""
    tasks = list(_grouped(pairs, lambda p: (p.key.suite, p.key.task)).values())
    differences, sizes = [sum(p.step for p in t) for t in tasks], [len(t) for t in tasks]
    if not any(
        p.step for p in pairs
    ):  # no flip at all: tasks cannot be seen to differ, and a width of 0 would be a lie
        return {"tasks": len(tasks), "t95": None, "bootstrap95": None}
    t95 = task_t_interval([d / n for d, n in zip(differences, sizes, strict=True)])
    return {
        "tasks": len(tasks),
        "t95": rounded_interval(t95),
        "bootstrap95": rounded_interval(task_bootstrap(differences, sizes)),
    }


def _adjust(results: Sequence[dict[str, Any]]) -> int:
    """Holm over the confirmatory family, arms × suites; the control arm is no hypothesis. Returns the family's size."""
    family = [cell for result in results for cell in result["suites"].values()]
    for name in ("mcnemar_p", "noninferiority_p"):
        for cell, adjusted in zip(family, st.holm([cell[name] for cell in family]), strict=True):
            cell[f"{name}_holm"] = rounded(adjusted)
    for cell in family:
        cell["noninferior_after_holm"] = cell["noninferiority_p_holm"] <= ONE_SIDED_ALPHA
    for result in results:
        if result["suites"]:
            result["noninferior_after_holm"] = all(c["noninferior_after_holm"] for c in result["suites"].values())
    return len(family)


def _sequential(
    results: dict[str, Any],
    base: Arm,
    arms: Mapping[str, Arm],
    declarations: Sequence[Declaration],
    margin: float,
    alone: bool,
) -> None:
    """For runs under a stopping rule: the anytime-valid decision, recomputed from the ledger in declared order.

    It is the verdict then: an interval for a fixed n means nothing in a run that stopped on what it saw. Each run is
    decided by itself, so several together, another margin or another reference than the declared ones get no verdict.
    The arms share α, so Holm has nothing left to adjust.
    """
    for name, result in results.items():
        pairing, decisions = pair_arms(base, arms[name]), []
        outcomes = {p.key: p.outcomes for p in (*pairing.pairs, *pairing.errors)}
        for declaration in declarations:
            if base.name == REFERENCE and name in declaration.arms:
                decision = declaration.decide([pair_step(*outcomes.get(k, (None, None))) for k in declaration.order])
                ran = sum(key in arm.records for arm in (base, arms[name]) for key in declaration.order)
                decisions.append(
                    {
                        **asdict(decision),
                        "margin": declaration.margin,
                        "declared_pairs": len(declaration.order),
                        "max_pairs": declaration.max_pairs,
                        "episodes_saved": max(0, 2 * len(declaration.spendable) - ran) if decision.stop else 0,
                    }
                )
                if cell := result["suites"].get(declaration.order[0].suite):
                    _ruled(cell, decisions[-1], margin)
        if alone and decisions:
            (result["sequential"],) = decisions
            _ruled(result, decisions[0], margin)
        elif not result["control"]:
            result["verdict"] = "inconclusive" if result["pairs"] else result["verdict"]
            result["note"] = (
                f"stopped by a test against {REFERENCE} at {margin_text(declarations[0].margin)}: "
                "judge each run by that"
            )


def _ruled(result: dict[str, Any], decision: dict[str, Any], margin: float) -> None:
    """Put a sequential decision in the place of a fixed-n verdict, in an arm's result or that of one of its suites."""
    result["noninferior_after_holm"] = result["noninferiority_p_holm"] = result["qualifier"] = None
    if not result["pairs"]:
        return
    worst, ignoring = (
        decision[kind] if decision[kind] in ("non-inferior", "inferior") else "inconclusive"
        for kind in ("verdict", "without_errors")
    )
    if margin != decision["margin"]:
        worst = ignoring = "inconclusive"
    result["verdict"] = worst if worst == ignoring else ERRORS_DECIDE
    if "errors" in result:
        result["errors"]["worst_case_verdict"] = worst  # the decision counts errors against either verdict already


def _ledger_state(runs: Sequence[RunResults]) -> dict[str, Any]:
    ledgers = [ledger for run in runs for ledger in run.arms.values()]
    return {
        "torn_lines": sum(ledger.torn for ledger in ledgers),
        "repeated_lines": sum(ledger.repeated for ledger in ledgers),
        "conflicting_episodes": [f"{ledger.arm}: {key}" for ledger in ledgers for key in ledger.conflicts],
    }


def _grouped(pairs: Iterable[Pair], by: Any) -> dict[Any, list[Pair]]:
    groups: dict[Any, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[by(pair)].append(pair)
    return dict(sorted(groups.items()))
