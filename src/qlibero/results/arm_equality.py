"""Contract 3 in whole runs: arms of one artifact compute one arithmetic, and a kernel stays what it was when tried.

Two proofs. Where several arms of one artifact ran, their actions must be equal, bit for bit. And each arm's kernels
were tried again while it ran and when it ended (`quant/recheck.py`); every process that ran episodes left what it found
in <arm>/recheck-<shard>-<attempt>.json, which nothing overwrites: a directory that once held a wrong kernel's episodes
says so for ever. `run` ends with exit status 3 then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, Strict

from qlibero.console import count_text
from qlibero.documents import JsonObject, checked, read_json
from qlibero.episode_key import EpisodeKey
from qlibero.results.arm_meta import ArtifactMeta
from qlibero.results.ledger import ArmLedger
from qlibero.results.runs import RunResults

RECHECK = "recheck-{shard}-{attempt}.json"
_Count = Annotated[int, Strict(), Field(ge=0, le=2**53)]


class _Recheck(BaseModel):
    """What `quant/recheck.py` writes, as far as it is read back."""

    calls: _Count
    repeated: _Count
    layers: _Count
    products: _Count
    wrong: list[str]


@dataclass(frozen=True)
class SameArithmetic:
    """Of `episodes` that both arms ran, `equal` have the same action digest, outcome and number of steps."""

    arm: str
    other: str
    equal: int
    episodes: int

    @property
    def ok(self) -> bool:
        return self.equal == self.episodes

    def __str__(self) -> str:
        said = "the same integers, the same actions" if self.ok else "NOT THE SAME ARITHMETIC"
        return (
            f"{self.arm} and {self.other}: action digests equal in {self.equal} of "
            f"{count_text(self.episodes, 'episode')} ({said})"
        )


def same_arithmetic(run: RunResults) -> list[SameArithmetic]:
    """Every arm beside the first of the same artifact that is asked alike (flow steps, replanning, …). Left out are
    arms without one, arms whose kernel rounds (they do not claim to be equal), and pairs without episodes."""
    return _pairs(run.arms)


def _pairs(arms: Mapping[str, ArmLedger]) -> list[SameArithmetic]:
    found: list[SameArithmetic] = []
    first: dict[tuple[Any, ...], tuple[str, dict[EpisodeKey, Any]]] = {}
    for name, arm in arms.items():
        artifact = arm.meta.artifact
        sha256 = artifact.sha256 if isinstance(artifact, ArtifactMeta) else None
        if sha256 is None or arm.meta.exact is False:
            continue
        seen = {r.key: (r.action_digest, r.outcome, r.steps) for r in arm.records if r.outcome != "error"}
        alike = (sha256, *_asked(arm))
        if alike not in first:
            first[alike] = name, seen
            continue
        other, theirs = first[alike]
        both = seen.keys() & theirs.keys()
        if both:
            found.append(SameArithmetic(other, name, sum(seen[key] == theirs[key] for key in both), len(both)))
    return found


def _asked(arm: ArmLedger) -> tuple[Any, ...]:
    """What decides the actions beside the artifact: equal for arms that differ in their kernels alone."""
    of_policy = {name: value for name, value in arm.meta.identity.items() if name.startswith("policy ")}
    return frozenset(of_policy.items()), frozenset((r.replan_steps, r.latency_steps) for r in arm.records)


@dataclass(frozen=True)
class Rechecks:
    """What the processes that ran an arm found when they tried its kernels again, added up; `wrong` in sentences."""

    processes: int
    calls: int
    repeated: int
    layers: int
    products: int
    wrong: tuple[str, ...]

    def to_json(self) -> JsonObject:
        return {**asdict(self), "wrong": list(self.wrong)}


def rechecks(run_dir: Path, arm: str) -> Rechecks | None:
    """None when no process left anything (no real kernel, or none that came to its end).

    Raises UserError for a file that is none of these.
    """
    paths = sorted((run_dir / arm).glob(RECHECK.format(shard="*", attempt="*")))
    found = [checked(_Recheck, read_json(path), path) for path in paths]
    if not found:
        return None
    return Rechecks(
        processes=len(found),
        calls=sum(one.calls for one in found),
        repeated=sum(one.repeated for one in found),
        layers=max(one.layers for one in found),
        products=sum(one.products for one in found),
        wrong=tuple(text[:500] for one in found for text in one.wrong),
    )


@dataclass(frozen=True)
class Arithmetic:
    """Both proofs of one run directory; `rechecks` of the arms that have any."""

    same: tuple[SameArithmetic, ...]
    rechecks: dict[str, Rechecks]

    @property
    def problems(self) -> list[str]:
        unequal = [str(pair) for pair in self.same if not pair.ok]
        return unequal + [f"{name}: {text}" for name, found in self.rechecks.items() for text in found.wrong]

    def to_json(self) -> JsonObject:
        return {
            "ok": not self.problems,
            "same": [asdict(pair) for pair in self.same],
            "rechecks": {name: found.to_json() for name, found in self.rechecks.items()},
            "problems": self.problems,
        }


def arithmetic(run_dir: Path, arms: Mapping[str, ArmLedger]) -> Arithmetic:
    """What the run directory's actions and rechecks prove."""
    tried = {name: rechecks(run_dir, arm.arm) for name, arm in arms.items()}
    return Arithmetic(tuple(_pairs(arms)), {name: found for name, found in tried.items() if found is not None})


def together_json(found: Sequence[Arithmetic]) -> JsonObject:
    """Of several run directories as one; of an arm that is in several, the rechecks are listed."""
    tried: dict[str, list[JsonObject]] = {}
    for one in found:
        for arm, what in one.rechecks.items():
            tried.setdefault(arm, []).append(what.to_json())
    problems = [problem for one in found for problem in one.problems]
    same = [asdict(pair) for one in found for pair in one.same]
    return {"ok": not problems, "same": same, "rechecks": tried, "problems": problems}


def refusal(problems: Sequence[str]) -> str:
    """What `run` is refused with for an `Arithmetic` with problems; "" without."""
    if not problems:
        return ""
    return (
        "not one arithmetic:\n"
        + "\n".join(f"  {problem}" for problem in problems)
        + "\nThe episodes are kept and stay marked. Their success rate is not that of `fake`: choose another backend "
        "and another --out, and see `qlibero kernels check --forget`"
    )
