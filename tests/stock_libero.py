"""LIBERO exactly as published evaluations drive it: the reference that the shortcuts of `qlibero.sim` must equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qlibero.sim import libero, suites

CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")


class StockEpisodes:
    """LIBERO's own environment: hard resets that recompile, its own step, all its sensors.

    `render=False` leaves the cameras out, which changes no physics and saves most of the time.
    """

    def __init__(self, suite: str, task: int, *, resolution: int = 256, render: bool = True) -> None:
        libero._import_environments()
        from libero.libero import envs, get_libero_path

        record = libero.task_record(suite, task)
        bddl = Path(get_libero_path("bddl_files")) / record.problem_folder / record.bddl_file
        if render:
            self.control = envs.OffScreenRenderEnv(
                bddl_file_name=str(bddl), camera_heights=resolution, camera_widths=resolution
            )
        else:
            self.control = envs.env_wrapper.ControlEnv(
                bddl_file_name=str(bddl), use_camera_obs=False, has_offscreen_renderer=False
            )
        self.inits = suites.init_states(suite, task)

    def reset_pure(self, init: int, seed: int) -> dict:
        """Seed and clear before the reset; returns the observation after the settle steps."""
        self.control.env.object_property_initializers = []
        self.control.seed(seed)
        self.control.reset()
        return self.begin(init)

    def begin(self, init: int) -> dict:
        """What the published loop does between `reset()` and the policy's first frame."""
        self.control.set_init_state(self.inits[init])
        for _ in range(suites.SETTLE_STEPS):
            observation, _, _, _ = self.control.step(list(suites.SETTLE_ACTION))
        return observation

    def cameras(self, on: bool) -> None:
        """Let the following steps render, or not."""
        for name in CAMERAS:
            self.control.env.modify_observable(name, "enabled", on)

    def close(self) -> None:
        self.control.close()


def physics(env: object) -> np.ndarray:
    """Everything that moves and everything LIBERO places: time, qpos, qvel, body poses. Works for both."""
    model = env.sim.model
    return np.concatenate((env.sim.get_state().flatten(), model.body_pos.ravel(), model.body_quat.ravel()))


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
