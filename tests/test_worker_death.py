"""Risk: a simulator that dies, hangs or is stopped takes the policy, an episode or the machine with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qlibero.episode_key import EpisodeKey
from qlibero.errors import WorkFailed
from qlibero.frames import FrameFormat
from qlibero.sim.pool import Assignment, Died, Finished, Observed, SimulatorPool, worker_environment

pytestmark = pytest.mark.libero

EPISODE = Assignment(EpisodeKey("libero_object", 0, 3, 7), "pure", 7)
ACTIONS = np.random.RandomState(0).uniform(-0.5, 0.5, (5, 7)).astype(np.float32)


def next_event(pool: SimulatorPool, within_s: float = 300.0):
    events = pool.wait(within_s)
    assert len(events) == 1, events
    return events[0]


def run_episode(pool: SimulatorPool, assignment: Assignment) -> tuple[list[Observed], Finished]:
    pool.start(0, assignment)
    seen = []
    while isinstance(event := next_event(pool), Observed):
        seen.append(event)
        pool.act(0, ACTIONS)
    return seen, event


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_dead_hung_and_failing_workers_are_replaced_and_the_episode_comes_out_equal(tmp_path):
    video = tmp_path / "videos" / "episode.mp4"
    with SimulatorPool(1, resolution=64, timeout_s=600) as pool:
        pool.prepare(0, "libero_object", 0, "pure")  # the scene is built before the episode is asked for
        seen, undisturbed = run_episode(pool, EPISODE)
        assert 0.3 < pool.peak_gb() < 2.5, "a simulator's memory, which capacity reckons with"
        assert [event.step for event in seen] == [0, 5]  # rendered after each executed chunk, not at the end
        assert seen[0].prompt == "pick up the alphabet soup and place it in the basket"
        assert seen[0].observation.image.shape == (64, 64, 3) and seen[0].observation.state.dtype == np.float32
        assert undisturbed.steps == 7 and undisturbed.trajectory.shape == (7, 10)
        assert np.array_equal(undisturbed.trajectory[:5, :7], ACTIONS)

        pool.start(0, EPISODE)
        assert isinstance(next_event(pool), Observed)
        os.kill(pool.pids()[0], signal.SIGKILL)
        died = next_event(pool)
        assert died == Died(0, "killed by SIGKILL")
        again, event = run_episode(pool, Assignment(EPISODE.key, "pure", 7, video))  # a replacement, and with video
        assert np.array_equal(event.trajectory, undisturbed.trajectory)
        assert event.fingerprint == undisturbed.fingerprint
        assert all(np.array_equal(a.observation.image, b.observation.image) for a, b in zip(again, seen, strict=True))
        frames = subprocess.run(
            [
                "ffprobe",
                "-v",
                "error",
                "-count_frames",
                "-show_entries",
                "stream=nb_read_frames,width,height",
                "-of",
                "csv=p=0",
                str(video),
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        assert frames == "128,64,8" and os.listdir(video.parent) == ["episode.mp4"]

        last = FrameFormat(80, "area")  # has no room
        for wanted in (FrameFormat(28, "pil"), FrameFormat(32, "area"), FrameFormat(56, "torch"), last):
            pool.start(0, replace(EPISODE, frame_format=wanted))
            event, raw = next_event(pool), seen[0].observation
            assert isinstance(event, Observed)
            for found, whole in (
                (event.observation.image, raw.image),
                (event.observation.wrist_image, raw.wrist_image),
            ):
                assert np.array_equal(found, whole if wanted is last else wanted.of(whole)), wanted
            assert np.array_equal(event.observation.state, raw.state)

        pool.start(0, EPISODE)
        assert isinstance(next_event(pool), Observed)
        pool.act(0, np.full((5, 7), np.nan))  # the policy's failure, not the worker's: it ends the episode
        ended = next_event(pool)
        assert isinstance(ended, Finished) and (ended.success, ended.steps) == (False, 0)

        pool.start(0, EPISODE)
        assert isinstance(next_event(pool), Observed)
        pool.act(0, np.zeros((5, 3)))  # raises inside the worker
        died = next_event(pool)
        assert isinstance(died, Died) and "actions of shape (5, 3)" in died.reason

        pool.timeout_s = 3.0
        os.kill(pool.pids()[0], signal.SIGSTOP)
        stopped = pool.pids()[0]
        pool.start(0, EPISODE)
        died = next_event(pool)
        assert isinstance(died, Died) and "no answer within 3 s" in died.reason
        assert not alive(stopped)
        pids = pool.pids()
    assert not any(map(alive, pids))


LAUNCHER = """
import numpy as np, sys, time
from qlibero.episode_key import EpisodeKey
from qlibero.sim.pool import Assignment, SimulatorPool
pool = SimulatorPool(2, resolution=64)
print(*pool.pids(), flush=True)
pool.start(0, Assignment(EpisodeKey("libero_object", 0, 3, 7), "pure", 280))
while True:
    for event in pool.wait(300):
        print("busy", flush=True)
        pool.act(0, np.zeros((5, 7)))
"""


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_a_killed_launcher_leaves_no_process_no_memory_and_no_word(stopped):
    """SIGKILL to the launcher, with one worker in the middle of an episode and one idle (or stopped)."""
    before = set(os.listdir("/dev/shm"))
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pids = [int(word) for word in launcher.stdout.readline().split()]
    assert launcher.stdout.readline() == "busy\n"
    if stopped:
        os.kill(pids[1], signal.SIGSTOP)
    launcher.kill()
    _, errors = launcher.communicate(timeout=60)
    until = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, pids))
    assert set(os.listdir("/dev/shm")) <= before
    assert errors == ""


def test_without_a_gl_library_the_cure_is_named(tmp_path):
    """A library that cannot be loaded stands first in the path: to the process, EGL is not there."""
    (tmp_path / "libEGL.so.1").write_bytes(b"not a library")
    with SimulatorPool(1, environment={"MUJOCO_GL": "egl", "LD_LIBRARY_PATH": str(tmp_path)}) as pool:
        pool.start(0, EPISODE)
        with pytest.raises(WorkFailed, match="no EGL library .*apt-get install -y libegl1"):
            pool.wait(300)


def test_the_worker_environment_follows_the_egl_rules(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/cuda/lib")
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "2")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    environment = worker_environment({"EXTRA": "1"})
    assert "CUDA_VISIBLE_DEVICES" not in environment and "LD_LIBRARY_PATH" not in environment
    assert environment["MUJOCO_EGL_DEVICE_ID"] == "2" and environment["EXTRA"] == "1"
    assert (environment["MUJOCO_GL"], environment["PYOPENGL_PLATFORM"]) == ("egl", "egl")
    assert (environment["LP_NUM_THREADS"], environment["OMP_NUM_THREADS"]) == ("0", "1")
