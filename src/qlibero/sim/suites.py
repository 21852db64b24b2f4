"""The five LIBERO suites and the constants of their published evaluation protocol.

The constants are those of openpi's `examples/libero/main.py` (step caps from the longest demonstration of each suite,
ten settle steps that do not count against the cap). Importing this module is cheap: LIBERO itself is touched only by
`task_language` and `init_states`. A suite that is a plug-in
provides an object with `language(task)` and `task_files(task)`: {"goal": BDDL file, "states": .npz of initial states}.
"""

from __future__ import annotations

import numpy as np

from qlibero.errors import UserError
from qlibero.registry import SuitePlugin, built_in, get

SETTLE_STEPS = 10
"""Steps of `SETTLE_ACTION` before the policy sees its first frame: objects fall to rest. Not counted in the cap."""

SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""No motion, gripper open (-1 opens, +1 closes)."""

CONTROL_HZ = 20
ACTION_DIM = 7
STATE_DIM = 8
PROTOCOLS = ("pure", "openpi")


SUITES = {name: get(SuitePlugin, name) for name in built_in(SuitePlugin)}
"""LIBERO's own, in the order of its paper."""


def get_suite(name: str) -> SuitePlugin:
    """The suite of that name, LIBERO's own or a plug-in's; `UserError` with the nearest name otherwise."""
    return get(SuitePlugin, name)


def check_task(suite: str, task: int) -> None:
    """`UserError` unless `suite` exists and has a task of that index."""
    tasks = get_suite(suite).tasks
    if not 0 <= task < tasks:
        raise UserError(f"{suite} has tasks 0 to {tasks - 1}, not {task}")


def task_language(suite: str, task: int) -> str:
    """The instruction as LIBERO's benchmark gives it to policies (`task.language`), e.g. "pick up the milk and …"."""
    check_task(suite, task)
    return str(get_suite(suite).load().language(task))


def init_states(suite: str, task: int) -> np.ndarray:
    """The official initial states, (50, n) float64: time, qpos, qvel. n differs between scenes."""
    check_task(suite, task)
    from qlibero.sim import libero

    return libero.load_init_states(suite, task)
