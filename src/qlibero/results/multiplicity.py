"""Many claims in one comparison: their p-values after Holm."""

from __future__ import annotations

from dataclasses import replace

from qlibero.results.comparison import Adjusted, ArmComparison, Question
from qlibero.results.paired_outcomes import Word
from qlibero.stats.proportions import holm, noninferiority_p

ONE_SIDED_ALPHA = 0.025


def adjusted(arms: dict[str, ArmComparison], question: Question) -> tuple[dict[str, ArmComparison], int]:
    """Holm over the confirmatory family, and its size: arms under test, or arms × suites where each suite is a claim.

    A control is no hypothesis. Under a stopping rule the arms share α, so there is nothing left to adjust.
    """
    tested = [arm for arm in arms.values() if not arm.control and arm.sequential is None and arm.note is None]
    per_suite = question.primary == "per-suite"
    rows = [row for arm in tested for row in (arm.suites.values() if per_suite else [arm]) if row.table.pairs]
    noninferiority = holm([1.0 if row.noninferiority_p is None else row.noninferiority_p for row in rows])
    difference = holm([1.0 if row.seen.difference_p is None else row.seen.difference_p for row in rows])
    found = {}
    for row, ni, different in zip(rows, noninferiority, difference, strict=True):
        n, passed = row.table.pairs, row.verdict.word == Word.NON_INFERIOR and ni <= ONE_SIDED_ALPHA
        best = noninferiority_p(0, 0, n, question.margin) * len(rows)
        found[id(row)] = Adjusted(different, ni, len(rows), passed, best <= ONE_SIDED_ALPHA)

    def with_holm(arm: ArmComparison) -> ArmComparison:
        own = found.get(id(arm))
        suites = {
            # the row of an only suite is the arm's own
            name: replace(suite, adjusted=found.get(id(suite)) or (own if len(arm.suites) == 1 else None))
            for name, suite in arm.suites.items()
        }
        if per_suite and len(suites) == 1:
            own = next(iter(suites.values())).adjusted
        return replace(arm, adjusted=own, suites=suites)

    return {name: with_holm(arm) for name, arm in arms.items()}, len(rows)
