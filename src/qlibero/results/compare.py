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
from qlibero.results.clusters import task_bootstrap, task_t_interval
from qlibero.results.execution import action_noise, divergences, execution_quality
from qlibero.results.imports import compare_foreign
from qlibero.results.pairing import Arm, Pair, Pairing, collect_arms, pair_arms
from qlibero.results.phrases import detectable_line, sentence
from qlibero.results.runs import RunResults, read_run
from qlibero.results.stopping import read_declaration
from qlibero.results.summary import summarize_arm

ONE_SIDED_ALPHA = 0.025


def compare_runs(
    paths: Sequence[Path | str], reference: str = "baseline", margin: float = 0.02
) -> dict[str, Any]:
    """Read run directories and compare. With result files of other tools among them see
    `imports.compare_foreign`.

    Raises UserError for a bad margin, reference, directory or file.
    """
    check_margin(margin)
    if any(Path(path).is_file() for path in paths):
        return compare_foreign(paths, reference, margin)
    return compare(list(map(read_run, paths)), reference, margin)


def check_margin(margin: float) -> None:
    if not 0 < margin < 1:
        raise UserError(
            f"--margin {margin}: a difference in success rate between 0 and 1; write 0.02 for 2 pp"
        )


def compare(runs: Sequence[RunResults], reference: str = "baseline", margin: float = 0.02) -> dict[str, Any]:
    """{"reference", "margin", "runs", "arms": {name: …}, "reference_summary", "noise_floor", "ledger"}."""
    check_margin(margin)
    arms = collect_arms(runs)
    if reference not in arms:
        raise UserError(f"--reference {reference}: no such arm; this run has {', '.join(arms)}")
    if len(arms) == 1:
        raise UserError(f"only one arm here ('{reference}'): nothing to compare. Add a backend and run again")
    base = arms.pop(reference)
    control = next((arm for arm in arms.values() if arm.is_control), None)
    control_pairs = pair_arms(base, control).pairs if control else ()
    noise = action_noise(control_pairs, base, control) if control else 0.0
    floor = {"arm": control.name, **_counted(control_pairs)} if control and control_pairs else None
    results = {}
    for name, arm in arms.items():
        result = _compare_arm(base, arm, margin, noise)
        result["divergence"]["threshold_from"] = (
            f"99th percentile of the arm-motion differences between {base.name} and {control.name} in the first executed chunk"
            if control
            else "no A/A arm: any difference at all"
        )
        result["noise_floor"] = None if arm.is_control else floor
        results[name] = result
    _adjust([r for name, r in results.items() if not arms[name].is_control])
    _sequential(results, base, arms, runs, margin)
    for result in results.values():
        result["sentence"] = sentence(result, base.label, margin)
    return {
        "reference": reference,
        "reference_label": base.label,
        "margin": margin,
        "runs": [str(run.run_dir) for run in runs],
        "arms": results,
        "reference_summary": summarize_arm(list(base.records.values())),
        "noise_floor": floor,
        "ledger": _ledger_state(runs),
    }


def _compare_arm(base: Arm, arm: Arm, margin: float, noise: float) -> dict[str, Any]:
    pairing = pair_arms(base, arm)
    result: dict[str, Any] = {"label": arm.label, "control": arm.is_control, **_judged(pairing.pairs, margin)}
    result["errors"] = _errors(pairing, margin)
    if result["errors"]["worst_case_verdict"] != result["verdict"] and result["pairs"]:
        result["verdict"] = "inconclusive (errors)"
        result["qualifier"] = None
    result["unpaired"] = [{"key": str(key), "reason": reason} for key, reason in pairing.unpaired.items()]
    result["suites"], result["tasks"] = {}, []
    for suite, pairs in _grouped(pairing.pairs, lambda p: p.key.suite).items():
        result["suites"][suite] = {**_judged(pairs, margin), "clusters": _clusters(pairs)}
        for task, of_task in _grouped(pairs, lambda p: p.key.task).items():
            result["tasks"].append({"suite": suite, "task": task, **_counted(of_task)})
    result["clusters"] = _clusters(pairing.pairs)
    result["detectable"] = _detectable(pairing.pairs, margin)
    result["quality"] = execution_quality(pairing.pairs, base, arm)
    result["divergence"] = divergences(pairing.pairs, base, arm, noise)
    result["summary"] = summarize_arm(list(arm.records.values()))
    mine, theirs = result["summary"]["latency_ms"], summarize_arm(list(base.records.values()))["latency_ms"]
    result["speedup_p50"] = (
        round(theirs["p50"] / mine["p50"], 4) if mine and theirs and mine["p50"] > 0 else None
    )
    return result


def _counted(pairs: Sequence[Pair]) -> dict[str, Any]:
    """The 2×2 table and what follows from it alone."""
    n = len(pairs)
    broken, repaired = (sum(p.step == s for p in pairs) for s in (-1, 1))
    both = sum(p.reference.succeeded and p.other.succeeded for p in pairs)
    both_fail = n - both - broken - repaired
    return {
        "pairs": n,
        "both_succeed": both,
        "broken": broken,
        "repaired": repaired,
        "both_fail": both_fail,
        "delta": _r((repaired - broken) / n) if n else None,
        "discordance": _r((broken + repaired) / n) if n else None,
        "tango95": _ri(st.tango(broken, repaired, n)) if n else None,
        "newcombe95": _ri(st.newcombe(both, broken, repaired, both_fail)) if n else None,
        "mcnemar_p": _r(st.mcnemar_exact(broken, repaired)),
    }


