"""LIBERO exactly as published evaluations drive it: the reference that the shortcuts of `qlibero.sim` must equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qlibero.sim import libero, suites


class StockEpisodes:
    """LIBERO's own `OffScreenRenderEnv`: hard resets, every sensor and camera at every step."""

    def __init__(self, suite: str, task: int, resolution: int = 256) -> None:
        libero._import_environments()
        from libero.libero import envs, get_libero_path

        record = libero.task_record(suite, task)
        bddl = Path(get_libero_path("bddl_files")) / record.problem_folder / record.bddl_file
        self.control = envs.OffScreenRenderEnv(
            bddl_file_name=str(bddl), camera_heights=resolution, camera_widths=resolution
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

    def state(self) -> np.ndarray:
        return self.control.get_sim_state()

    def fixtures(self) -> np.ndarray:
        model = self.control.env.sim.model
        return np.concatenate((model.body_pos.ravel(), model.body_quat.ravel()))

    def close(self) -> None:
        self.control.close()


def frames(observation: dict) -> tuple[np.ndarray, np.ndarray]:
    """The two frames as policies see them."""
    return (
        observation["agentview_image"][::-1, ::-1],
        observation["robot0_eye_in_hand_image"][::-1, ::-1],
    )
