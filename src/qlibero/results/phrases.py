"""Results in words: the one sentence per arm and the line on what could have been found. Minus signs are real
ones.
"""

from __future__ import annotations

from typing import Any


def points(x: float, digits: int = 1) -> str:
    """0.014 → "+1.4": percentage points, always with a sign."""
    return f"{100 * x:+.{digits}f}".replace("-", "−")


def percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def margin_text(margin: float) -> str:
    return f"−{100 * margin:g} pp"


def p_text(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def speed_text(speedup: float | None) -> str:
    """How much faster (or slower) the median policy call is; empty if unknown."""
    if speedup is None:
        return ""
    if 0.995 < speedup < 1.005:
        return "as fast"
    return f"{speedup:.2f}× faster" if speedup > 1 else f"{1 / speedup:.2f}× slower"


def sentence(result: dict[str, Any], reference: str, margin: float) -> str:
    """What an arm's comparison says, in one sentence that stands alone."""
    label = result["label"]
    if not result["pairs"]:
        return f"{label} and {reference} share no finished pair, so nothing can be said."
    at = margin_text(margin)
    opening = {
        "non-inferior": f"{label} is non-inferior to {reference} at {at}",
        "inferior": f"{label} is inferior to {reference} by more than {100 * margin:g} pp",
        "inconclusive": f"{label} against {reference} is inconclusive at {at}",
        "inconclusive (errors)": f"{label} against {reference} is inconclusive at {at} because of its errors",
    }[result["verdict"]]
    if result["qualifier"] == "better":
        opening = f"{label} is better than {reference}"
    elif result["qualifier"]:
        opening += f", {result['qualifier']}"
    low, high = result["tango95"]
    pieces = [
        f"Δ {points(result['delta'])} pp [{points(low)}, {points(high)}]",
        f"{result['broken']} broken, {result['repaired']} repaired of {result['pairs']} pairs",
    ]
    if errors := result["errors"]["removed_pairs"]:
        pieces.append(f"{errors} pair{'s' * (errors > 1)} lost to errors")
    if result["sequential"]:
        pieces.append(f"sequential test over {result['sequential']['pairs']} of them")
    if speed := speed_text(result["speedup_p50"]):
        pieces.append(speed)
    return f"{opening}: {', '.join(pieces)}."


def detectable_line(d: dict[str, Any], margin: float) -> str:
    """The minimum detectable difference and the chance to show non-inferiority, in words."""
    flips = f"{percent(d['discordance'])} flips ({d['discordance_from']})"
    if d["difference"] is not None:
        found = f"the smallest difference found with 80 % power is {100 * d['difference']:.1f} pp"
    elif d["one_way_difference"] is not None:
        found = (
            "a difference is found with 80 % power only if every flip goes one way and it reaches "
            f"{100 * d['one_way_difference']:.1f} pp"
        )
    else:
        found = "no difference whatever can be found"
    return (
        f"With {d['pairs']} pairs and {flips}, {found}; truly equal arms would be shown non-inferior at {margin_text(margin)} "
        f"with {100 * d['noninferiority_power']:.0f} % chance (80 % takes {d['pairs_for_noninferiority']:,} pairs)."
    )
