"""Stop spending episodes when the paired evidence has decided, at error rates that hold whenever one looks.

Pairs are taken in an order declared before the run (a seeded shuffle over all tasks, written to
`stopping.json` before the first episode), never in order of completion, and only as far as every earlier pair
is settled. Two supermartingales watch the margin (`evalues.py`): one grows while the arm is better than
reference − margin, the other while it is worse. The first to reach K/α (K arms share α) decides.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from qlibero.episode_key import EpisodeKey
from qlibero.errors import GuardRefusal
from qlibero.results.evalues import log_e_difference, margin_martingales

# None: not finished in both arms yet. "error": either side ended in an error, the pair is skipped.
PairStep = Literal[-1, 0, 1, "error"] | None


@dataclass(frozen=True)
class Decision:
    """`verdict` is None while more pairs are needed.

    `pairs`: settled pairs the verdict rests on, in declared order; `position`: how far along the declared
    order that is (errors included). E-values are the evidence at that point; `threshold` is K/α.
    """

    stop: bool
    verdict: Literal["non-inferior", "inferior", "undecided"] | None
    pairs: int
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
    order: tuple[EpisodeKey, ...]

    def decide(self, steps: Sequence[PairStep]) -> Decision:
        """`decide` under this rule. `steps` follows `order`; shorter than it means the rest has not run."""
        padded = [*steps, *[None] * (len(self.order) - len(steps))]
        return decide(padded, margin=self.margin, alpha=self.alpha, arms=len(self.arms))


def declared_order(keys: Iterable[EpisodeKey], seed: int) -> tuple[EpisodeKey, ...]:
    """The keys shuffled by a hash of each with `seed`: the same whatever order they come in."""
    return tuple(sorted(set(keys), key=lambda k: hashlib.sha256(f"{seed}/{k}".encode()).digest()))


def declare(
    run_dir: Path | str,
    keys: Iterable[EpisodeKey],
    *,
    margin: float,
    alpha: float,
    arms: Sequence[str],
    seed: int,
) -> Declaration:
    """Write the declaration before the first episode, or find the same one. Raises GuardRefusal if another is
    there.
    """
    declaration = Declaration(margin, alpha, tuple(sorted(arms)), declared_order(keys, seed))
    path = Path(run_dir) / "stopping.json"
    known = read_declaration(run_dir)
    if known is None:
        text = json.dumps({**asdict(declaration), "order": [str(key) for key in declaration.order]}, indent=1)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(text)
        os.replace(temporary, path)
    elif known != declaration:
        raise GuardRefusal(
            f"{path} declares another stopping rule or other episodes than this experiment; evidence gathered under one "
            "rule cannot be judged under another. Choose another --out"
        )
    return declaration


def read_declaration(run_dir: Path | str) -> Declaration | None:
    path = Path(run_dir) / "stopping.json"
    if not path.exists():
        return None
    data = json.loads(path.read_text())
    order = tuple(
        EpisodeKey(suite, *map(int, rest)) for suite, *rest in (text.split("/") for text in data["order"])
    )
    return Declaration(data["margin"], data["alpha"], tuple(data["arms"]), order)


def decide(steps: Sequence[PairStep], *, margin: float, alpha: float = 0.025, arms: int = 1) -> Decision:
    """Look at all declared pairs, in declared order: `Pair.step`, "error", or None where a pair is not
    finished.

    Reads up to the first None; without one every pair is spent and an open question ends as "undecided".
    `alpha` is the chance of a wrong verdict in each direction over the whole run. The same prefix always
    gives the same answer, so a resumed run cannot decide differently.
    """
    prefix = list(steps[: steps.index(None)]) if None in steps else list(steps)
    values = [s for s in prefix if s != "error"]
    above, below = margin_martingales(values, margin)
    bar = np.log(arms / alpha)
    crossed = np.flatnonzero((above >= bar) | (below >= bar))
    used = int(crossed[0]) + 1 if len(crossed) else len(values)
    if len(crossed):
        verdict = "non-inferior" if above[used - 1] >= bar else "inferior"
    else:
        verdict = "undecided" if len(prefix) == len(steps) else None
    broken, repaired = values[:used].count(-1), values[:used].count(1)
    position = (
        len(prefix) if not len(crossed) else [i for i, s in enumerate(prefix) if s != "error"][used - 1] + 1
    )
    return Decision(
        stop=verdict is not None,
        verdict=verdict,
        pairs=used,
        position=position,
        broken=broken,
        repaired=repaired,
        e_noninferior=_exp(above[used - 1]) if used else 1.0,
        e_inferior=_exp(below[used - 1]) if used else 1.0,
        e_difference=_exp(log_e_difference(broken, repaired)),
        threshold=arms / alpha,
    )


def _exp(log: float) -> float:
    return float(np.exp(min(log, 700.0)))
