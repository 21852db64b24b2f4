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

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np

from qlibero import files
from qlibero.documents import read_json
from qlibero.episode_key import EpisodeKey
from qlibero.errors import GuardRefusal, UserError
from qlibero.results.records import Outcome
from qlibero.stats.evalues import confidence_sequence, margin_martingales
from qlibero.stats.group_sequential import (
    counts_at,
    critical_values,
    declared_looks,
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

BLOCK_PAIRS = 20  # pairs that run together, grouped by task; looks fall on whole blocks


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


@dataclass(frozen=True)
class Declaration:
    """What was fixed before the first episode: the rule, and the order in which pairs count."""

    margin: float
    alpha: float
    arms: tuple[str, ...]  # the arms under test; they share alpha
    order: tuple[EpisodeKey, ...]  # of all pairs there are
    max_pairs: int | None = None  # how many of them to spend at most
    method: Method = "evalues"
    looks: tuple[int, ...] = ()  # numbers of pairs at which a group-sequential test looks; the last is all it may spend
    futility: float | None = None  # conditional power below which a group-sequential test gives up; None: never

    @property
    def spendable(self) -> tuple[EpisodeKey, ...]:
        """The order as far as the cap lets it run."""
        return self.order[: self.max_pairs]

    def decide(self, steps: Sequence[PairStep]) -> Decision:
        """The decision under this rule. `steps` follows `order`; shorter than it means the rest has not run.

        Reads up to the first None. The same prefix always gives the same answer, so a resumed run cannot decide
        differently.
        """
        spent = list(steps[: len(self.spendable)])
        spent += [None] * (len(self.spendable) - len(spent))
        share = self.alpha / len(self.arms)
        if self.method == "evalues":
            return decide_by_evalues(spent, margin=self.margin, alpha=share)
        return decide_at_looks(spent, looks=self.looks, margin=self.margin, alpha=share, futility=self.futility)


_SETTLED: dict[int, Literal[-1, 0, 1]] = {-1: -1, 0: 0, 1: 1}


def pair_step(reference: Outcome | None, other: Outcome | None) -> PairStep:
    """What a pair of outcomes says: −1 broken, +1 repaired, 0 concordant; its bounds with an error; None unfinished."""
    if reference is None or other is None:
        return None
    lowest = int(other == "success") - int(reference != "failure")
    highest = int(other != "failure") - int(reference == "success")
    return _SETTLED[lowest] if lowest == highest else (lowest, highest)


def declared_order(keys: Iterable[EpisodeKey], seed: int) -> tuple[EpisodeKey, ...]:
    """The keys shuffled by a hash of each with `seed`: the same whatever order they come in."""
    return tuple(sorted(set(keys), key=lambda k: hashlib.sha256(f"{seed}/{k}".encode()).digest()))


def make_declaration(
    keys: Iterable[EpisodeKey],
    *,
    margin: float,
    alpha: float,
    arms: Sequence[str],
    seed: int,
    max_pairs: int | None = None,
    method: Method = "evalues",
    looks: int = 20,
    futility: float | None = None,
) -> Declaration:
    """The rule and its order, from the experiment alone; nothing is written. `looks`, `futility`: group-sequential."""
    order = declared_order(keys, seed)
    declaration = Declaration(margin, alpha, tuple(sorted(arms)), order, max_pairs, method)
    if method == "evalues":
        return declaration
    places = declared_looks(len(declaration.spendable), looks, BLOCK_PAIRS)
    return replace(declaration, looks=places, futility=futility or None)


def check_declaration(run_dir: Path | str, declaration: Declaration) -> Declaration | None:
    """What the directory declares, or None; GuardRefusal if that is another rule or order than `declaration`.

    What says when to give up and nothing about the evidence may differ: the cap of e-values, and `futility`.
    """
    known = read_declaration(run_dir)
    if known is None:
        return None
    same = replace(known, futility=declaration.futility)
    if known.method == declaration.method == "evalues":
        same = replace(same, max_pairs=declaration.max_pairs)
    if same == declaration:
        return known
    names = [field.name for field in fields(same) if getattr(same, field.name) != getattr(declaration, field.name)]
    shown = ", ".join(
        f"{name} {getattr(known, name)!r} there and {getattr(declaration, name)!r} here"
        if name in ("margin", "alpha", "method", "max_pairs")
        else name
        for name in names
    )
    raise GuardRefusal(
        f"{_path(run_dir)} declares another stopping rule or other episodes than this experiment (different: {shown}); "
        "evidence gathered under one rule cannot be judged under another. Restore what it says (a run without "
        "`stop.method` was under evalues), or choose another --out"
    )


def declare(run_dir: Path | str, declaration: Declaration) -> None:
    """Write the declaration before the first episode, or find it there. Raises GuardRefusal if another is there."""
    if check_declaration(run_dir, declaration) == declaration:
        return
    files.replace(
        _path(run_dir), json.dumps({**asdict(declaration), "order": [str(key) for key in declaration.order]}, indent=1)
    )


def read_declaration(run_dir: Path | str) -> Declaration | None:
    """The directory's declaration, None without one. Raises UserError for a file that is none."""
    path = _path(run_dir)
    try:
        data = read_json(path)
        order = tuple(EpisodeKey.parse(text) for text in data["order"])
        if not order:
            raise ValueError("it orders no pairs")
        found = Declaration(data["margin"], data["alpha"], tuple(data["arms"]), order, data.get("max_pairs"))
        method = data.get("method", "evalues")
        if method == "evalues":
            return found
        if method != "group_sequential":
            raise ValueError(f"method {method!r}")
        looks = tuple(data["looks"])
        if list(looks) != sorted(set(looks)) or looks[0] < 1 or looks[-1] != len(found.spendable):
            raise ValueError("its looks do not rise to the last pair")
        return replace(found, method=method, looks=looks, futility=data.get("futility"))
    except FileNotFoundError:
        return None
    except (UserError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as problem:
        raise UserError(
            f"{path}: not a stopping declaration ({problem}); it is written atomically, so something else changed it. "
            "Restore it, or start again in another --out"
        ) from None


def _path(run_dir: Path | str) -> Path:
    return Path(run_dir) / "stopping.json"


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
