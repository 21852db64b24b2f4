"""Training data must not contain what the evaluation measures: the official initial states and its seeds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from qlibero.sim.scene import Scene
from qlibero.sim.suites import init_states

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/libero"))
import demonstrations  # noqa: E402
import export  # noqa: E402

pytestmark = pytest.mark.libero

TASKS = [("libero_object", 1), ("libero_spatial", 4), ("libero_goal", 0)]


class Watched(Scene):
    """Notes what it was asked to begin with."""

    asked: list[tuple[int | None, int]]

    def reset(self, init, seed):
        self.asked.append((init, seed))
        super().reset(init, seed)


@pytest.fixture(scope="module", params=TASKS, ids=lambda task: f"{task[0]}-{task[1]}")
def recorded(request):
    """The watched scene, and one demonstration recorded in it."""
    suite, task = request.param
    scene = Watched(suite, task, resolution=16)
    scene.asked = []
    first = demonstrations.FIRST_SEED + task * 10_000
    episode = next(e for seed in range(first, first + 5) if (e := demonstrations.record_episode(scene, seed)))
    yield scene, episode
    scene.close()


def test_no_official_initial_state_is_ever_asked_for(recorded):
    scene, _ = recorded
    assert export.calibration(scene)
    assert all(init is None for init, _ in scene.asked)
    assert min(seed for _, seed in scene.asked) >= demonstrations.FIRST_SEED > 1_000_000


def test_no_demonstration_begins_in_an_official_initial_state(recorded):
    scene, episode = recorded
    objects = slice(9, None)  # qpos after the arm's and the fingers' joints
    official = init_states(scene.suite, scene.task)[:, 1 : 1 + scene.env.sim.model.nq]
    assert np.abs(official[:, objects] - episode["qpos"][0][objects]).max(1).min() > 1e-4
