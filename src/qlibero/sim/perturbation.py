"""What a task's variant changes that no BDDL file and no initial state says: the camera's and the arm's pose, noise."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

PIVOT = (0.0, 0.0, 0.8)
"""What the camera turns about and comes nearer to, metres: a point over the middle of the table."""


@dataclass(frozen=True)
class Perturbation:
    """Of one task. `name` tells its noise from every other task's; what is None or 0 is as LIBERO has it."""

    name: str = ""
    view: tuple[int, int, int, int, int] | None = None
    """The third-person camera: degrees about the vertical through the table's middle and upwards about the table's
    middle, distance from it in percent, degrees that the camera itself then turns sideways and upwards."""
    arm: tuple[float, ...] | None = None
    """(7,) rad: where the arm's joints start, whatever the initial state says."""
    noise: int = 0
    """1 to 50: kind and strength, see `sensor_noise`."""

    def move_camera(self, arena: Any) -> None:
        """Put the third-person camera of a robosuite arena where `view` has it."""
        if self.view is None:
            return
        from robosuite.utils.mjcf_utils import find_elements

        camera = find_elements(arena.worldbody, "camera", {"name": "agentview"}, return_first=True)
        stood, looked = (np.array(camera.get(key).split(), dtype=np.float64) for key in ("pos", "quat"))
        position, quaternion = moved(stood, looked, self.view)
        arena.set_camera("agentview", position, quaternion)

    def with_arm(self, state: np.ndarray, env: Any) -> np.ndarray:
        """An initial state (n,) of a robosuite environment with the arm's joints in `arm`, at rest. As it is, it puts
        them back: that alone is why LIBERO-plus, run as it is distributed, has no robot axis."""
        if self.arm is None:
            return state
        state, robot = state.copy(), env.robots[0]
        state[1 + np.array(robot._ref_joint_pos_indexes)] = self.arm
        state[1 + env.sim.model.nq + np.array(robot._ref_joint_vel_indexes)] = 0.0
        return state

    def noisy(self, frame: np.ndarray, moment: str) -> np.ndarray:
        """The third-person camera's frame (R, R, 3) uint8, as rendered, with its noise. What is random in it is a
        function of `name` and `moment` alone."""
        if not self.noise:
            return frame
        from qlibero.sim.sensor_noise import RECIPE, disturb

        digest = hashlib.sha256(f"{RECIPE}/{self.name}/{moment}".encode()).digest()
        return disturb(frame, self.noise, np.random.RandomState(np.frombuffer(digest, "<u4")))


UNPERTURBED = Perturbation()


def moved(
    position: np.ndarray, quaternion: np.ndarray, view: tuple[int, int, int, int, int]
) -> tuple[list[float], list[float]]:
    """LIBERO-plus's arithmetic, with its rounding to four decimals after each move, so that cameras stand where its own
    do. Position (3,) metres, quaternion (4,) wxyz."""
    from scipy.spatial.transform import Rotation

    around, up, percent, sideways, upwards = view
    pivot = np.array(PIVOT)

    def rounded(values: np.ndarray) -> np.ndarray:
        return np.array([round(value, 4) for value in values.tolist()])

    def about_y(degrees: int) -> Rotation:
        return Rotation.from_rotvec(np.radians(-degrees) * np.array([0, 1, 0]))

    def about_z(degrees: int) -> Rotation:
        return Rotation.from_euler("z", degrees, degrees=True)

    def turned(by: Rotation) -> np.ndarray:
        return rounded(np.roll((by * Rotation.from_quat(np.roll(quaternion, -1))).as_quat(), 1))

    if up:
        position = rounded(about_y(up).apply(position - pivot) + pivot)
        quaternion = turned(about_y(up))
    position = rounded(about_z(around).apply(position))
    quaternion = turned(about_z(around))
    if percent != 100:
        position = rounded(pivot + (position - pivot) * (percent / 100))
    if sideways:
        quaternion = turned(about_z(sideways))
    if upwards:
        quaternion = turned(about_y(upwards))
    return position.tolist(), quaternion.tolist()
