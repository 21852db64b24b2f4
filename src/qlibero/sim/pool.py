"""Simulators in processes of their own: the policy survives any of their crashes, and none survives the launcher's.

Each worker is a fresh interpreter (no fork, no import of the caller's `__main__`) with its own environment. Control
goes over a socket pair; frames through anonymous shared memory (memfd: no name, so nothing can leak, whoever is
killed). A worker that dies, raises or hangs is reported as `Died` and replaced. Hung is who stays silent for
`timeout_s` without using the CPU (stopped, deadlocked) or who has used that much CPU time without answering (spinning);
on an overloaded host a healthy worker may be slow, and killing it would only add to the load.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any

import numpy as np

from qlibero.cache import numba_cache
from qlibero.episode_key import EpisodeKey
from qlibero.errors import GuardRefusal, UserError, WorkFailed
from qlibero.frames import FrameFormat
from qlibero.sim.scene import SimObservation
from qlibero.sim.worker import frame_bytes, frame_views, room


@dataclass(frozen=True)
class Assignment:
    """One episode to run: `max_steps` policy steps at most; what is seen goes into `video` when it is a path.

    Observations show frames in `frame_format`, prepared by the simulator; None, or one for which its memory has no
    room: as the cameras give them.
    """

    key: EpisodeKey
    protocol: str
    max_steps: int
    video: Path | None = None
    frame_format: FrameFormat | None = None


@dataclass(frozen=True)
class Observed:
    """The worker waits for `act`. Times are totals of the episode so far, in ms (reset and settling included)."""

    worker: int
    observation: SimObservation
    prompt: str
    step: int
    sim_ms: float
    render_ms: float


@dataclass(frozen=True)
class Finished:
    """The episode is over. `trajectory` is (steps, 10) float32: the 7 actions, then the gripper's position (3)."""

    worker: int
    success: bool
    steps: int
    fingerprint: str
    trajectory: np.ndarray
    sim_ms: float
    render_ms: float


@dataclass(frozen=True)
class Died:
    """The worker of that number is gone with its episode; a new one already stands in its place."""

    worker: int
    reason: str


Event = Observed | Finished | Died


