"""Text logs of OpenVLA, OpenVLA-OFT and openpi's LIBERO example (read in their sources, 2026-11).

    Task suite: libero_goal
    Task: open the middle drawer of the cabinet
    Starting episode 1...
    Success: True

Their own log file has these lines bare; what they print has a logger's prefix (`INFO:root:`, `2026-… [INFO] `).
Episode N of a task starts from initial state N - 1, unless OFT was given states of its own ("Using initial states
from"), whose failed demonstrations it skips without counting. An exception ends an episode as `Success: False`; the
line before it says so ("Episode error:", "Caught exception:"), and it is an error here.
"""

from __future__ import annotations

import re

from qlibero.results.importers.file import ResultFile, outcome
from qlibero.results.imports import ExternalArm, Key
from qlibero.results.records import Outcome

_PREFIX = r"(?:[A-Z]+:[\w.]*:|\S+ \S+ \[[A-Z]+\] )?"
_LINE = re.compile(
    rf"^{_PREFIX}(Task suite|Task|Starting episode|Success|Episode error|Caught exception|Using initial states from)"
    r":? *(.*?)(?:\.\.\.)? *\r?$",
    re.MULTILINE,
)


def read(file: ResultFile) -> ExternalArm | None:
    if file.path.suffix in (".csv", ".json", ".jsonl"):
        return None
    found = _LINE.findall(file.text)
    suites = [value for key, value in found if key == "Task suite"]
    if not suites:
        return None
    if len(set(suites)) > 1:
        raise ValueError(f"one log of several runs ({', '.join(dict.fromkeys(suites))}): give each its own file")
    suite, own_states = suites[0], any(key == "Using initial states from" for key, _ in found)
    episodes: list[tuple[Key | None, Outcome]] = []
    cells, task, init, broken = [], "", None, False
    for key, value in found:
        if key == "Task":
            task = value
        elif key == "Starting episode":
            init, broken = int(value) - 1, False
        elif key in ("Episode error", "Caught exception"):
            broken = True
        elif key == "Success" and init is not None:
            where = f"Success of episode {init + 1} of {task!r}"
            # openpi prints the last `done`, which an exception leaves undefined
            ended: Outcome = "error" if broken else outcome(value, where)
            episodes.append((None if own_states else (suite, task, init, None), ended))
            cells.append((suite, task))
            init = None
    reason = "the log's initial states are not LIBERO's own, and it does not number them" if own_states else ""
    return ExternalArm(file.name, "OpenVLA", tuple(episodes), reason, cells=tuple(cells) if own_states else ())