def _judged(pairs: Sequence[Pair], margin: float) -> dict[str, Any]:
    table = _counted(pairs)
    b, r, n = table["broken"], table["repaired"], table["pairs"]
    decided, qualifier = st.verdict(b, r, n, margin), None
    if n and decided == "non-inferior":
        low, high = st.tango(b, r, n)
        qualifier = "better" if low > 0 else "worse within the margin" if high < 0 else None
    return {
        **table,
        "verdict": decided,
        "qualifier": qualifier,
        "noninferiority_p": _r(st.noninferiority_p(b, r, n, margin)) if n else None,
    }


def _errors(pairing: Pairing, margin: float) -> dict[str, Any]:
    """Errors leave the pairs; the verdict must survive counting them the way that hurts the arm most.

    Worst case: an error of the arm counts as broken, one of the reference as a success of the reference.
    """
    b, r = (sum(p.step == s for p in pairing.pairs) for s in (-1, 1))
    broken = sum(not p.other.succeeded for p in pairing.errors)
    n = len(pairing.pairs) + len(pairing.errors)
    return {
        "arm": sum(p.other.outcome == "error" for p in pairing.errors),
        "reference": sum(p.reference.outcome == "error" for p in pairing.errors),
        "removed_pairs": len(pairing.errors),
        "keys": [str(p.key) for p in pairing.errors],
        "worst_case_verdict": st.verdict(b + broken, r, n, margin),
    }


def _clusters(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Intervals for "tasks like these": whole tasks are the units. With few tasks read `t95`."""
    tasks = list(_grouped(pairs, lambda p: (p.key.suite, p.key.task)).values())
    differences, sizes = [sum(p.step for p in t) for t in tasks], [len(t) for t in tasks]
    if not any(p.step for p in pairs):  # no flip at all: tasks cannot be seen to differ, and a width of 0 would be a lie
        return {"tasks": len(tasks), "t95": None, "bootstrap95": None}
    t95 = task_t_interval([d / n for d, n in zip(differences, sizes, strict=True)])
    return {"tasks": len(tasks), "t95": _ri(t95), "bootstrap95": _ri(task_bootstrap(differences, sizes))}


def _detectable(pairs: Sequence[Pair], margin: float) -> dict[str, Any]:
    """What this many pairs could have found: always printed, so that "no difference" is read with its power."""
    n, discordant = len(pairs), sum(p.step != 0 for p in pairs)
    if n == 0:
        return {"line": "no pairs, so nothing could be found"}
    # no flip seen: plan with the largest discordance the data allow (one-sided 95 %)
    discordance = discordant / n if discordant else 1 - 0.05 ** (1 / n)
    result = {
        "pairs": n,
        "discordance": _r(discordance),
        "discordance_from": "observed" if discordant else "95 % upper bound, no flip observed",
        "difference": _r(st.minimum_detectable_difference(n, discordance)),
        "one_way_difference": _r(st.smallest_one_way_difference(n)),
        "noninferiority_power": _r(st.noninferiority_power(n, discordance, margin)),
        "pairs_for_noninferiority": st.pairs_for_noninferiority(discordance, margin),
    }
    return {**result, "line": detectable_line(result, margin)}


def _adjust(results: Iterable[dict[str, Any]]) -> None:
    """Holm over the confirmatory family, arms × suites; the control arm is no hypothesis."""
    family = [cell for result in results for cell in result["suites"].values()]
    for name in ("mcnemar_p", "noninferiority_p"):
        for cell, adjusted in zip(family, st.holm([cell[name] for cell in family]), strict=True):
            cell[f"{name}_holm"] = _r(adjusted)
    for cell in family:
        cell["noninferior_after_holm"] = cell["noninferiority_p_holm"] <= ONE_SIDED_ALPHA


def _sequential(
    results: dict[str, Any], base: Arm, arms: Mapping[str, Arm], runs: Sequence[RunResults], margin: float
) -> None:
    """For a run under a stopping rule: the anytime-valid decision, recomputed from the ledger in declared order.

    It is the verdict then: an interval for a fixed n means nothing in a run that stopped on what it saw. At another
    margin than the declared one such a run answers nothing.
    """
    declaration = read_declaration(runs[0].run_dir) if len(runs) == 1 else None
    for name, result in results.items():
        result["sequential"] = None
        if declaration and name in declaration.arms:
            pairing = pair_arms(base, arms[name])
            steps = {p.key: p.step for p in pairing.pairs} | {p.key: "error" for p in pairing.errors}
            decision = declaration.decide([steps.get(key) for key in declaration.order])
            ran = len(base.records) + len(arms[name].records)
            result["sequential"] = {
                **asdict(decision),
                "margin": declaration.margin,
                "declared_pairs": len(declaration.order),
                "episodes_saved": max(0, 2 * len(declaration.order) - ran),
            }
            answers = margin == declaration.margin and decision.verdict in ("non-inferior", "inferior")
            if result["pairs"]:
                result["verdict"] = decision.verdict if answers else "inconclusive"
                result["qualifier"] = None


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


def _r(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.6g}")


def _ri(interval: st.Interval | None) -> list[float] | None:
    return None if interval is None else [_r(x) for x in interval]
