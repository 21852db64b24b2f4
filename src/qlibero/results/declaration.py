"""What a stopping rule declares before the first episode (stopping.json): the rule and the order of its pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from qlibero import files
from qlibero.documents import read_json
from qlibero.episode_key import EpisodeKey
from qlibero.errors import GuardRefusal, UserError
from qlibero.results.stopping import Decision, Method, PairStep, decide_at_looks, decide_by_evalues
from qlibero.stats.group_sequential import declared_looks

BLOCK_PAIRS = 20  # pairs that run together, grouped by task; looks fall on whole blocks


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
