"""Contract 3 in whole runs: arms of one artifact compute one arithmetic, and a kernel stays what it was when tried.

Two proofs. Where several arms of one artifact ran, their actions must be equal, bit for bit. And each arm's kernels
were tried again while it ran and when it ended (`quant/recheck.py`); every process that ran episodes left what it found
in <arm>/recheck-<shard>-<attempt>.json, which nothing overwrites: a directory that once held a wrong kernel's episodes
says so for ever. `run` ends with exit status 3 then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, Strict

from qlibero.console import count_text
from qlibero.documents import checked, read_json
from qlibero.episode_key import EpisodeKey
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
        artifact = arm.meta.get("artifact")
        sha256 = artifact.get("sha256") if isinstance(artifact, Mapping) else None
        if sha256 is None or arm.meta.get("exact") is False:
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
    of_policy = {name: value for name, value in (arm.meta.get("identity") or {}).items() if name.startswith("policy ")}
    return frozenset(of_policy.items()), frozenset((r.replan_steps, r.latency_steps) for r in arm.records)


def rechecks(run_dir: Path, arm: str) -> dict[str, Any] | None:
    """What the processes that ran this arm found, added up: {"processes", "calls", "repeated", "layers", "products",
    "wrong": [text]}; None when none left anything (no real kernel, or none that came to its end).

    Raises UserError for a file that is none of these.
    """
    total: dict[str, Any] = {"processes": 0, "calls": 0, "repeated": 0, "layers": 0, "products": 0, "wrong": []}
    for path in sorted((run_dir / arm).glob(RECHECK.format(shard="*", attempt="*"))):
        found = checked(_Recheck, read_json(path), path)
        total["calls"] += found.calls
        total["repeated"] += found.repeated
        total["layers"] = max(total["layers"], found.layers)
        total["products"] += found.products
        total["wrong"] += [text[:500] for text in found.wrong]
        total["processes"] += 1
    return total if total["processes"] else None


def arithmetic(run_dir: Path, arms: Mapping[str, ArmLedger]) -> dict[str, Any]:
    """{"ok", "same": [{"arm", "other", "equal", "episodes"}], "rechecks": {arm: …}, "problems": [sentence]}."""
    same = _pairs(arms)
    tried = {name: found for name, arm in arms.items() if (found := rechecks(run_dir, arm.arm)) is not None}
    problems = [str(pair) for pair in same if not pair.ok]
    problems += [f"{name}: {text}" for name, found in tried.items() for text in found["wrong"]]
    return {"ok": not problems, "same": [asdict(pair) for pair in same], "rechecks": tried, "problems": problems}


def together(found: list[dict[str, Any]]) -> dict[str, Any]:
    """`arithmetic` of several run directories as one; of several processes' rechecks the lists are joined."""
    tried: dict[str, Any] = {}
    for one in found:
        for arm, what in one["rechecks"].items():
            tried.setdefault(arm, []).append(what)
    return {
        "ok": all(one["ok"] for one in found),
        "same": [pair for one in found for pair in one["same"]],
        "rechecks": tried,
        "problems": [problem for one in found for problem in one["problems"]],
    }


def refusal(found: Mapping[str, Any]) -> str:
    """What `run` is refused with for an `arithmetic` that is not ok; "" for one that is."""
    if found["ok"]:
        return ""
    return (
        "not one arithmetic:\n"
        + "\n".join(f"  {problem}" for problem in found["problems"])
        + "\nThe episodes are kept and stay marked. Their success rate is not that of `fake`: choose another backend "
        "and another --out, and see `qlibero kernels check --forget`"
    )
