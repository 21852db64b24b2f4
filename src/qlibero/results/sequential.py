"""A stopping rule's decision about an arm, recomputed from the ledger in the declared order (`stopping.py`).

It is the verdict of that run: an interval for a fixed number of pairs means nothing where the number depends on what
was seen. Each run is decided by itself, so several together, another margin or another reference than the declared
ones get none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlibero.results.comparison import SequentialTest
from qlibero.results.declaration import Declaration
from qlibero.results.paired_outcomes import Ruling, Word
from qlibero.results.pairing import Arm, Pairing
from qlibero.results.runs import REFERENCE
from qlibero.results.stopping import pair_step
from qlibero.results.wording import ruling_text


@dataclass(frozen=True)
class RuledSuite:
    """One run's test and the suite it is about."""

    suite: str
    test: SequentialTest

    def ruling(self, margin: float) -> Ruling:
        """What `judge` takes for the verdict at `margin`; nothing is decided at another than the declared one."""
        if margin != self.test.margin:
            return Ruling.undecidable()
        decision = self.test.decision
        return Ruling(
            _word(decision.verdict),
            _word(decision.without_errors),
            ruling_text(self.test),
            decision.interval or (-1.0, 1.0),  # not looked at yet: nothing can be said
        )


def sequential_tests(declarations: Sequence[Declaration], base: Arm, arm: Arm, pairing: Pairing) -> list[RuledSuite]:
    """The tests that were declared about `arm` against the reference `base`."""
    outcomes = {p.key: p.outcomes for p in (*pairing.pairs, *pairing.errors)}
    found = []
    for declaration in declarations:
        if base.name != REFERENCE or arm.name not in declaration.arms:
            continue
        decision = declaration.decide([pair_step(*outcomes.get(k, (None, None))) for k in declaration.order])
        ran = sum(key in one.records for one in (base, arm) for key in declaration.order)
        saved = max(0, 2 * len(declaration.spendable) - ran) if decision.stop else 0
        test = SequentialTest(decision, declaration.margin, len(declaration.order), declaration.max_pairs, saved)
        found.append(RuledSuite(declaration.order[0].suite, test))
    return found


def _word(verdict: str | None) -> Word | None:
    words = {"undecided": Word.INCONCLUSIVE, "futile": Word.FUTILE}
    return None if verdict is None else words.get(verdict) or Word(verdict)
