"""What a set of paired outcomes says: the 2×2 table, the verdict, what errors could change, what could have been found.

Works on (reference, other) outcomes alone, so that runs of qlibero and files of other tools are judged alike.
Fractions are fractions; numbers are rounded to six digits, since they go into the JSON line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlibero.errors import UserError
from qlibero.results import statistics as st
from qlibero.results.phrases import detectable_line
from qlibero.results.records import Outcome

Outcomes = tuple[Outcome, Outcome]  # of the reference and of the other arm
ERRORS_DECIDE = "inconclusive (errors)"


def check_margin(margin: float) -> float:
    """The margin itself, or a UserError that says how to write one."""
    if not 0 < margin < 1:
        raise UserError(f"--margin {margin:g}: a loss of success rate between 0 and 1, write 0.02 for 2 pp")
    return margin


def counted(pairs: Sequence[Outcomes]) -> dict[str, Any]:
    """The 2×2 table of finished pairs and what follows from it alone."""
    n = len(pairs)
    broken, repaired = pairs.count(("success", "failure")), pairs.count(("failure", "success"))
    both, both_fail = pairs.count(("success", "success")), pairs.count(("failure", "failure"))
    return {
        "pairs": n,
        "both_succeed": both,
        "broken": broken,
        "repaired": repaired,
        "both_fail": both_fail,
        "delta": rounded((repaired - broken) / n) if n else None,
        "discordance": rounded((broken + repaired) / n) if n else None,
        "tango95": rounded_interval(st.tango(broken, repaired, n)) if n else None,
        "newcombe95": rounded_interval(st.newcombe(both, broken, repaired, both_fail)) if n else None,
        "mcnemar_p": rounded(st.mcnemar_exact(broken, repaired)),
    }


def judged(pairs: Sequence[Outcomes], margin: float) -> dict[str, Any]:
    """The table with its verdict, a qualifier of it, and the p-value of non-inferiority."""
    table = counted(pairs)
    b, r, n = table["broken"], table["repaired"], table["pairs"]
    decided, qualifier = st.verdict(b, r, n, margin), None
    if decided == "non-inferior":
        low, high = st.tango(b, r, n)
        qualifier = "better" if low > 0 else "worse within the margin" if high < 0 else None
    return {
        **table,
        "verdict": decided,
        "qualifier": qualifier,
        "noninferiority_p": rounded(st.noninferiority_p(b, r, n, margin)) if n else None,
    }


def errors_counted(pairs: Sequence[Outcomes], errors: Sequence[Outcomes], margin: float) -> dict[str, Any]:
    """Errors leave the pairs; the verdict must survive counting them the way that hurts the arm most.

    Worst case: an error of the arm counts as broken, one of the reference as a success of the reference.
    """
    broken, repaired = pairs.count(("success", "failure")), pairs.count(("failure", "success"))
    broken += sum(other != "success" for _, other in errors)
    return {
        "arm": sum(other == "error" for _, other in errors),
        "reference": sum(reference == "error" for reference, _ in errors),
        "removed_pairs": len(errors),
        "worst_case_verdict": st.verdict(broken, repaired, len(pairs) + len(errors), margin),
    }


def detectable(
    pairs: int, discordance: float, discordance_from: str, margin: float, sequential: bool = False
) -> dict[str, Any]:
    """What this many pairs can find when a share `discordance` of them flips: printed beside every result, so that "no
    difference" is read with its power. `sequential` says that the run stops on what it sees, which takes more pairs."""
    if pairs == 0:
        return {"line": "no pairs, so nothing could be found"}
    result = {
        "pairs": pairs,
        "discordance": rounded(discordance),
        "discordance_from": discordance_from,
        "difference": rounded(st.minimum_detectable_difference(pairs, discordance)),
        "one_way_difference": rounded(st.smallest_one_way_difference(pairs)),
        "noninferiority_power": rounded(st.noninferiority_power(pairs, discordance, margin)),
        "pairs_for_noninferiority": st.pairs_for_noninferiority(discordance, margin),
    }
    return {**result, "line": detectable_line(result, margin, sequential)}


def observed_discordance(pairs: Sequence[Outcomes], floor: float | None = None) -> tuple[float, str]:
    """(ψ to plan with, where it comes from).

    `floor` is the A/A arm's: no arm flips less than the reference against itself. Without any flip, the largest
    discordance the data allow (one-sided 95 %).
    """
    flips = sum(reference != other for reference, other in pairs)
    own = flips / len(pairs) if pairs else 0.0
    if floor and floor > own:
        return floor, "the A/A arm's"
    if flips:
        return own, "observed"
    return 1 - 0.05 ** (1 / max(1, len(pairs))), "95 % upper bound, no flip observed"


def rounded(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.6g}")


def rounded_interval(interval: st.Interval | None) -> list[float] | None:
    return None if interval is None else [rounded(x) for x in interval]
