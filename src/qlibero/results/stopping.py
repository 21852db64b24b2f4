"""Stop spending episodes when the paired evidence has decided, at error rates that hold however the run went.

Pairs are taken in an order declared before the run (a seeded shuffle over all tasks, written to
`stopping.json` before the first episode), never in order of completion, and only as far as every earlier pair
has run. One of two methods decides, each with α for a wrong "non-inferior" and α for a wrong "inferior" over the whole
run; K arms share it, α/K each:
  - `group_sequential`: looks at declared numbers of pairs (`stats.group_sequential`). The fewest pairs; the most it may
    take are part of the design and cannot change.
  - `evalues`: two supermartingales (`stats.evalues`), looked at after every pair, for runs whose end is open. A
    `stopping.json` that names no method is of this one.

A pair that ended in an error has an outcome that nobody knows. Skipping it would trust that errors have nothing
to do with success, so it counts against either verdict: as the worst it can have been for "non-inferior" and as
the best for "inferior". The evidence then lies below that of the true outcomes, which keeps the error rates, and a
retry can only add to it. While the question is open such a pair is tried again by the next run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qlibero.results.records import Outcome
from qlibero.stats.evalues import confidence_sequence, margin_martingales
from qlibero.stats.group_sequential import (
    counts_at,
    critical_values,
    evidence,
    hopeless,
    repeated_interval,
)
from qlibero.stats.proportions import Interval

# A settled pair's step; (lowest, highest) it can have been where a side is an error;
# None: not finished in both arms yet.
PairStep = Literal[-1, 0, 1] | tuple[int, int] | None
Method = Literal["group_sequential", "evalues"]
Verdict = Literal["non-inferior", "inferior", "undecided", "futile"]


@dataclass(frozen=True)
class Decision:
    """`verdict` is None while more pairs are needed or errors are to be retried; `stop` says that neither is.

    `undecided`: all pairs are spent; `futile`: neither verdict has a fair chance any more. The verdict rests on the
    first `position` pairs of the declared order: `pairs` settled ones, of which `broken` and `repaired`, and `errors`.
    `without_errors` is the verdict had the errors been left out: where it differs, the errors are what keeps the
    question open.

    `interval` is of Δ and belongs to the method: it holds at `confidence` at all looks at once and agrees with the
    verdict (the repeated confidence interval of the last look; the martingales inverted). None before the first look.
    `look` of `looks` were taken, the next is at `next_look` pairs; all three None for e-values.
    `noninferior` and `inferior` are the evidence at the last look, z or e-values; `threshold` is what they must reach.
    """

    method: Method
    stop: bool
    verdict: Verdict | None
    without_errors: Verdict | None
    interval: Interval | None
    confidence: float
    pairs: int
    errors: int
    position: int
    broken: int
    repaired: int
    noninferior: float
    inferior: float
    threshold: float
    look: int | None = None
    looks: int | None = None
    next_look: int | None = None


_SETTLED: dict[int, Literal[-1, 0, 1]] = {-1: -1, 0: 0, 1: 1}


def pair_step(reference: Outcome | None, other: Outcome | None) -> PairStep:
    """What a pair of outcomes says: −1 broken, +1 repaired, 0 concordant; its bounds with an error; None unfinished."""
    if reference is None or other is None:
        return None
    lowest = int(other == "success") - int(reference != "failure")
    highest = int(other != "failure") - int(reference == "success")
    return _SETTLED[lowest] if lowest == highest else (lowest, highest)


def decide_at_looks(
    steps: Sequence[PairStep],
    *,
    looks: Sequence[int],
    margin: float,
    alpha: float = 0.025,
    futility: float | None = None,
) -> Decision:
    """The group-sequential decision from all pairs that may be spent, in declared order (`pair_step` of each)."""
    prefix = _finished(steps)
    critical = critical_values(tuple(looks), alpha)
    reached = [n for n in looks if n <= len(prefix)]
    low, high = (counts_at(bound, reached) for bound in _bounds(prefix))
    verdict: Verdict | None = None
    used, z = len(prefix), (0.0, 0.0)
    look = len(reached)
    for k, n in enumerate(reached):
        up, down = evidence(low[k], high[k], n, margin)
        z = float(up), float(down)
        if max(z) >= critical[k]:
            verdict = "non-inferior" if z[0] >= critical[k] else "inferior"
        elif futility and n < looks[-1] and hopeless(low[k], high[k], n, looks[-1], margin, critical[-1], futility):
            verdict = "futile"
        if verdict:
            look, used = k + 1, n
            break
    errors = any(isinstance(step, tuple) for step in prefix)
    if verdict is None and len(prefix) == len(steps) and not errors:
        verdict = "undecided"
    last = look - 1
    return Decision(
        method="group_sequential",
        stop=verdict is not None,
        verdict=verdict,
        without_errors=_without_errors(prefix, looks, margin, critical, futility, len(steps)) if errors else verdict,
        interval=repeated_interval(low[last], high[last], reached[last], critical[last]) if look else None,
        confidence=1 - 2 * alpha,
        **_table(prefix[:used]),
        noninferior=z[0],
        inferior=z[1],
        threshold=float(critical[max(last, 0)]),
        look=look,
        looks=len(looks),
        next_look=looks[look] if verdict is None and look < len(looks) else None,
    )


def _without_errors(
    prefix: Sequence[PairStep],
    looks: Sequence[int],
    margin: float,
    critical: Sequence[float],
    futility: float | None,
    pairs: int,
) -> Verdict | None:
    """What the settled pairs alone say at the same looks."""
    for n, bar in zip(looks, critical, strict=True):
        settled = [step for step in prefix[:n] if step is not None and not isinstance(step, tuple)]
        if n > len(prefix) or not settled:
            continue
        (counts,) = counts_at(settled, [len(settled)])
        up, down = evidence(counts, counts, len(settled), margin)
        if max(up, down) >= bar:
            return "non-inferior" if up >= bar else "inferior"
        if futility and n < looks[-1]:
            if hopeless(counts, counts, len(settled), looks[-1], margin, critical[-1], futility):
                return "futile"
    return "undecided" if len(prefix) == pairs else None


def decide_by_evalues(
    steps: Sequence[PairStep], *, margin: float, alpha: float = 0.025, interval: bool = True
) -> Decision:
    """The anytime-valid decision from all pairs that may be spent, in declared order (`pair_step` of each).

    Without `interval`, the expensive part, it has none.
    """
    prefix = _finished(steps)
    low, high = _bounds(prefix)
    above, _ = margin_martingales(low, margin)
    _, below = margin_martingales(high, margin)
    bar = np.log(1 / alpha)
    crossed = np.flatnonzero((above >= bar) | (below >= bar))
    used = int(crossed[0]) + 1 if len(crossed) else len(prefix)
    settled = [step for step in prefix if not isinstance(step, tuple)]
    verdict: Verdict | None = None
    if len(crossed):
        verdict = "non-inferior" if above[used - 1] >= bar else "inferior"
    elif len(settled) == len(steps):
        verdict = "undecided"
    without_errors = verdict
    if len(settled) < len(prefix):
        unfinished = [None] if len(prefix) < len(steps) else []
        without_errors = decide_by_evalues([*settled, *unfinished], margin=margin, alpha=alpha, interval=False).verdict
    return Decision(
        method="evalues",
        stop=verdict is not None,
        verdict=verdict,
        without_errors=without_errors,
        interval=confidence_sequence(low[:used], high[:used], 1 / alpha) if used and interval else None,
        confidence=1 - 2 * alpha,
        **_table(prefix[:used]),
        noninferior=_exp(above[used - 1]) if used else 1.0,
        inferior=_exp(below[used - 1]) if used else 1.0,
        threshold=1 / alpha,
    )


def _finished(steps: Sequence[PairStep]) -> list[PairStep]:
    """Up to the first pair that is not finished in both arms."""
    return list(steps[: steps.index(None)]) if None in steps else list(steps)


def _bounds(steps: Sequence[PairStep]) -> tuple[list[int], list[int]]:
    """The steps at worst and at best for the arm."""
    both = [step if isinstance(step, tuple) else (step, step) for step in steps if step is not None]
    return [low for low, _ in both], [high for _, high in both]


def _table(steps: Sequence[PairStep]) -> dict[str, int]:
    settled = [step for step in steps if not isinstance(step, tuple)]
    return {
        "pairs": len(settled),
        "errors": len(steps) - len(settled),
        "position": len(steps),
        "broken": settled.count(-1),
        "repaired": settled.count(1),
    }


def _exp(log: float) -> float:
    return float(np.exp(min(log, 700.0)))
