"""The verdict: one rule, from finished pairs, errors, what was planned, and records that contradict each other.

Everything that shows a verdict (terminal, report, trackers, the JSON line) shows what `judge` returned. Fractions are
fractions; numbers are rounded to six digits on their way into JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.errors import UserError
from qlibero.results.records import Outcome
from qlibero.stats import proportions as st
from qlibero.stats.sampling import Sample

Outcomes = tuple[Outcome, Outcome]  # of the reference and of the other arm
FEWEST_PAIRS = 20  # fewer never carry a verdict: at 5 pairs "non-inferior" is wrong in 2.8 % of the worst cases
ALPHA = 0.05  # two-sided, of "better" and "worse"; half of it is the one-sided level of non-inferiority


class Word(StrEnum):
    """What the data allow to say. Its text is the `verdict` of the JSON line."""

    NON_INFERIOR = "non-inferior"
    INFERIOR = "inferior"
    WORSE = "worse"  # a proven loss; whether it exceeds the margin is open
    INCONCLUSIVE = "inconclusive"
    ERRORS = "inconclusive (errors)"  # counting errors against the arm would change the word
    CONFLICT = "inconclusive (conflict)"  # one episode was recorded twice with different results
    FEW = "inconclusive (few pairs)"
    FUTILE = "inconclusive (futile)"  # a sequential test gave up: no verdict had a fair chance any more
    INTERIM = "interim"  # planned episodes are missing, so there is no verdict yet
    NOISE_FLOOR = "noise floor"  # the A/A arm is measured, not judged
    NO_PAIRS = "no pairs"

    @property
    def is_open(self) -> bool:
        """Whether more episodes could change it."""
        return self not in (Word.NON_INFERIOR, Word.INFERIOR, Word.NOISE_FLOOR)


@dataclass(frozen=True)
class Verdict:
    """`word`, with the `qualifier` of a non-inferior arm ("better", "worse within the margin") and, where the word
    needs it, `because`. `worst_case` is the word with every error counted against the arm."""

    word: Word
    margin: float
    worst_case: Word
    qualifier: str | None = None
    because: str = ""

    @property
    def text(self) -> str:
        """The word with its qualifier."""
        if self.qualifier == "better":
            return self.qualifier
        return f"{self.word}, {self.qualifier}" if self.qualifier else str(self.word)


@dataclass(frozen=True)
class Ruling:
    """What a stopping rule has decided, as `judge` needs it: the words with errors counted against either verdict and
    with errors left out, None while the test goes on; `because` says how it stands, `interval` is the one that may be
    looked at as often as the test."""

    word: Word | None
    without_errors: Word | None
    because: str = ""
    interval: st.Interval | None = None

    @classmethod
    def undecidable(cls) -> Ruling:
        """Of a run that stopped on what it saw, asked another question than the declared one."""
        return cls(Word.INCONCLUSIVE, Word.INCONCLUSIVE)


def check_margin(margin: float) -> float:
    """The margin itself, or a UserError that says how to write one."""
    if not 0 < margin < 1:
        raise UserError(f"--margin {margin:g}: a loss of success rate between 0 and 1, write 0.02 for 2 pp")
    return margin


def judge(
    seen: Sample,
    worst: Sample,
    margin: float,
    *,
    missing: int = 0,
    conflicts: int = 0,
    control: bool = False,
    ruling: Ruling | None = None,
) -> Verdict:
    """The verdict on `seen`, which must survive `worst`: the same with errors counted the way that hurts the arm most.

    `missing`: planned pairs that have not run. Looking at an unfinished run and stopping at the first
    "non-inferior" would be wrong far more often than 2.5 %, so until they have there is no verdict; `ruling`, of a
    test that may be looked at, replaces that.
    """
    if ruling is not None:
        word, worst_word = ruling.without_errors, ruling.word
    else:
        word, worst_word = plain_word(seen, margin), plain_word(worst, margin)
    settled = worst_word or Word.INTERIM

    def said(word: Word, because: str = "") -> Verdict:
        return Verdict(word, margin, settled, None, because)

    if control and seen.pairs:
        return said(Word.NOISE_FLOOR)
    if not seen.pairs:
        return said(Word.NO_PAIRS)
    if conflicts:
        return said(
            Word.CONFLICT,
            f"{count_text(conflicts, 'episode')} recorded twice with different results, of which the later "
            "counts here; pure episodes never differ, so find the cause first",
        )
    if ruling is not None and word != worst_word:
        return said(Word.ERRORS)
    if word is None:
        return said(Word.INTERIM, ruling.because if ruling else "")
    if ruling is None and missing:
        return said(Word.INTERIM, f"{missing:,} planned pair{'s have' if missing > 1 else ' has'} not run yet")
    if {word, worst_word} == {Word.WORSE, Word.INFERIOR}:
        word = worst_word = Word.WORSE  # a loss either way
    if word != worst_word:
        return said(Word.ERRORS)
    return Verdict(word, margin, settled, _qualifier(word, seen), ruling.because if ruling else "")


def plain_word(seen: Sample, margin: float) -> Word:
    """The word on a fixed number of pairs, from its interval: "no significant difference" is never equality."""
    if seen.interval is None:
        return Word.NO_PAIRS
    if seen.pairs < FEWEST_PAIRS:
        return Word.FEW
    low, high = seen.interval
    if low > -margin:
        return Word.NON_INFERIOR
    if high < -margin:
        return Word.INFERIOR
    return Word.WORSE if high < 0 and _differs(seen) else Word.INCONCLUSIVE


def _differs(seen: Sample) -> bool:
    return seen.difference_p is not None and seen.difference_p <= ALPHA


def _qualifier(word: Word, seen: Sample) -> str | None:
    if word != Word.NON_INFERIOR or seen.interval is None or not _differs(seen):
        return None
    low, high = seen.interval
    return "better" if low > 0 else "worse within the margin" if high < 0 else None


@dataclass(frozen=True)
class PairTable:
    """The 2×2 table of finished pairs."""

    both_succeed: int
    broken: int
    repaired: int
    both_fail: int

    @classmethod
    def of(cls, pairs: Sequence[Outcomes]) -> PairTable:
        kinds = (("success", "success"), ("success", "failure"), ("failure", "success"), ("failure", "failure"))
        return cls(*(pairs.count(kind) for kind in kinds))

    @property
    def pairs(self) -> int:
        return self.both_succeed + self.broken + self.repaired + self.both_fail

    @property
    def delta(self) -> float | None:
        return (self.repaired - self.broken) / self.pairs if self.pairs else None

    @property
    def discordance(self) -> float | None:
        return (self.broken + self.repaired) / self.pairs if self.pairs else None

    @property
    def tango95(self) -> st.Interval | None:
        return st.tango(self.broken, self.repaired, self.pairs) if self.pairs else None

    @property
    def newcombe95(self) -> st.Interval | None:
        found = self.both_succeed, self.broken, self.repaired, self.both_fail
        return st.newcombe(*found) if self.pairs else None

    @property
    def mcnemar_p(self) -> float:
        return st.mcnemar_exact(self.broken, self.repaired)

    def to_json(self) -> JsonObject:
        return {
            "pairs": self.pairs,
            "both_succeed": self.both_succeed,
            "broken": self.broken,
            "repaired": self.repaired,
            "both_fail": self.both_fail,
            "delta": rounded(self.delta),
            "discordance": rounded(self.discordance),
            "tango95": rounded_interval(self.tango95),
            "newcombe95": rounded_interval(self.newcombe95),
            "mcnemar_p": rounded(self.mcnemar_p),
        }


def worst_step(outcomes: Outcomes) -> int:
    """What a pair with an error counts in the worst case: an error of the arm as a failure, one of the reference as a
    success of the reference."""
    reference, other = outcomes
    return int(other == "success") - int(reference != "failure")


@dataclass(frozen=True)
class Power:
    """What `pairs` can find when a share `discordance` of them flips, so that "no difference" is read with its power.

    `sequential`: the run stops on what it sees, which takes more pairs than one look at the end.
    """

    pairs: int
    discordance: float
    discordance_from: str
    margin: float
    sequential: bool
    difference: float | None  # smallest Δ found with 80 % power
    one_way_difference: float | None  # the same if every flip goes one way
    noninferiority_power: float  # of truly equal arms
    pairs_for_noninferiority: int

    def to_json(self) -> JsonObject:
        return {
            "pairs": self.pairs,
            "discordance": rounded(self.discordance),
            "discordance_from": self.discordance_from,
            "difference": rounded(self.difference),
            "one_way_difference": rounded(self.one_way_difference),
            "noninferiority_power": rounded(self.noninferiority_power),
            "pairs_for_noninferiority": self.pairs_for_noninferiority,
        }


def power(pairs: int, discordance: float, discordance_from: str, margin: float, sequential: bool = False) -> Power:
    """`pairs` > 0."""
    return Power(
        pairs,
        discordance,
        discordance_from,
        margin,
        sequential,
        st.minimum_detectable_difference(pairs, discordance),
        st.smallest_one_way_difference(pairs),
        st.noninferiority_power(pairs, discordance, margin),
        st.pairs_for_noninferiority(discordance, margin),
    )


def planning_discordance(table: PairTable, floor: float | None = None) -> tuple[float, str]:
    """(ψ to plan with, where it comes from).

    `floor` is the A/A arm's: no arm flips less than the reference against itself. Without any flip, the largest
    discordance the data allow (one-sided 95 %).
    """
    own = table.discordance or 0.0
    if floor and floor > own:
        return floor, "the A/A arm's"
    if own:
        return own, "observed"
    return 1 - 0.05 ** (1 / max(1, table.pairs)), "95 % upper bound, no flip observed"


def rounded(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.6g}")


def rounded_interval(interval: st.Interval | None) -> list[float | None] | None:
    return None if interval is None else [rounded(x) for x in interval]
