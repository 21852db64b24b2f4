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

SUITE, TASK = "libero_object", 1


class Watched(Scene):
    """Notes what it was asked to begin with."""

    asked: list[tuple[int | None, int]]

    def reset(self, init, seed):
        self.asked.append((init, seed))
        super().reset(init, seed)


@pytest.fixture(scope="module")
def scene():
    scene = Watched(SUITE, TASK, resolution=16)
    scene.asked = []
    yield scene
    scene.close()


def test_no_official_initial_state_is_ever_asked_for(scene):
    first = demonstrations.FIRST_SEED + TASK * 10_000
    assert any(demonstrations.record_episode(scene, seed) for seed in range(first, first + 3))
    export.calibration(scene)
    assert all(init is None for init, _ in scene.asked)
    assert min(seed for _, seed in scene.asked) >= demonstrations.FIRST_SEED > 1_000_000


def test_no_demonstration_begins_in_an_official_initial_state(scene):
    first = demonstrations.FIRST_SEED + TASK * 10_000
    episodes = [e for seed in range(first, first + 3) if (e := demonstrations.record_episode(scene, seed))]
    official = init_states(SUITE, TASK)[:, 1 : 1 + scene.env.sim.model.nq]
    for episode in episodes:
        nearest = np.abs(official[:, 9:] - episode["qpos"][0][9:]).max(1).min()  # after the arm's and fingers' joints
        assert nearest > 1e-4
