"""Tasks of one's own in LIBERO's simulator: BDDL files of a directory, looked through before anything is started."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qlibero.errors import UserError
from qlibero.registry import FolderSuite
from qlibero.sim import bddl
from qlibero.sim.libero_pro import language_in


@dataclass(frozen=True)
class OwnTasks:
    """What `sim/suites.py` asks of a suite that is a plug-in."""

    suite: FolderSuite

    def language(self, task: int) -> str:
        goal = Path(self.suite.goals[task])
        return language_in(goal) if self.suite.instructions == "bddl" else " ".join(goal.stem.lower().split("_"))

    def task_files(self, task: int) -> dict[str, Path]:
        states = {"states": Path(self.suite.states[task])} if self.suite.states else {}
        return {"goal": Path(self.suite.goals[task]), **states}


def lint(suites: Iterable[FolderSuite]) -> None:
    """Raise UserError with all that is wrong with these suites' files, line by line."""
    if goals := [Path(goal) for suite in suites for goal in suite.goals]:
        found = bddl.lint_all(goals, bddl.installed())
        if complaints := [complaint for of in found.values() for complaint in of]:
            raise UserError("\n".join(complaints))
