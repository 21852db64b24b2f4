"""LIBERO exactly as published evaluations drive it: the reference that the shortcuts of `qlibero.sim` must equal."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

from qlibero.sim import libero, suites

CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")


class StockEpisodes:
    """LIBERO's own environment: hard resets that recompile, its own step, all its sensors.

    `render=False` saves most of the time: no cameras, and robosuite's renderer uploads nothing to OpenGL. It is made
    all the same, since its constructor calls `mj_forward`, which moves the solver's warm start and so the last bits.
    """

    def __init__(self, suite: str, task: int, *, resolution: int = 256, render: bool = True) -> None:
        libero._import_environments()
        from libero.libero import envs, get_libero_path
        from robosuite.utils.binding_utils import MjRenderContext

        record = libero.task_record(suite, task)
        bddl = Path(get_libero_path("bddl_files")) / record.problem_folder / record.bddl_file
        self._renderer = (
            contextlib.nullcontext
            if render
            else functools.partial(
                mock.patch.object, MjRenderContext, "_set_mujoco_context_and_buffers", _upload_nothing
            )
        )
        with self._renderer():
            self.control = envs.OffScreenRenderEnv(
                bddl_file_name=str(bddl), camera_heights=resolution, camera_widths=resolution, use_camera_obs=render
            )
        self.inits = suites.init_states(suite, task)

    def reset(self) -> None:
        """LIBERO's hard reset, drawing from numpy's stream where it stands."""
        with self._renderer():
            self.control.reset()

    def reset_pure(self, init: int, seed: int) -> dict:
        """Seed and clear before the reset; returns the observation after the settle steps."""
        self.control.env.object_property_initializers = []
        self.control.seed(seed)
        self.reset()
        return self.begin(init)

    def begin(self, init: int) -> dict:
        """What the published loop does between `reset()` and the policy's first frame."""
        self.control.set_init_state(self.inits[init])
        for _ in range(suites.SETTLE_STEPS):
            observation, _, _, _ = self.control.step(list(suites.SETTLE_ACTION))
        return observation

    def cameras(self, on: bool) -> None:
        """Let the following steps render, or not. (Disabling an observable would restart its clock: other substeps.)"""
        sim = self.control.env.sim
        vars(sim).pop("render", None)
        if not on:
            sim.render = lambda **_: np.zeros((1, 1, 3), np.uint8)

    def close(self) -> None:
        self.control.close()


def _upload_nothing(renderer: object) -> None:
    """In place of the MjRenderContext method that makes a MuJoCo GL context, the dear part of a renderer."""
    renderer.con = SimpleNamespace(free=lambda: None)


def physics(env: object) -> np.ndarray:
    """Everything that moves and everything LIBERO places: time, qpos, qvel, body poses. Works for both."""
    model = env.sim.model
    return np.concatenate((env.sim.get_state().flatten(), model.body_pos.ravel(), model.body_quat.ravel()))


def warm_start(env: object) -> np.ndarray:
    """Where the solver starts next, (nv,) accelerations: a difference that may reach `physics` only steps later."""
    return env.sim.data.qacc_warmstart.copy()


def frames(observation: dict) -> tuple[np.ndarray, np.ndarray]:
    """The two frames as policies see them."""
    return tuple(observation[name][::-1, ::-1] for name in CAMERAS)


def rough_actions(steps: int, seed: int) -> np.ndarray:
    """(steps, 7) actions that go looking for trouble: press down into whatever is there, grip, lift, push."""
    stream = np.random.RandomState(seed)
    actions = stream.uniform(-0.6, 0.6, (steps, 7))
    phase = np.arange(steps) % 60
    actions[:, 2] = np.where(phase < 35, -0.9, 0.7)
    actions[:, 6] = np.where(phase < 25, -1.0, 1.0)
    return actions
