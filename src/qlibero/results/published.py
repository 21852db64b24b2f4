"""Published success counts judged without their episodes: what every possible pairing of the two would say.

A table prints 777/800 and 781/800 and not which episodes flipped, so the paired test cannot be made. But of two counts
on the same n episodes only one number is unknown, how many episodes broke: from max(0, k0 − k1) (one success set
holds the other) to min(k0, n − k1) (as few common successes as there can be). Every verdict over that range is bounds
on the truth: "worse in every pairing" is a proof. Counts of different n cannot be paired; two independent samples are
compared.

At a given difference more flips only widen Tango's interval and raise McNemar's p, so the two ends are the bounds
(held over whole ranges by a test).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qlibero.documents import JsonObject
from qlibero.errors import UserError
from qlibero.results.external_results import fisher_p
from qlibero.results.paired_outcomes import ALPHA, Word, check_margin, plain_word, rounded, rounded_interval
from qlibero.results.runs import DEFAULT_MARGIN
from qlibero.results.wording import delta_text, interval_text, margin_text, p_text
from qlibero.stats.proportions import Interval, newcombe_independent
from qlibero.stats.sampling import Sample

_COUNT = re.compile(r"(?P<name>[^=]+)=(?P<k>\d+)/(?P<n>\d+)")


@dataclass(frozen=True)
class Counts:
    name: str
    successes: int
    episodes: int

    @property
    def text(self) -> str:
        return f"{self.successes}/{self.episodes}"


@dataclass(frozen=True)
class Bounds:
    """`arm` against `reference` over all pairings (all None but the independent ones where n differs).

    `words` are the verdicts that occur; `p` the smallest and largest of McNemar's; `narrowest`, `widest` the 95 %
    intervals of the fewest and the most flips.
    """

    reference: Counts
    arm: Counts
    margin: float
    delta: float
    words: tuple[Word, ...]
    p: tuple[float, float]
    narrowest: Interval
    widest: Interval
    paired: bool

    @property
    def difference(self) -> str:
        """`provably different`, `never significant`, or `open`."""
        if self.p[1] <= ALPHA:
            return "provably different" if self.paired else "different, as independent samples"
        if self.p[0] > ALPHA:
            return "never significant" if self.paired else "not significant, as independent samples"
        return "open"

    @property
    def sentence(self) -> str:
        a, r, margin = self.arm, self.reference, self.margin
        delta = f"Δ {delta_text(self.delta, self.narrowest, margin)} pp"
        if not self.paired:
            return (
                f"{a.name} {a.text} against {r.name} {r.text}: {delta} {interval_text(self.narrowest, margin)}, "
                f"{self.difference} ({p_text(self.p[0])}); {self.words[0]} at {margin_text(margin)}. "
                "The numbers of episodes differ, so nothing can be paired."
            )
        between = p_text(self.p[0]) if self.p[0] == self.p[1] else f"{p_text(self.p[0])} to {p_text(self.p[1])}"
        verdict = f"{self.words[0]} in every pairing" if len(self.words) == 1 else f"{' or '.join(self.words)}"
        return (
            f"{a.name} {a.text} against {r.name} {r.text}: {self.difference}, McNemar {between} over all pairings; "
            f"{verdict} at {margin_text(margin)}. {delta} {interval_text(self.narrowest, margin)} with the fewest "
            f"flips, {interval_text(self.widest, margin)} with the most."
        )

    def to_json(self) -> JsonObject:
        return {
            "counts": [self.arm.successes, self.arm.episodes],
            "reference_counts": [self.reference.successes, self.reference.episodes],
            "paired": self.paired,
            "delta": rounded(self.delta),
            "mcnemar_p" if self.paired else "fisher_p": [rounded(p) for p in self.p],
            "interval95_narrowest": rounded_interval(self.narrowest),
            "interval95_widest": rounded_interval(self.widest),
            "difference": self.difference,
            "verdicts": [str(word) for word in self.words],
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class CountsComparison:
    """Published counts against the first of them."""

    reference: str
    margin: float
    arms: dict[str, Bounds]

    def words(self) -> set[Word]:
        """What every pairing agrees on, for `--fail-on`; an arm whose pairings disagree is open."""
        losses = {Word.INFERIOR, Word.WORSE}
        return {
            of.words[0] if len(of.words) == 1 else Word.WORSE if losses.issuperset(of.words) else Word.INCONCLUSIVE
            for of in self.arms.values()
        }

    def to_json(self) -> JsonObject:
        arms = {name: bounds.to_json() for name, bounds in self.arms.items()}
        return {"reference": self.reference, "margin": self.margin, "published": True, "arms": arms}


def read_counts(text: str) -> Counts:
    """`name=k/n`. Raises UserError for anything else."""
    found = _COUNT.fullmatch(text)
    if not found:
        raise UserError(f"--counts {text}: write name=successes/episodes, e.g. w4a8=777/800")
    counts = Counts(found["name"], int(found["k"]), int(found["n"]))
    if not 0 < counts.episodes or counts.successes > counts.episodes:
        raise UserError(f"--counts {text}: {counts.text} is not a number of successes among episodes")
    return counts


def compare_counts(texts: Sequence[str], margin: float | None = None) -> CountsComparison:
    """Every result against the first. Raises UserError for fewer than two, or two of one name."""
    margin = check_margin(DEFAULT_MARGIN if margin is None else margin)
    first, *others = map(read_counts, texts)
    names = [first.name, *(one.name for one in others)]
    if not others:
        raise UserError(f"--counts {texts[0]}: name at least two results, the reference first")
    if len(set(names)) < len(names):
        raise UserError(f"--counts: two results are called {next(n for n in names if names.count(n) > 1)}")
    return CountsComparison(first.name, margin, {one.name: bounds(first, one, margin) for one in others})


def bounds(reference: Counts, arm: Counts, margin: float) -> Bounds:
    k0, n, k1 = reference.successes, reference.episodes, arm.successes
    delta = k1 / arm.episodes - k0 / n
    if n != arm.episodes:
        interval = newcombe_independent(k1, arm.episodes, k0, n)
        independent = fisher_p(k1, arm.episodes, k0, n)
        word = Word.NON_INFERIOR if interval[0] > -margin else Word.INFERIOR if interval[1] < -margin else None
        word = word or (Word.WORSE if interval[1] < 0 and independent <= ALPHA else Word.INCONCLUSIVE)
        return Bounds(reference, arm, margin, delta, (word,), (independent, independent), interval, interval, False)
    fewest, most = max(0, k0 - k1), min(k0, n - k1)
    ends = [Sample(n, broken, broken + k1 - k0) for broken in (fewest, most)]
    found = _words(n, k1 - k0, margin, fewest, most)
    words = tuple(word for word in Word if word in found)
    p = sorted(one.difference_p for one in ends if one.difference_p is not None)
    narrowest, widest = (one.interval for one in ends)
    assert narrowest and widest, "results have at least one episode"
    return Bounds(reference, arm, margin, delta, words, (p[0], p[-1]), narrowest, widest, True)


def _words(n: int, gained: int, margin: float, fewest: int, most: int) -> set[Word]:
    """The verdicts of all pairings between two numbers broken. More flips only widen the interval, so where both ends
    agree all between them do."""
    ends = {plain_word(Sample(n, broken, broken + gained), margin) for broken in (fewest, most)}
    if len(ends) == 1 or most - fewest < 2:
        return ends
    middle = (fewest + most) // 2
    return _words(n, gained, margin, fewest, middle) | _words(n, gained, margin, middle, most)
