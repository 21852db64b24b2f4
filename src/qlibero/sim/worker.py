"""A simulator process: runs one episode at a time for the pool that started it, and dies with it.

Started by `qlibero.sim.pool` as `python -m qlibero.sim.worker` in its own environment (a fresh interpreter: nothing of
the launcher's CUDA, threads or random state is inherited). Speaks over one socket; frames go through shared memory:
the observation lies there when the message that announces it arrives, and stays untouched until the next `act`.

Messages in:  ("prepare", suite, task, protocol), ("start", Assignment), ("act", (n, 7) float32 actions; one that is not
finite ends the episode), ("quit",)
Messages out: (kind, CPU seconds of this process so far, …), of kinds ("observed", …, step, sim_ms, render_ms, prompt),
("finished", …) and ("refused", …, status, message)
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from qlibero.errors import QliberoError, WorkFailed
from qlibero.frames import FrameFormat
from qlibero.sim import suites

_PR_SET_PDEATHSIG = 1
ROW = 10  # of a trajectory: action 7, end effector position 3


def frame_bytes(resolution: int) -> int:
    """Size of a worker's shared memory: room for two frames, then the (8,) float32 state."""
    return 2 * room(resolution) + suites.STATE_DIM * 4


def room(resolution: int) -> int:
    """Bytes for a frame, in whatever form: an (R, R, 3) one of float32 fits. Memory that is not written costs none."""
    return resolution * resolution * 3 * 4


def frame_views(
    memory: mmap.mmap, resolution: int, prepared: FrameFormat | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The shared memory as image, wrist image, state (8,) float32; no copies. Images are (R, R, 3) uint8, or `prepared`
    where there is `room` for it."""
    size, dtype = (prepared.size, prepared.dtype) if prepared else (resolution, np.dtype(np.uint8))
    image, wrist_image = (
        np.frombuffer(memory, dtype, size * size * 3, offset=at).reshape(size, size, 3) for at in (0, room(resolution))
    )
    return image, wrist_image, np.frombuffer(memory, np.float32, suites.STATE_DIM, offset=2 * room(resolution))


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL when the process that started us ends, whatever ends it; exit if it already has."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


class Worker:
    """Serves episodes until told to quit. Keeps the `Scene` of its last task, since building one costs seconds."""

    def __init__(self, connection: Connection, memory: mmap.mmap, resolution: int) -> None:
        self.connection, self.memory, self.resolution = connection, memory, resolution
        self.scene: Any = None
        self.video: Any = None

    def serve(self) -> None:
        """Handle messages until ("quit",) or the pool's end of the socket closes."""
        while True:
            try:
                message = self.connection.recv()
            except (EOFError, ConnectionResetError):
                break
            if message[0] == "quit":
                break
            try:
                if message[0] == "prepare":
                    self._build(*message[1:])
                elif message[0] == "start":
                    self._start(message[1])
                else:
                    self._act(message[1])
            except QliberoError as error:  # the request or the machine is at fault: trying again would not help
                self._drop_video()
                self._tell("refused", error.exit_status, str(error))
        self._drop_video()
        if self.scene is not None:
            self.scene.close()

    def _build(self, suite: str, task: int, protocol: str) -> None:
        from qlibero.sim.scene import Scene

        if self.scene is None or (self.scene.suite, self.scene.task, self.scene.protocol) != (suite, task, protocol):
            if self.scene is not None:
                self.scene.close()
                self.scene = None
            self.scene = Scene(suite, task, resolution=self.resolution, protocol=protocol)

    def _start(self, assignment: Any) -> None:
        from qlibero.sim.video import VideoWriter

        key, self.assignment = assignment.key, assignment
        self._drop_video()
        self._build(key.suite, key.task, assignment.protocol)
        started = time.perf_counter()  # a task's scene is built once for many episodes: no episode's own time
        self.scene.render_s = 0.0
        self.scene.reset(key.init, key.seed, key.inits)
        self.steps = 0
        self.trajectory: list[np.ndarray] = []
        self.busy_s = time.perf_counter() - started
        if assignment.video is not None:
            with suppress(WorkFailed, OSError):
                self.video = VideoWriter(assignment.video, self.resolution)
        self._observed()

    def _act(self, actions: np.ndarray) -> None:
        scene, limit = self.scene, self.assignment.max_steps
        actions = np.asarray(actions, dtype=np.float32)
        if actions.ndim != 2 or actions.shape[1] != suites.ACTION_DIM or not len(actions):
            raise ValueError(f"actions of shape {actions.shape}; expected (n, {suites.ACTION_DIM}), n > 0")
        finite = np.isfinite(actions).all(1)
        lost = not finite.all()  # the policy has failed: what comes before that action is executed, nothing after it
        actions = actions[: int(np.argmin(finite))] if lost else actions
        started, last = time.perf_counter(), min(len(actions), limit - self.steps) - 1
        success = False
        for index in range(last + 1):
            needed = not lost and index == last and self.steps + 1 < limit
            success = scene.step(actions[index], observe=needed)
            self.steps += 1
            position = scene.eef_position().astype(np.float32)
            self.trajectory.append(np.concatenate((actions[index], position)))
            if success:
                break
        self.busy_s += time.perf_counter() - started
        if not success and not lost and self.steps < limit:
            self._observed()
            return
        rows = np.array(self.trajectory, np.float32).reshape(-1, ROW)
        sim_ms, render_ms = self._times()  # the last frame is for the video only, so in nobody's times
        if self.video is not None:
            self._record(scene.look())
            self._record()
        self._tell("finished", success, self.steps, scene.fingerprint(), rows, sim_ms, render_ms)

    def _observed(self) -> None:
        seen, started, prepared = self.scene.observation, time.perf_counter(), self.assignment.frame_format
        image, wrist_image, state = frame_views(self.memory, self.resolution, prepared)
        image[...] = prepared.of(seen.image) if prepared else seen.image
        wrist_image[...] = prepared.of(seen.wrist_image) if prepared else seen.wrist_image
        state[...] = seen.state
        took = time.perf_counter() - started
        self.scene.render_s += took
        self.busy_s += took
        self._tell("observed", self.steps, *self._times(), self.scene.language)
        self._record(seen)  # while the policy thinks

    def _tell(self, kind: str, *content: Any) -> None:
        self.connection.send((kind, time.process_time(), *content))

    def _record(self, seen: Any = None) -> None:
        """Add a frame to the video, or end it. One that cannot be written is dropped, not the episode."""
        if self.video is None:
            return
        try:
            if seen is None:
                self.video.finish()
                self.video = None
            else:
                self.video.add(self.steps, seen.image, seen.wrist_image)
        except WorkFailed as problem:
            print(problem, file=sys.stderr)
            self._drop_video()

    def _times(self) -> tuple[float, float]:
        render_ms = self.scene.render_s * 1e3
        return self.busy_s * 1e3 - render_ms, render_ms

    def _drop_video(self) -> None:
        if self.video is not None:
            self.video.discard()
            self.video = None


def main(arguments: list[str]) -> None:
    """`worker PARENT_PID SOCKET_FD MEMORY_FD RESOLUTION`."""
    parent, socket_fd, memory_fd, resolution = (int(argument) for argument in arguments)
    die_with_parent(parent)
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to handle; it closes the pool
    memory = mmap.mmap(memory_fd, frame_bytes(resolution))
    os.close(memory_fd)
    Worker(Connection(socket_fd), memory, resolution).serve()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # scene closed; EGL's own exit handlers only print errors


if __name__ == "__main__":
    main(sys.argv[1:])
