"""The environments of the two kinds of process.

The policy process needs CUDA's libraries and compiler; a simulator needs its own EGL device and must not see
CUDA_VISIBLE_DEVICES, which robosuite takes for an EGL index (`sim.pool` removes it). So each gets its own environment,
and neither is exported to the user's shell. LD_LIBRARY_PATH only counts when a process starts:
`enter_policy_environment` starts it again, once.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from itertools import takewhile

from qlibero.machine.cuda_toolkit import Agreement, Toolkit, check_agreement, find_toolkit, site_packages, torch_cuda

log = logging.getLogger(__name__)

ENTERED = "QLIBERO_POLICY_ENVIRONMENT"  # set in the re-started process; holds the LD_LIBRARY_PATH from before


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


@cache
def find_gpus() -> list[dict[str, str]]:
    """NVIDIA GPUs as nvidia-smi lists them: index, uuid, name, driver, memory_mib, compute_capability; or []."""
    fields = ("index", "uuid", "name", "driver_version", "memory.total", "compute_cap")
    text = command_output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    keys = ("index", "uuid", "name", "driver", "memory_mib", "compute_capability")
    rows = [[part.strip() for part in line.split(",")] for line in (text or "").splitlines()]
    return [dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys)]


def usable_gpus(environ: Mapping[str, str] | None = None, gpus: list[dict[str, str]] | None = None) -> list[str]:
    """What CUDA_VISIBLE_DEVICES must say for each GPU alone that this process may use: all, or those that it names."""
    environ = os.environ if environ is None else environ
    gpus = find_gpus() if gpus is None else gpus
    if (named := environ.get("CUDA_VISIBLE_DEVICES")) is None or not gpus:
        return [gpu["index"] for gpu in gpus]
    return list(takewhile(lambda name: name not in ("", "-1"), map(str.strip, named.split(","))))  # as CUDA reads it


def command_output(*command: str) -> str | None:
    """What a command printed; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
