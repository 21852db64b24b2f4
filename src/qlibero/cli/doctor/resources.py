"""Are there cores, memory, disk and a network for what a run needs?"""

from __future__ import annotations

import mmap
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from qlibero.cli.doctor.finding import Finding
from qlibero.console import count_text
from qlibero.machine.capacity import WORKER_GB, Capacity, capacity, fitting
from qlibero.places import RUNS

RUN_GB = 2.0  # a run directory with videos, generously
FRAME_BYTES = 2 * 256 * 256 * 3


def cpus(here: Capacity | None = None, shown: int | None = None) -> Finding:
    """Cores this process may use, against those the system shows it (`shown`), which nproc would name."""
    here = here or capacity()
    shown = len(os.sched_getaffinity(0)) if shown is None else shown
    if here.cores < shown:
        return Finding(
            "cores",
            "warn",
            f"{here.cores} of the {shown} that are shown ({here.why}); runs start "
            f"{count_text(here.cores, 'simulator')}",
            "ask for more cores (--cpus-per-task, docker run --cpus), if they were meant to be yours",
        )
    return Finding("cores", "ok", f"{here.cores}")


def memory(here: Capacity | None = None) -> Finding:
    """Room for one simulator per core."""
    here = here or capacity()
    said = f"{here.free_gb:.1f} of {here.memory_gb:.1f} GB are free"
    if here.memory_gb < WORKER_GB:
        return Finding(
            "memory",
            "fail",
            f"{said}, a simulator needs {WORKER_GB:g} GB ({here.why})",
            "ask for more (--mem, docker run --memory)",
        )
    if here.free_gb < WORKER_GB:
        return Finding(
            "memory",
            "warn",
            f"{said} now, a simulator needs {WORKER_GB:g} GB",
            "end other programs: ps aux --sort=-rss | head",
        )
    workers = fitting(here.cores, here.free_gb)
    if workers < here.cores:
        return Finding(
            "memory",
            "warn",
            f"{said}: {count_text(workers, 'simulator')}, not one for each of {here.cores} cores ({here.why})",
            "nothing needs doing: runs start as many as fit; faster with more (--mem, docker run --memory)",
        )
    return Finding(
        "memory",
        "ok",
        f"{said}, {count_text(here.cores, 'simulator')} need{'s' * (here.cores == 1)} {here.cores * WORKER_GB:g} GB",
    )


def shared_memory(frame_bytes: int = FRAME_BYTES) -> list[Finding]:
    """Frames travel through anonymous shared memory; torch's own helpers use /dev/shm."""
    descriptor = os.memfd_create("qlibero-doctor")
    try:
        os.ftruncate(descriptor, frame_bytes)
        with mmap.mmap(descriptor, frame_bytes) as memory:
            memory[:] = b"\1" * frame_bytes
    except OSError as error:
        return [
            Finding(
                "shared memory",
                "fail",
                f"a frame of {frame_bytes} bytes cannot be shared: {error}",
                "ulimit -v unlimited, or ask for more memory (--mem, docker run --memory)",
            )
        ]
    finally:
        os.close(descriptor)
    size = shutil.disk_usage("/dev/shm").total / 1e6 if os.path.isdir("/dev/shm") else 0.0
    if size < 64:
        return [Finding("shared memory", "warn", f"frames fit; /dev/shm has {size:.0f} MB", "docker run --shm-size=1g")]
    return [Finding("shared memory", "ok", f"frames fit (they need no /dev/shm); /dev/shm has {size:,.0f} MB")]


def disk(directory: Path = RUNS) -> Finding:
    """Free space where runs are kept, and that a line can be written and synced."""
    while not directory.exists():
        directory = directory.parent
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding(
            "disk", "fail", f"{directory} cannot be written: {error.strerror}", "--out DIR on a disk that can"
        )
    free = shutil.disk_usage(directory).free / 1e9
    if free < RUN_GB:
        return Finding("disk", "warn", f"{free:.1f} GB free in {directory}", "make room, or --out DIR on another disk")
    return Finding("disk", "ok", f"{free:,.0f} GB free in {directory}")


def wandb(environ: Mapping[str, str] | None = None, timeout_s: float = 3.0) -> Finding:
    """Whether `tracking.mode: online` could work. Offline, the default, needs nothing."""
    environ = os.environ if environ is None else environ
    offline = "runs are tracked offline (the default needs no network)"
    base = environ.get("WANDB_BASE_URL")
    if not base:
        from wandb import Settings

        base = Settings().base_url
    parts = urlsplit(str(base))
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=timeout_s).close()
    except OSError as error:
        return Finding(
            "wandb",
            "ok",
            f"{parts.hostname}:{port} cannot be reached ({error}); {offline}",
            "for online tracking: export WANDB_BASE_URL=https://…, or HTTPS_PROXY=…",
        )
    return Finding(
        "wandb",
        "ok",
        f"{parts.hostname}:{port} answers; {offline}",
        "" if environ.get("WANDB_API_KEY") else "for online tracking: wandb login",
    )
