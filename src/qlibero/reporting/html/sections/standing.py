"""What an arm's comparison amounts to, in a word and a tone, with Holm's adjustment and the A/A arm's role counted in.

`compare` gives a verdict per arm. A page that shows many arms side by side must also say which verdicts survive that
there are many, and that a control has none.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlibero.console import count_text
from qlibero.results.comparison import ArmComparison
from qlibero.results.paired_outcomes import Word
from qlibero.results.wording import p_text

FLOOR = "noise floor (A/A)"
LOSSES = {Word.INFERIOR: "✕", Word.WORSE: "▽"}


@dataclass(frozen=True)
class Standing:
    """`word` heads the card, `tone` is its colour class, `glyph` its sign, `holm` what the adjustment says, or ""."""

    word: str
    tone: str
    glyph: str
    holm: str = ""


def standing(arm: ArmComparison) -> Standing:
    verdict = arm.verdict
    if arm.control:
        return Standing(FLOOR, "control", "≡")
    if verdict.word in LOSSES:
        return Standing(verdict.text, "bad", LOSSES[verdict.word])
    if verdict.word != Word.NON_INFERIOR:
        return Standing(verdict.text, "open", "…" if verdict.word == Word.INTERIM else "?")
    holm = holm_text(arm)
    if arm.passed_holm is not False:  # under a stopping rule the test shares its α among the arms already
        return Standing(verdict.text, "good", "✓", holm)
    return Standing(f"{verdict.text}, but not after Holm", "open", "~", holm)


def holm_text(arm: ArmComparison) -> str:
    """Non-inferiority after Holm, in words; suite by suite where each is a claim."""
    if arm.control or arm.passed_holm is None or arm.noninferiority_p is None:
        return ""
    if arm.adjusted:
        return f"{'yes' if arm.adjusted.passed else 'no'}, {p_text(arm.adjusted.noninferiority_p)}"
    passed = sum(bool(suite.adjusted and suite.adjusted.passed) for suite in arm.suites.values())
    return f"in {passed} of {count_text(len(arm.suites), 'suite')}"
