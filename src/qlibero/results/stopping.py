"""Stop spending episodes when the paired evidence has decided, at error rates that hold whenever one looks.

Pairs are taken in an order declared before the run (a seeded shuffle over all tasks, written to
`stopping.json` before the first episode), never in order of completion, and only as far as every earlier pair
has run. Two supermartingales watch the margin (`evalues.py`): one grows while the arm is better than
reference − margin, the other while it is worse. The first to reach K/α (K arms share α) decides.

A pair that ended in an error has an outcome that nobody knows. Skipping it would trust that errors have nothing
to do with success, so it counts against either verdict: as the worst it can have been for "non-inferior" and as
the best for "inferior". Both martingales then lie below those of the true outcomes, which keeps the error
rates, and a retry can only add evidence. While the question is open such a pair is tried again by the next run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from qlibero import files
from qlibero.documents import read_json
from qlibero.episode_key import EpisodeKey
from qlibero.errors import GuardRefusal, UserError
from qlibero.results.evalues import log_e_difference, margin_martingales
from qlibero.results.records import Outcome

# A settled pair's step; (lowest, highest) it can have been where a side is an error;
# None: not finished in both arms yet.
PairStep = Literal[-1, 0, 1] | tuple[int, int] | None
Verdict = Literal["non-inferior", "inferior", "undecided"]


@dataclass(frozen=True)
class Decision:
    """`verdict` is None while more pairs are needed or errors are to be retried; `stop` says that neither is.

    The verdict rests on the first `position` pairs of the declared order: `pairs` settled ones and `errors`.
    `without_errors` is the verdict had the errors been left out: where it differs, the errors are what keeps the
    question open. E-values are the evidence at that point; `threshold` is K/α.
    """

    stop: bool
    verdict: Verdict | None
    without_errors: Verdict | None
    pairs: int
    errors: int
    position: int
    broken: int
    repaired: int
    e_noninferior: float
    e_inferior: float
    e_difference: float
    threshold: float


@dataclass(frozen=True)
class Declaration:
    """What was fixed before the first episode: the rule, and the order in which pairs count."""

    margin: float
    alpha: float
    arms: tuple[str, ...]  # the arms under test; they share alpha
    order: tuple[EpisodeKey, ...]  # of all pairs there are
    max_pairs: int | None = None  # how many of them to spend at most

    @property
    def spendable(self) -> tuple[EpisodeKey, ...]:
        """The order as far as the cap lets it run."""
        return self.order[: self.max_pairs]

    def decide(self, steps: Sequence[PairStep]) -> Decision:
        """`decide` under this rule. `steps` follows `order`; shorter than it means the rest has not run."""
        spent = list(steps[: len(self.spendable)])
        spent += [None] * (len(self.spendable) - len(spent))
        return decide(spent, margin=self.margin, alpha=self.alpha, arms=len(self.arms))


def pair_step(reference: Outcome | None, other: Outcome | None) -> PairStep:
    """What a pair of outcomes says: −1 broken, +1 repaired, 0 concordant; its bounds with an error; None unfinished."""
    if reference is None or other is None:
        return None
    lowest = int(other == "success") - int(reference != "failure")
    highest = int(other != "failure") - int(reference == "success")
    return lowest if lowest == highest else (lowest, highest)


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
) -> Declaration:
    """The rule and its order, from the experiment alone; nothing is written."""
    return Declaration(margin, alpha, tuple(sorted(arms)), declared_order(keys, seed), max_pairs)


def check_declaration(run_dir: Path | str, declaration: Declaration) -> Declaration | None:
    """What the directory declares, or None; GuardRefusal if that is another rule or order than `declaration`.

    The cap may differ: it says when to give up and nothing about the evidence, so it can be moved.
    """
    known = read_declaration(run_dir)
    if known is not None and replace(known, max_pairs=declaration.max_pairs) != declaration:
        raise GuardRefusal(
            f"{_path(run_dir)} declares another stopping rule or other episodes than this experiment; "
            "evidence gathered under one rule cannot be judged under another. Choose another --out"
        )
    return known


def declare(run_dir: Path | str, declaration: Declaration) -> None:
    """Write the declaration before the first episode, or find it there. Raises GuardRefusal if another is there."""
    if check_declaration(run_dir, declaration) == declaration:
        return
    path = _path(run_dir)
    text = json.dumps({**asdict(declaration), "order": [str(key) for key in declaration.order]}, indent=1)
    files.replace(path, text)


def read_declaration(run_dir: Path | str) -> Declaration | None:
    """The directory's declaration, None without one. Raises UserError for a file that is none."""
    path = _path(run_dir)
    try:
        data = read_json(path)
        order = tuple(
            EpisodeKey(suite, *map(int, rest)) for suite, *rest in (text.split("/") for text in data["order"])
        )
        if not order:
            raise ValueError("it orders no pairs")
        return Declaration(data["margin"], data["alpha"], tuple(data["arms"]), order, data.get("max_pairs"))
    except FileNotFoundError:
        return None
    except (UserError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as problem:
        raise UserError(
            f"{path}: not a stopping declaration ({problem}); it is written atomically, so something else changed it. "
            "Restore it, or start again in another --out"
        ) from None


def _path(run_dir: Path | str) -> Path:
    return Path(run_dir) / "stopping.json"


def decide(steps: Sequence[PairStep], *, margin: float, alpha: float = 0.025, arms: int = 1) -> Decision:
    """Look at all pairs that may be spent, in declared order (`pair_step` of each).

    Reads up to the first None; without one every pair is spent, and an open question ends as "undecided" unless
    errors are left to retry. `alpha` is the chance of a wrong verdict in each direction over the whole run. The
    same prefix always gives the same answer, so a resumed run cannot decide differently.
    """
    prefix = list(steps[: steps.index(None)]) if None in steps else list(steps)
    settled = [s for s in prefix if not isinstance(s, tuple)]
    above, _ = margin_martingales([s[0] if isinstance(s, tuple) else s for s in prefix], margin)
    _, below = margin_martingales([s[1] if isinstance(s, tuple) else s for s in prefix], margin)
    bar = np.log(arms / alpha)
    crossed = np.flatnonzero((above >= bar) | (below >= bar))
    used = int(crossed[0]) + 1 if len(crossed) else len(prefix)
    verdict: Verdict | None = None
    if len(crossed):
        verdict = "non-inferior" if above[used - 1] >= bar else "inferior"
    elif len(prefix) == len(steps) == len(settled):
        verdict = "undecided"
    without_errors = verdict
    if len(settled) < len(prefix):
        unfinished = [None] if len(prefix) < len(steps) else []
        without_errors = decide([*settled, *unfinished], margin=margin, alpha=alpha, arms=arms).verdict
    counted = [s for s in prefix[:used] if not isinstance(s, tuple)]
    broken, repaired = counted.count(-1), counted.count(1)
    return Decision(
        stop=verdict is not None,
        verdict=verdict,
        without_errors=without_errors,
        pairs=len(counted),
        errors=used - len(counted),
        position=used,
        broken=broken,
        repaired=repaired,
        e_noninferior=_exp(above[used - 1]) if used else 1.0,
        e_inferior=_exp(below[used - 1]) if used else 1.0,
        e_difference=_exp(log_e_difference(broken, repaired)),
        threshold=arms / alpha,
    )


def _exp(log: float) -> float:
    return float(np.exp(min(log, 700.0)))
