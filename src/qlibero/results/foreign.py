"""Result files of other tools in a comparison, beside each other and beside runs of qlibero.

Two arms of qlibero are paired as always, by key and fingerprint. With a file on either side the pair rests on the
key that both have, and equality of the scenes is taken on trust; without a common key two independent proportions
are compared. Every result says which of the three it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlibero.errors import UserError
from qlibero.results import statistics as st
from qlibero.results.imports import Cell, ForeignArm, from_run, read_foreign
from qlibero.results.judgement import (
    ERRORS_DECIDE,
    Outcomes,
    check_margin,
    detectable,
    errors_counted,
    judged,
    observed_discordance,
    rounded,
    rounded_interval,
)
from qlibero.results.pairing import collect_arms, outcomes_of, pair_arms
from qlibero.results.phrases import count_text, margin_text, points
from qlibero.results.runs import RunResults, common_margin, read_run


def compare_foreign(
    paths: Sequence[Path | str], reference: str | None = None, margin: float | None = None
) -> dict[str, Any]:
    """Compare result files, and run directories beside them.

    The reference is the first file unless named; the margin what the runs declare.

    {"reference", "margin", "foreign": True, "arms": {name: {"paired", "tool", "delta", "interval95", "method", "p",
    "verdict", "caveat", "errors", "detectable", "sentence", …}}}; paired arms also hold what `judgement.judged` says,
    and "unpaired". Raises UserError for a bad margin, reference or file.
    """
    inputs = [read_run(path) if Path(path).is_dir() else read_foreign(path) for path in paths]
    runs = [one for one in inputs if isinstance(one, RunResults)]
    margin = check_margin(common_margin(runs) if margin is None else margin)
    arms = [arm for one in inputs for arm in (_arms_of(one) if isinstance(one, RunResults) else [one])]
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise UserError(
            f"two inputs are called {next(n for n in names if names.count(n) > 1)}; put them into different folders"
        )
    base = next(arm for arm in arms if arm.name == _reference(names, reference))
    others = [arm for arm in arms if arm is not base]
    if not others:
        raise UserError("only one result here: nothing to compare. Name a second file or run directory")
    results = {arm.name: _against(base, arm, margin) for arm in others}
    return {"reference": base.name, "margin": margin, "foreign": True, "arms": results}


def _arms_of(run: RunResults) -> list[ForeignArm]:
    return [from_run(arm, run.name) for arm in collect_arms([run]).values()]


def _reference(names: Sequence[str], asked: str | None) -> str:
    """The full name, or its last part where that is one arm's only."""
    if asked is None or asked in names:
        return asked or names[0]
    found = [name for name in names if name.endswith(f"/{asked}")]
    if len(found) != 1:
        problem = "no such result" if not found else "several are called so"
        raise UserError(f"--reference {asked}: {problem}; here are {', '.join(found or names)}")
    return found[0]


def _against(base: ForeignArm, arm: ForeignArm, margin: float) -> dict[str, Any]:
    (k0, n0, _), (k1, n1, _) = base.counts, arm.counts
    result = _paired(base, arm, margin)
    if result is None:
        base, arm, about = _same_tasks(base, arm)
        result = _independent(base, arm, margin)
        result["caveat"] += about
        (k0, n0, _), (k1, n1, _) = base.counts, arm.counts
    if result["errors"]["worst_case_verdict"] != result["verdict"] and result["delta"] is not None:
        result["verdict"] = ERRORS_DECIDE
    result |= {"tool": arm.tool, "counts": [k1, n1], "reference_counts": [k0, n0]}
    return {**result, "sentence": _sentence(result, base.name, arm.name, margin)}


def _paired(base: ForeignArm, arm: ForeignArm, margin: float) -> dict[str, Any] | None:
    """None where no key is common to both."""
    if base.arm and arm.arm:
        pairing = pair_arms(base.arm, arm.arm)
        finished, lost = outcomes_of(pairing.pairs), outcomes_of(pairing.errors)
        unpaired = [{"key": str(key), "reason": reason} for key, reason in pairing.unpaired.items()]
        caveat = "paired by key and scene fingerprint" + (f"; {len(unpaired)} unpaired" if unpaired else "")
    else:
        with_seed = base.has_seeds and arm.has_seeds
        left, right = base.keyed(with_seed), arm.keyed(with_seed)
        common = sorted(left.keys() & right.keys()) if left and right else []
        if not common:
            return None
        both: list[Outcomes] = [(left[key], right[key]) for key in common]
        finished, lost = ([pair for pair in both if ("error" in pair) is error] for error in (False, True))
        unpaired = [
            {"key": "/".join(map(str, key)), "reason": f"not in {(arm if key in left else base).name}"}
            for key in sorted(left.keys() ^ right.keys())
        ]
        keys = "task, initial state and seed" if with_seed else "task, initial state"
        caveat = f"paired by {keys}; that the scenes were equal is taken on trust"
        if not with_seed:
            caveat += ", and so are the seeds"
        if unpaired:
            caveat += f"; {len(unpaired)} episodes are in one file only and were left out"
    table = judged(finished, margin)
    return {
        **table,
        "paired": True,
        "interval95": table["tango95"],
        "method": "Tango, paired",
        "p": table["mcnemar_p"],
        "errors": errors_counted(finished, lost, margin),
        "unpaired": unpaired,
        "caveat": caveat,
        "detectable": detectable(len(finished), *observed_discordance(finished), margin),
    }


