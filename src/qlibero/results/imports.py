"""Results of other tools as far as they go: outcomes under the best key that a file has.

`importers/` reads the files, `external_results.py` compares them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qlibero.episode_key import OFFICIAL
from qlibero.results.pairing import Arm
from qlibero.results.records import Outcome

_SCENE = re.compile(r"^(?:kitchen|living room|study) scene\d+ ")
Cell = tuple[str, str]  # suite, task (index or its text)
Key = tuple[str, str, int, int | None]  # suite, task (index or its text), initial state, seed where the file says it


@dataclass(frozen=True)
class ExternalArm:
    """`episodes`: (key or None, outcome). Without keys the arm can only be compared unpaired; `reason` says
    why. `arm` is the thing itself when it is one of qlibero's, with fingerprints.
    """

    name: str
    tool: str
    episodes: tuple[tuple[Key | None, Outcome], ...]
    reason: str = ""
    arm: Arm | None = None
    cells: tuple[Cell, ...] = ()
    """Suite and task of each episode where the file says these without an initial state; () where it says none."""
    names: Mapping[Cell, str] = field(default_factory=dict)
    """The instruction of a numbered task, where the file says both, as `task_text` spells it."""
    suites: frozenset[str] = frozenset()
    """Which suites it ran, where the file says that but not of which episode."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """What the file says of its protocol, under the names of `protocols/`."""

    @property
    def places(self) -> list[Cell | None]:
        """Suite and task of every episode."""
        if self.cells:
            return list(self.cells)
        return [key and key[:2] for key, _ in self.episodes]

    def only(self, wanted: set[Cell]) -> ExternalArm:
        """The episodes of these suites and tasks."""
        kept = [i for i, place in enumerate(self.places) if place in wanted]
        cells = tuple(self.cells[i] for i in kept) if self.cells else ()
        return replace(self, episodes=tuple(self.episodes[i] for i in kept), cells=cells)

    def numbered(self, numbers: Mapping[Cell, str]) -> ExternalArm:
        """With the tasks that it calls by their instruction under the number they have in `numbers`."""

        def task_of(suite: str, task: str) -> str:
            return task if task.isdigit() else numbers.get((suite, task_text(task)), task)

        episodes = ((key and (key[0], task_of(*key[:2]), *key[2:]), outcome) for key, outcome in self.episodes)
        cells = ((suite, task_of(suite, task)) for suite, task in self.cells)
        return replace(self, episodes=tuple(episodes), cells=tuple(cells))

    @property
    def has_seeds(self) -> bool:
        return all(key is not None and key[3] is not None for key, _ in self.episodes)

    def keyed(self, with_seed: bool = False) -> dict[tuple[str | int | None, ...], Outcome] | None:
        """Outcomes by key, without its seed unless asked for; None if any episode has no key or shares one."""
        found: dict[tuple[str | int | None, ...], Outcome] = {}
        for key, outcome in self.episodes:
            if key is None:
                return None
            found[key if with_seed else key[:3]] = outcome
        return found if len(found) == len(self.episodes) else None

    @property
    def counts(self) -> tuple[int, int, int]:
        outcomes = [outcome for _, outcome in self.episodes]
        return outcomes.count("success"), len(outcomes) - outcomes.count("error"), outcomes.count("error")


def task_numbers(arms: Iterable[ExternalArm]) -> dict[Cell, str]:
    """{(suite, instruction): number} from the results that say both; an instruction of two tasks has no number."""
    found: dict[Cell, set[str]] = {}
    for arm in arms:
        for (suite, number), text in arm.names.items():
            if number.isdigit():
                found.setdefault((suite, text), set()).add(number)
    return {cell: numbers.pop() for cell, numbers in found.items() if len(numbers) == 1}


def task_text(text: str) -> str:
    """A task's instruction in one spelling: names of files have underscores for spaces, and LIBERO-100's the scene."""
    return _SCENE.sub("", " ".join(text.lower().replace("_", " ").split()))


def from_run(arm: Arm, run: str, instructions: Mapping[str, Mapping[str, str]]) -> ExternalArm:
    """An arm of qlibero as one among the others. `instructions` are the run's, by suite and task."""
    # other tools know official initial states only: a fresh one has no number that could be taken for one of theirs
    episodes = tuple(
        ((key.suite, str(key.task), key.init if key.inits == OFFICIAL else -1 - key.init, key.seed), record.outcome)
        for key, record in sorted(arm.records.items())
    )
    names = {(suite, task): task_text(text) for suite, tasks in instructions.items() for task, text in tasks.items()}
    return ExternalArm(f"{run}/{arm.name}", "qlibero", episodes, arm=arm, names=names)
