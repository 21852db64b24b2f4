"""What a report is made of, gathered once: arms in order with their colours, the comparisons, the videos it may hold.

A report over several cells (`results.cells`) is one page with one comparison per cell. Arms are told apart by id: their
name, behind their cell's label where there are several cells.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError
from qlibero.results.cells import Cell, cells_of
from qlibero.results.compare import compare
from qlibero.results.comparison import ArmComparison, Comparison
from qlibero.results.controls import NoiseFloor
from qlibero.results.pairing import Arm, collect_arms
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import RunResults, common_margin, video_path
from qlibero.results.selection import first_reference
from qlibero.results.wording import margin_text

HUES = 8  # classes c2 … c9 in report.css; c0 is a reference's, c1 an A/A control's
FORMS = ("", " ring", " square", " ring square")  # of the first eight arms, the next eight …


@dataclass(frozen=True)
class Video:
    """One episode of an arm beside the reference's.

    The steps where they part are "never" or "unknown" where not a number.
    """

    key: EpisodeKey
    arm: str
    reference_file: Path
    arm_file: Path
    reference_outcome: str
    arm_outcome: str
    actions_part: int | str
    visibly_part: int | str
    grippers_part: int | str


@dataclass(frozen=True)
class Part:
    """One cell of the report: the ids of its arms (reference first, A/A last) and their comparison, if there is one."""

    cell: Cell
    arms: tuple[str, ...]
    reference: str | None
    comparison: Comparison | None

    @property
    def tested(self) -> list[str]:
        return [id_ for id_ in self.arms if id_ in self.compared and not self.compared[id_].control]

    @property
    def compared(self) -> dict[str, ArmComparison]:
        """The comparison's arms by id, A/A last."""
        if self.comparison is None:
            return {}
        by_id = {self.id(name): result for name, result in self.comparison.arms.items()}
        return {id_: by_id[id_] for id_ in self.arms if id_ in by_id}

    def id(self, name: str) -> str:
        return f"{self.cell.label}/{name}" if self.cell.label else name


@dataclass(frozen=True)
class ReportData:
    runs: Sequence[RunResults]
    parts: tuple[Part, ...]
    arms: dict[str, Arm]
    recorded: tuple[Video, ...] = ()
    """Of flipped episodes, those that the page holds."""
    left_out: int = 0
    """How many more there are."""

    def part_of(self, arm: str) -> Part:
        return next(part for part in self.parts if arm in part.arms)

    def reference_of(self, arm: str) -> Arm:
        """Of an arm that is compared, what with."""
        reference = self.part_of(arm).reference
        assert reference is not None, f"{arm} has no comparison"
        return self.arms[reference]

    def floor_of(self, arm: str) -> NoiseFloor | None:
        """What the A/A controls of the arm's cell flip; None without one."""
        comparison = self.part_of(arm).comparison
        return comparison.floor if comparison else None

    def margin_of(self, arm: str) -> float:
        """Of an arm that is compared."""
        return self.part_of(arm).compared[arm].question.margin

    def colour(self, arm: str) -> str:
        """The arm's colour classes, the same everywhere on the page."""
        if arm in self._plain:
            return "c0"
        if self.arms[arm].is_control:
            return "c1"
        place = [id_ for id_ in self.arms if id_ not in self._plain and not self.arms[id_].is_control].index(arm)
        return f"c{2 + place % HUES}{FORMS[place // HUES % len(FORMS)]}"

    @property
    def _plain(self) -> set[str | None]:
        return {part.reference for part in self.parts}

    def records(self, arm: str) -> list[EpisodeRecord]:
        return [self.arms[arm].records[key] for key in sorted(self.arms[arm].records)]

    @property
    def name(self) -> str:
        """The experiment's name; of several, what their names begin with, else all of them."""
        names = list(dict.fromkeys(run.name for run in self.runs))
        shared = os.path.commonprefix(names).rpartition(".")[0] if len(names) > 1 else ""
        return shared or " + ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    @property
    def tasks(self) -> list[tuple[str, int]]:
        return self.tasks_of(self.arms)

    def tasks_of(self, arms: Sequence[str] | dict[str, Arm]) -> list[tuple[str, int]]:
        return sorted({(key.suite, key.task) for id_ in arms for key in self.arms[id_].records})

    def instruction(self, suite: str, task: int) -> str:
        """What the policy is told in this task; "" where the run did not keep it."""
        for run in self.runs:
            if text := ((run.environment.get("instructions") or {}).get(suite) or {}).get(str(task)):
                return str(text)
        return ""

    @property
    def compared(self) -> dict[str, ArmComparison]:
        return {id_: result for part in self.parts for id_, result in part.compared.items()}

    @property
    def margins(self) -> str:
        """The declared margin in words; each comparison's own where cells declared different ones."""
        texts = dict.fromkeys(margin_text(part.comparison.margin) for part in self.parts if part.comparison)
        return next(iter(texts)) if len(texts) == 1 else f"its margin ({', '.join(texts)})"


def gather(runs: Sequence[RunResults], reference: str | None, margin: float | None) -> ReportData:
    """Every cell compared at `margin`, or the one its experiment declared. A cell without the reference arm, or with
    one arm alone, has no comparison and the report says what there is.

    Raises UserError for a `reference` that was named and is nowhere.
    """
    if reference is not None and not any(reference in run.arms for run in runs):
        names = dict.fromkeys(name for run in runs for name in run.arms)
        raise UserError(f"--reference {reference}: no such arm; here are {', '.join(names)}")
    reference = reference or first_reference(runs)
    parts: list[Part] = []
    arms: dict[str, Arm] = {}
    for cell in cells_of(runs, reference):
        found = collect_arms(cell.runs)
        present = reference if reference in found else None
        order = sorted(found, key=lambda name: (name != present, found[name].is_control))
        comparison = None
        if present and len(found) > 1:
            comparison = compare(list(cell.runs), reference, common_margin(cell.runs) if margin is None else margin)
        ids = Part(cell, (), None, None)
        parts.append(Part(cell, tuple(map(ids.id, order)), present and ids.id(present), comparison))
        arms |= {ids.id(name): found[name] for name in order}
    return ReportData(runs, tuple(parts), arms)


def planned_episodes(run: RunResults) -> int | None:
    """Episodes of each arm that the run's experiment asks for; None where its configuration is missing."""
    return None if run.planned is None else len(run.planned)


def _parts_at(steps: dict[str, int | None], key: EpisodeKey) -> int | str:
    step = steps.get(str(key), "unknown")
    return "never" if step is None else step


def flipped_videos(m: ReportData) -> list[Video]:
    """Flipped episodes with a video, broken before repaired, one arm after the other so that each gets its share."""
    queues = []
    for id_, result in m.compared.items():
        arm, base = m.arms[id_], m.reference_of(id_)
        found = []
        for key in sorted(arm.records.keys() & base.records.keys()):
            left, right = base.records[key], arm.records[key]
            if {left.outcome, right.outcome} != {"success", "failure"}:
                continue
            films = video_path(base.run_dirs[key], left), video_path(arm.run_dirs[key], right)
            if all(film.exists() for film in films):
                d = result.divergence
                steps = (_parts_at(of, key) for of in (d.steps, d.visible_steps, d.gripper_steps))
                found.append(Video(key, id_, *films, left.outcome, right.outcome, *steps))
        queues.append(sorted(found, key=lambda v: v.arm_outcome == "success"))
    return [queue[i] for i in range(max(map(len, queues), default=0)) for queue in queues if i < len(queue)]
