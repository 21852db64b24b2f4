"""Results in words: the one sentence per arm and the line on what could have been found. Minus signs are real ones."""

from __future__ import annotations

from typing import Any

NOISE_FLOOR = "noise floor"  # what stands where other arms have a verdict, for the A/A arm


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


def count_text(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def sentence(result: dict[str, Any], reference: str, margin: float, family: int = 1) -> str:
    """What an arm's comparison says, in one sentence that stands alone. `family`: hypotheses that Holm runs over."""
    label, errors = result["label"], result["errors"]["removed_pairs"]
    lost = [f"{count_text(errors, 'pair')} lost to errors"] if errors else []
    if result["unpaired"]:
        lost.append(f"{len(result['unpaired']):,} unpaired")
    if not result["pairs"]:
        why = f" ({', '.join(lost)})" if lost else ""
        return f"{label} and {reference} share no finished pair, so nothing can be said{why}."
    low, high = result["tango95"]
    pieces = [
        f"Δ {points(result['delta'])} pp [{points(low)}, {points(high)}]",
        f"{result['broken']} broken, {result['repaired']} repaired of {count_text(result['pairs'], 'pair')}",
        *lost,
    ]
    if result["control"]:
        flips = f"{percent(result['discordance'])} flip"
        return f"{label} is {reference} against itself, the noise floor: {', '.join([*pieces, flips])}."
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
    if result["verdict"] == "non-inferior" and result["noninferior_after_holm"] is False:
        opening += f", {_after_holm(result['suites'], family)}"
    if result["sequential"]:
        pieces.append(f"sequential test over {result['sequential']['pairs']} of them")
    if result["note"]:
        pieces.append(result["note"])
    if speed := speed_text(result["speedup_p50"]):
        pieces.append(speed)
    return f"{opening}: {', '.join(pieces)}."


def _after_holm(suites: dict[str, Any], family: int) -> str:
    over = f"Holm over {family} arms × suites"
    if len(suites) == 1:
        (cell,) = suites.values()
        return f"but not after {over} ({p_text(cell['noninferiority_p_holm'])} > 0.025)"
    return (
        f"but after {over} in {sum(cell['noninferior_after_holm'] for cell in suites.values())} of {len(suites)} suites"
    )


def detectable_line(d: dict[str, Any], margin: float, sequential: bool = False) -> str:
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
        f"With {count_text(d['pairs'], 'pair')} and {flips}, {found}; truly equal arms would be shown non-inferior at "
        f"{margin_text(margin)} with {100 * d['noninferiority_power']:.0f} % chance (80 % takes "
        f"{d['pairs_for_noninferiority']:,} pairs)"
        + (", all for one look at the end: the sequential test takes more." if sequential else ".")
    )


def sequential_text(s: dict[str, Any]) -> str:
    """The decision of the sequential test in words, with the interval that belongs to it."""
    strongest = max(s["noninferior"], s["inferior"])
    measure = "e" if s["method"] == "evalues" else "z"
    evidence = f"{measure} = {strongest:.3g}, needs {s['threshold']:.3g}"
    if s["looks"] is not None:
        evidence = f"look {s['look']} of {s['looks']}: {evidence}" if s["look"] else "not looked at yet"
    if s["interval"] is not None:
        low, high = s["interval"]
        evidence += f", Δ in [{points(low)}, {points(high)}] pp at {100 * s['confidence']:g} % over all looks"
    at, errors = margin_text(s["margin"]), s["errors"]
    against = f", {count_text(errors, 'pair')} with errors counted against it" if errors else ""
    if s["verdict"] is None:
        retried = (
            f"; {count_text(errors, 'pair')} ended in errors, which the same command tries again" if errors else ""
        )
        following = f"; the next look is at {s['next_look']:,}" if s["next_look"] else ""
        return f"no decision yet at {at} after {s['position']} pairs ({evidence}){following}{retried}"
    if s["verdict"] == "undecided":
        where = (
            f"at the cap of {s['max_pairs']}"
            if (s["max_pairs"] or s["declared_pairs"]) < s["declared_pairs"]
            else "after all"
        )
        return f"undecided {where} pairs, at {at} ({evidence})"
    if s["verdict"] == "futile":
        return (
            f"futile: neither verdict at {at} had a fair chance left after {s['position']} pairs ({evidence}); "
            f"{s['episodes_saved']} episodes saved"
        )
    return (
        f"{s['verdict']} at {at} after {s['position']} pairs in the declared order of {s['declared_pairs']} "
        f"({evidence}){against}; {s['episodes_saved']} episodes saved"
    )
