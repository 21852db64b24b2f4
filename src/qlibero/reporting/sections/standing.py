"""What an arm's comparison amounts to, in a word and a tone, with Holm's adjustment and the A/A arm's role counted in.

`compare` gives a verdict per arm. A page that shows many arms side by side must also say which verdicts survive that
there are many, and that a control has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlibero.results.phrases import p_text

FLOOR = "noise floor (A/A)"


@dataclass(frozen=True)
class Standing:
    """`word` heads the card, `tone` is its colour class, `glyph` its sign, `holm` what the adjustment says, or ""."""

    word: str
    tone: str
    glyph: str
    holm: str = ""


def standing(result: dict[str, Any]) -> Standing:
    if result["control"]:
        return Standing(FLOOR, "control", "≡")
    verdict = result["verdict"]
    if verdict == "inferior":
        return Standing(verdict, "bad", "✕")
    if verdict != "non-inferior":
        return Standing(verdict, "open", "?")
    qualifier = result["qualifier"]
    word = "better" if qualifier == "better" else f"{verdict}, {qualifier}" if qualifier else verdict
    if result["sequential"]:  # the anytime-valid test shares its α among the arms already
        return Standing(word, "good", "✓")
    holm = holm_text(result)
    if survives_holm(result):
        return Standing(word, "good", "✓", holm)
    return Standing(f"{word}, but not after Holm", "open", "~", holm)


def survives_holm(result: dict[str, Any]) -> bool:
    """Whether the arm is non-inferior in each of its suites after Holm's adjustment."""
    return all(suite["noninferior_after_holm"] for suite in result["suites"].values())


def holm_text(result: dict[str, Any]) -> str:
    """Non-inferiority after Holm, in words; suite by suite where there are several."""
    suites = result["suites"]
    if not suites or result["control"]:
        return ""
    passed = [name for name, suite in suites.items() if suite["noninferior_after_holm"]]
    if len(suites) > 1:
        return f"in {len(passed)} of {len(suites)} suites"
    return f"{'yes' if passed else 'no'}, {p_text(next(iter(suites.values()))['noninferiority_p_holm'])}"