def worker_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a simulator process, for starting one and for `environment.json`.

    robosuite takes CUDA_VISIBLE_DEVICES for EGL indices and fails on UUIDs, so it is removed (MUJOCO_EGL_DEVICE_ID
    chooses the device instead); the policy's LD_LIBRARY_PATH is none of its business. llvmpipe renders in the calling
    thread (LP_NUM_THREADS=0): workers are as many as cores. What the user set for rendering is kept.
    """
    numba_cache()
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")}
    environment.setdefault("MUJOCO_GL", "egl")
    if environment["MUJOCO_GL"] in ("egl", "osmesa"):
        environment["PYOPENGL_PLATFORM"] = environment["MUJOCO_GL"]
    environment.setdefault("LP_NUM_THREADS", "0")
    for name in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
        environment[f"{name}_NUM_THREADS"] = "1"
    environment["PYTHONUNBUFFERED"] = "1"
    environment.update(extra or {})
    return environment


class _Process:
    """The pool's side of one worker."""

    def __init__(self, resolution: int, environment: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        memory_fd = os.memfd_create("qlibero-frames")
        os.ftruncate(memory_fd, frame_bytes(resolution))
        # what it prints is kept to explain a death; unlinked at once
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "qlibero.sim.worker",
                str(os.getpid()),
                str(theirs.fileno()),
                str(memory_fd),
                str(resolution),
            ],
            env=environment,
            pass_fds=(theirs.fileno(), memory_fd),
            stdin=subprocess.DEVNULL,
            stdout=self.errors,
            stderr=self.errors,
        )
        theirs.close()
        self.memory = mmap.mmap(memory_fd, frame_bytes(resolution))
        os.close(memory_fd)
        self.views = frame_views(self.memory, resolution)  # as the running episode's frames lie there
        self.connection = Connection(ours.detach())
        self.deadline: float | None = None  # when silence becomes suspicious; None while nothing is asked of it
        self.patience_s = self.cpu_seen_s = 0.0
        self.cpu_asked_s = 0.0  # CPU time at its last answer, since when it has only waited
        self.in_episode = False

    def ask(self, message: tuple[Any, ...], patience_s: float) -> None:
        self.patience_s, self.deadline = patience_s, time.monotonic() + patience_s
        self.cpu_seen_s = self.cpu_asked_s
        try:
            self.connection.send(message)
        except OSError:
            pass  # it is dead: `wait` finds the closed socket and says so

    def cpu_s(self) -> float:
        """CPU time it has used so far, in seconds."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def hung(self) -> bool:
        """At its deadline: has it stopped working, or worked too long? Otherwise it gets as much time again."""
        now_s = self.cpu_s()
        spinning = now_s - self.cpu_asked_s > self.patience_s
        idle = now_s - self.cpu_seen_s < 0.01 * self.patience_s
        self.cpu_seen_s, self.deadline = now_s, time.monotonic() + self.patience_s
        return spinning or idle

    def kill(self) -> None:
        self.process.kill()  # SIGKILL also ends a stopped process
        self.process.wait()
        self.connection.close()
        self.errors.close()

    def last_words(self) -> str:
        """The last line it printed that says something, at most 300 characters."""
        size = self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, size - 8192))
        lines = [line.strip() for line in self.errors.read().decode(errors="replace").splitlines()]
        said = [line for line in lines if line and not line.startswith(("Exception ignored", "OpenGL.raw"))]
        fatal = [line for line in said if line.startswith("Fatal Python error")]
        return (fatal or said or [""])[-1][:300]


class SimulatorPool:
    """`workers` simulator processes. Not thread-safe; make it, and call `wait`, from a thread that outlives it (a
    worker is killed by the kernel when the thread that started it ends).

    `timeout_s` is the patience with a `start` or an `act`, plus a second for every action of the latter.
    """

    def __init__(
        self,
        workers: int,
        *,
        resolution: int = 256,
        timeout_s: float = 120.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.workers, self.resolution, self.timeout_s = workers, resolution, timeout_s
        self.environment = worker_environment(environment)
        self._processes = [_Process(resolution, self.environment) for _ in range(workers)]

    def __enter__(self) -> SimulatorPool:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def pids(self) -> list[int]:
        """Process ids of the workers, by number."""
        return [worker.process.pid for worker in self._processes]

    def peak_gb(self) -> float:
        """The most memory that one of the workers has had so far."""
        kilobytes = [0]
        for pid in self.pids():
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                kilobytes += [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
        return max(kilobytes) * 1024 / 1e9

    def prepare(self, worker: int, suite: str, task: int, protocol: str) -> None:
        """Let a worker that runs nothing build a task's scene before anybody asks for an episode of it."""
        with suppress(OSError):  # it is dead: `wait` finds the closed socket
            self._processes[worker].connection.send(("prepare", suite, task, protocol))

    def start(self, worker: int, assignment: Assignment) -> None:
        """Begin an episode on a worker that runs none (one that does drops it)."""
        process, wanted = self._processes[worker], assignment.frame_format
        if wanted is not None and wanted.nbytes > room(self.resolution):
            assignment = replace(assignment, frame_format=None)
        process.in_episode = True
        process.views = frame_views(process.memory, self.resolution, assignment.frame_format)
        process.ask(("start", assignment), self.timeout_s)

    def act(self, worker: int, actions: np.ndarray) -> None:
        """Execute (n, 7) float32 actions one after another, until success, the cap, or the last of them."""
        actions = np.asarray(actions, dtype=np.float32)
        self._processes[worker].ask(("act", actions), self.timeout_s + len(actions))

    def wait(self, timeout_s: float) -> list[Event]:
        """What happened, in worker order: at least one event unless `timeout_s` passes first.

        Raises `WorkFailed`, `UserError` or `GuardRefusal` when a worker says that trying again is pointless (no GL
        library, no ffmpeg, no such task).
        """
        until = time.monotonic() + timeout_s
        while True:
            deadlines = [w.deadline for w in self._processes if w.deadline is not None]
            now = time.monotonic()
            ready = wait_for_any(
                [worker.connection for worker in self._processes],
                max(0.0, min([until, *deadlines]) - now),
            )
            events: list[Event] = []
            for index, worker in enumerate(self._processes):
                if worker.connection in ready:
                    if (event := self._receive(index)) is not None:
                        events.append(event)
                elif worker.deadline is not None and time.monotonic() > worker.deadline and worker.hung():
                    events.append(self._replace(index, f"no answer within {self.timeout_s:g} s (hung or stopped)"))
            if events or time.monotonic() >= until:
                return events

    def close(self) -> None:
        """End every worker: asked first, killed after 5 s; at once where nothing was ever heard of it."""
        for worker in self._processes:
            if not worker.cpu_asked_s:
                worker.process.kill()
            with suppress(OSError):
                worker.connection.send(("quit",))
        until = time.monotonic() + 5.0
        for worker in self._processes:
            try:
                worker.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            worker.kill()
        self._processes = []

    def _receive(self, index: int) -> Event | None:
        worker = self._processes[index]
        try:
            kind, worker.cpu_asked_s, *rest = worker.connection.recv()
        except (EOFError, OSError):
            died = self._replace(index, None)
            return died if worker.in_episode else None  # an idle worker's death costs nobody an episode
        worker.deadline = None
        if kind == "observed":
            step, sim_ms, render_ms, prompt = rest
            seen = SimObservation(*(view.copy() for view in worker.views))
            return Observed(index, seen, prompt, step, sim_ms, render_ms)
        if kind == "finished":
            worker.in_episode = False
            return Finished(index, *rest)
        status, message = rest
        raise {2: UserError, 3: GuardRefusal}.get(status, WorkFailed)(message)

    def _replace(self, index: int, reason: str | None) -> Died:
        worker = self._processes[index]
        if reason is None:
            try:  # its socket is closed, so it is ending; give it a moment to leave its status
                status = worker.process.wait(2.0)
            except subprocess.TimeoutExpired:
                status = None
            reason = _describe(status)
            if said := worker.last_words():
                reason += f": {said}"
        worker.kill()
        self._processes[index] = _Process(self.resolution, self.environment)
        return Died(index, reason)


def _describe(status: int | None) -> str:
    if status is None:
        return "closed its connection"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
