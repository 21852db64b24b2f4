"""What a report is made of, gathered once: arms in order with their colours, the comparison, the videos it
may hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError
from qlibero.results.compare import compare
from qlibero.results.pairing import Arm, collect_arms
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import REFERENCE, RunResults, video_path

COLOURS = 6  # classes c2 … c7 in report.css; c0 is the reference's, c1 the A/A control's


@dataclass(frozen=True)
class Video:
    """One episode of an arm beside the reference's. The steps where they part are "never" or "unknown" where
    not a number.
    """

    key: EpisodeKey
    arm: str
    reference_file: Path
    arm_file: Path
    reference_outcome: str
    arm_outcome: str
    actions_part: int | str
    visibly_part: int | str


@dataclass(frozen=True)
class Material:
    runs: Sequence[RunResults]
    arms: dict[str, Arm]  # the reference first
    reference: str | None
    comparison: dict[str, Any] | None
    margin: float

    def colour(self, arm: str) -> str:
        """The arm's colour class, the same everywhere on the page."""
        if arm == self.reference or self.arms[arm].is_control:
            return "c1" if self.arms[arm].is_control else "c0"
        others = [name for name in self.arms if name != self.reference and not self.arms[name].is_control]
        return f"c{2 + others.index(arm) % COLOURS}"

    def records(self, arm: str) -> list[EpisodeRecord]:
        return [self.arms[arm].records[key] for key in sorted(self.arms[arm].records)]

    @property
    def experiment(self) -> dict[str, Any]:
        return self.runs[0].experiment

    @property
    def name(self) -> str:
        return " + ".join(dict.fromkeys(run.name for run in self.runs))

    @property
    def tasks(self) -> list[tuple[str, int]]:
        return sorted({(key.suite, key.task) for arm in self.arms.values() for key in arm.records})

    @property
    def compared(self) -> dict[str, dict[str, Any]]:
        return self.comparison["arms"] if self.comparison else {}


def gather(runs: Sequence[RunResults], reference: str | None, margin: float) -> Material:
    """Without the baseline, or with one arm alone, there is no comparison and the report says what there is.

    Raises UserError for a `reference` that was named and is not there.
    """
    arms = collect_arms(runs)
    if reference is not None and reference not in arms:
        raise UserError(f"--reference {reference}: no such arm; here are {', '.join(arms)}")
    reference = reference or REFERENCE
    present = reference if reference in arms else None
    ordered = dict(sorted(arms.items(), key=lambda item: item[0] != present))
    comparison = compare(runs, reference, margin) if present and len(arms) > 1 else None
    return Material(runs, ordered, present, comparison, margin)


def flipped_videos(m: Material) -> list[Video]:
    """Filmed episodes that flipped, broken before repaired, one arm after the other so that each gets its
    share.
    """
    queues = []
    for name, result in m.compared.items():
        found = []
        for key in sorted(m.arms[name].records.keys() & m.arms[m.reference].records.keys()):
            left, right = m.arms[m.reference].records[key], m.arms[name].records[key]
            if {left.outcome, right.outcome} != {"success", "failure"}:
                continue
            files = [video_path(m.arms[n].run_dirs[key], r) for n, r in ((m.reference, left), (name, right))]
            if all(file.exists() for file in files):
                steps = [
                    result["divergence"][kind].get(str(key), "unknown") for kind in ("steps", "visible_steps")
                ]
                steps = ["never" if step is None else step for step in steps]
                found.append(Video(key, name, *files, left.outcome, right.outcome, *steps))
        queues.append(sorted(found, key=lambda v: v.arm_outcome == "success"))
    return [queue[i] for i in range(max(map(len, queues), default=0)) for queue in queues if i < len(queue)]