def _same_tasks(base: ForeignArm, arm: ForeignArm) -> tuple[ForeignArm, ForeignArm, str]:
    """Both reduced to the suites and tasks that they share, and what has to be said about it.

    Raises UserError where they share none: two suites are two questions, not two samples.
    """
    places, theirs = ({place for place in one.places if place} for one in (base, arm))
    if not places or not theirs:
        silent = " and ".join(one.name for one, found in ((base, places), (arm, theirs)) if not found)
        return base, arm, f"; {silent} says neither suite nor task, that they are the same is taken on trust"
    common = places & theirs
    if common == places == theirs:
        return base, arm, _shares(base, arm)
    if not common:
        by_number = [all(task.isdigit() for _, task in found) for found in (places, theirs)]
        if by_number[0] != by_number[1] and _tasks_per_suite(places) == _tasks_per_suite(theirs):
            return base, arm, "; one names its tasks, the other numbers them: that they are the same is taken on trust"
        raise UserError(
            f"{base.name} has {_said(places)}, {arm.name} has {_said(theirs)}: no task in common; "
            "compare files of the same suite and tasks"
        )
    ours, others = base.only(common), arm.only(common)
    left = _said((places | theirs) - common)
    return ours, others, f"; only what both have, {_said(common)}; left out is {left}{_shares(ours, others)}"


def _shares(base: ForeignArm, arm: ForeignArm) -> str:
    """Says where one has more of its episodes in some task than the other: that alone moves a success rate."""
    first, second = (Counter(one.places) for one in (base, arm))
    if all(first[place] * len(arm.episodes) == second[place] * len(base.episodes) for place in first):
        return ""
    return "; the tasks have different shares of the episodes, which alone can move a rate"


def _tasks_per_suite(places: set[Cell]) -> Counter[str]:
    return Counter(suite for suite, _ in places)


def _said(places: set[Cell]) -> str:
    suites = sorted({suite for suite, _ in places})
    names = {suite: sorted((task for s, task in places if s == suite), key=lambda t: (len(t), t)) for suite in suites}
    return ", ".join(
        f"{suite} {'tasks' if len(tasks) > 1 else 'task'} {', '.join(tasks[:12])}{' …' if len(tasks) > 12 else ''}"
        for suite, tasks in names.items()
    )


def _independent(base: ForeignArm, arm: ForeignArm, margin: float) -> dict[str, Any]:
    (k0, n0, e0), (k1, n1, e1) = base.counts, arm.counts
    why = arm.reason or base.reason or "the two share no episode key"
    result = {
        "paired": False,
        "delta": rounded(k1 / n1 - k0 / n0) if n0 and n1 else None,
        "interval95": rounded_interval(st.newcombe_independent(k1, n1, k0, n0)) if n0 and n1 else None,
        "method": "Newcombe, independent samples",
        "p": _fisher(k1, n1, k0, n0) if n0 and n1 else None,
        "verdict": _independent_verdict(k1, n1, k0, n0, margin),
        "caveat": f"unpaired: {why}, so the interval is that of two independent samples and wider",
        "unpaired": [],
        "errors": {
            "arm": e1,
            "reference": e0,
            "worst_case_verdict": _independent_verdict(k1, n1 + e1, k0 + e0, n0 + e0, margin),
        },
        "detectable": {"line": "no finished episodes, so nothing could be found"},
    }
    if n0 and n1:
        drop = st.detectable_drop(k0 / n0, n0, n1)
        found = (
            f"the smallest drop found with 80 % power is {100 * drop:.1f} pp"
            if drop
            else "no drop whatever can be found"
        )
        line = f"With {n1} against {n0} independent episodes, {found}; paired episodes would find a smaller one."
        result["detectable"] = {"difference": rounded(drop), "line": line}
    return result


def _independent_verdict(k1: int, n1: int, k0: int, n0: int, margin: float) -> str:
    if not n0 or not n1:
        return "no pairs"
    low, high = st.newcombe_independent(k1, n1, k0, n0)
    return "non-inferior" if low > -margin else "inferior" if high < -margin else "inconclusive"


def _fisher(k1: int, n1: int, k0: int, n0: int) -> float:
    from scipy.stats import fisher_exact  # seconds to import, and only needed here

    return rounded(float(fisher_exact([[k1, n1 - k1], [k0, n0 - k0]]).pvalue))


def _sentence(result: dict[str, Any], base: str, arm: str, margin: float) -> str:
    errors = result["errors"]
    lost = [f"{count_text(errors['arm'], 'error')} in {arm}"] if errors["arm"] else []
    lost += [f"{count_text(errors['reference'], 'error')} in {base}"] if errors["reference"] else []
    if result["delta"] is None:
        return f"{arm} and {base}: no finished episodes to compare" + (f" ({', '.join(lost)})." if lost else ".")
    opening = {
        "non-inferior": f"{arm} is non-inferior to {base} at {margin_text(margin)}",
        "inferior": f"{arm} is inferior to {base} by more than {100 * margin:g} pp",
        "inconclusive": f"{arm} against {base} is inconclusive at {margin_text(margin)}",
        ERRORS_DECIDE: f"{arm} against {base} is inconclusive at {margin_text(margin)} because of its errors",
    }[result["verdict"]]
    (low, high), (k1, n1), (k0, n0) = result["interval95"], result["counts"], result["reference_counts"]
    if result["paired"]:
        size = f"{result['broken']} broken, {result['repaired']} repaired of {count_text(result['pairs'], 'pair')}"
    else:
        size = f"{k1}/{n1} against {k0}/{n0}"
    pieces = [f"Δ {points(result['delta'])} pp [{points(low)}, {points(high)}]", size, *lost]
    return f"{opening}: {', '.join(pieces)} ({result['caveat']})."
