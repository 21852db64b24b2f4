"""The five LIBERO suites, LIBERO-PRO's, LIBERO-plus's, and the constants of their published evaluation protocol.

The constants are those of openpi's `examples/libero/main.py` (step caps from the longest demonstration of each suite,
ten settle steps that do not count against the cap). Importing this module is cheap: LIBERO itself is touched only by
`task_language` and `init_states`; what `libero*.py` declare is read, not run. A suite that is a plug-in provides an
object with `language(task)` and `task_files(task)`: {"goal": BDDL file, "states": .npz of initial states}, and where
files do not say everything, `perturbation(task)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qlibero.errors import UserError
from qlibero.registry import SuitePlugin, built_in, get
from qlibero.sim import libero_plus
from qlibero.sim.libero_pro import AXES, SCENES_OF_BASE, language_in, line_of_language
from qlibero.sim.perturbation import UNPERTURBED, Perturbation

SETTLE_STEPS = 10
"""Steps of `SETTLE_ACTION` before the policy sees its first frame: objects fall to rest. Not counted in the cap."""

SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""No motion, gripper open (-1 opens, +1 closes)."""

CONTROL_HZ = 20
ACTION_DIM = 7
STATE_DIM = 8
PROTOCOLS = ("pure", "openpi")


@dataclass(frozen=True)
class Suite:
    """`tasks` tasks with `inits` official initial states each; an episode is cut after `max_steps` policy steps."""

    name: str
    tasks: int
    inits: int
    max_steps: int
    base: str = ""
    """Of LIBERO-PRO: the suite of which it is a perturbation; task k perturbs its task k."""
    axis: str = ""
    """What was changed, see `libero_pro` and `libero_plus`."""
    variants_of: str = ""
    """Of LIBERO-plus: the suite of whose tasks its tasks are variants, many of each."""

    @property
    def instructions(self) -> str:
        """Where its tasks' words come from: the `name` of the task's file, or the `bddl` file itself."""
        return "bddl" if self.axis == "language" else AXES.get(self.axis, "name")

    @property
    def has_scenes_of_base(self) -> bool:
        """Whether its tasks can start from the base suite's initial states (`inits: base`)."""
        return self.axis in SCENES_OF_BASE


def _as_declared(name: str) -> Suite:
    """A built-in suite; those of LIBERO-PRO are called BASE_AXIS."""
    if parts := libero_plus.split(name):
        plugin = get(SuitePlugin, name)
        return Suite(name, plugin.tasks, plugin.inits, plugin.max_steps, axis=parts[1], variants_of=parts[0])
    plugin, (base, _, axis) = get(SuitePlugin, name), name.rpartition("_")
    perturbed = (base, axis) if axis in AXES and base in built_in(SuitePlugin) else ()
    return Suite(name, plugin.tasks, plugin.inits, plugin.max_steps, *perturbed)


SUITES = {name: _as_declared(name) for name in built_in(SuitePlugin)}
BASE_SUITES = tuple(suite for suite in SUITES.values() if not suite.axis)


def get_suite(name: str) -> Suite:
    """The suite of that name, LIBERO's own or a plug-in's; `UserError` with the nearest name otherwise."""
    if name in SUITES:
        return SUITES[name]
    plugin = get(SuitePlugin, name)
    return Suite(name, plugin.tasks, plugin.inits, plugin.max_steps)


def check_task(suite: str, task: int) -> None:
    """`UserError` unless `suite` exists and has a task of that index."""
    tasks = get_suite(suite).tasks
    if not 0 <= task < tasks:
        raise UserError(f"{suite} has tasks 0 to {tasks - 1}, not {task}")


def task_language(suite: str, task: int) -> str:
    """What a policy is told, e.g. "pick up the milk and …": by the task's name, as LIBERO's benchmark gives it
    (`task.language`), or by its file where the suite's `instructions` stand there."""
    check_task(suite, task)
    from qlibero.sim import libero

    return str(libero.tasks_of(suite).language(task))


def perturbation(suite: str, task: int) -> Perturbation:
    """What a task changes that its files do not say."""
    check_task(suite, task)
    from qlibero.sim import libero

    said = getattr(libero.tasks_of(suite), "perturbation", None)
    return said(task) if said else UNPERTURBED


def words_at(suite: str, task: int) -> str:
    """FILE:LINE of a task's words where they stand in its file, FILE where they are its name."""
    from qlibero.sim import libero

    goal = libero.task_files(suite, task)["goal"]
    if task_language(suite, task) != language_in(goal):
        return str(goal)
    return f"{goal}:{line_of_language(goal)}"


def flaws(suite: str, task: int) -> list[str]:
    """What of a task's words contradicts its own file; [] for none."""
    from qlibero.sim import contradictions, libero

    known = libero_plus.VariantSuite(suite).flaw(task) if libero_plus.split(suite) else ""
    found = contradictions.contradictions(libero.task_files(suite, task)["goal"], task_language(suite, task))
    return [known, *found] if known else found


def init_states(suite: str, task: int) -> np.ndarray:
    """The official initial states, (50, n) float64: time, qpos, qvel. n differs between scenes. LIBERO-plus: (1, n)."""
    check_task(suite, task)
    from qlibero.sim import libero

    return libero.load_init_states(suite, task)
