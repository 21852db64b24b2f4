"""Contract 3 in whole episodes: arms of one artifact compute one arithmetic, so their actions are equal, bit for bit.

The court tries kernels layer by layer before a run; this looks at what came out, `fake` beside a real kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlibero.results.runs import RunResults


@dataclass(frozen=True)
class SameArithmetic:
    """Of `episodes` that both arms ran, `equal` have the same action digest, outcome and number of steps."""

    arm: str
    other: str
    equal: int
    episodes: int

    def __str__(self) -> str:
        said = "the same integers, the same actions" if self.equal == self.episodes else "NOT THE SAME ARITHMETIC"
        return f"{self.arm} and {self.other}: action digests equal in {self.equal} of {self.episodes} episodes ({said})"


def same_arithmetic(run: RunResults) -> list[SameArithmetic]:
    """Every arm beside the first of the same artifact; arms without one, and pairs without episodes, are left out."""
    found, first = [], {}
    for name, arm in run.arms.items():
        artifact = (arm.meta.get("artifact") or {}).get("sha256")
        if artifact is None:
            continue
        seen = {r.key: (r.action_digest, r.outcome, r.steps) for r in arm.records if r.outcome != "error"}
        if artifact not in first:
            first[artifact] = name, seen
            continue
        other, theirs = first[artifact]
        both = seen.keys() & theirs.keys()
        if both:
            found.append(SameArithmetic(other, name, sum(seen[key] == theirs[key] for key in both), len(both)))
    return found
