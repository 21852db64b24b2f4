"""What all experts share: a servo from poses to OSC_POSE deltas, and phases with a clock."""

from __future__ import annotations

import numpy as np

from .world import World

OPEN, CLOSED = -1.0, 1.0
_POSITION_UNIT = 0.05  # metres per control step at action 1 (OSC_POSE's output limit)
_ROTATION_UNIT = 0.5  # radians
_DOWN = np.array([0.0, 0.0, -1.0])


class Expert:
    """A phase machine; `act()` gives the next clean action (7,) in [-1, 1]."""

    position_gain, rotation_gain, rotation_limit = 1.6, 1.2, 0.6

    def __init__(self, world: World):
        self.world = world
        self.phase = "plan"
        self.clock = 0
        self.finished = False
        self._trail: list[np.ndarray] = []

    def act(self) -> np.ndarray:
        self.clock += 1
        return np.clip(self._act(), -1.0, 1.0)

    def _act(self) -> np.ndarray:
        raise NotImplementedError

    def aims(self) -> np.ndarray:
        """What the hand should go to and where that should end up, (2, 3): targets of training's auxiliary losses."""
        raise NotImplementedError

    def _enter(self, phase: str) -> None:
        self.phase, self.clock, self._trail = phase, 0, []

    def _stuck(self, steps: int = 8, distance: float = 0.002) -> bool:
        """Whether the hand moved less than `distance` in the last `steps` steps of this phase."""
        self._trail.append(self.world.eef()[0])
        if len(self._trail) <= steps:
            return False
        return bool(np.linalg.norm(self._trail[-1] - self._trail[-1 - steps]) < distance)

    def _servo(self, target, yaw, grip: float, speed: float = 1.0, rotation=None) -> np.ndarray:
        """One proportional step towards `target` (3,) with the hand pointing down at `yaw`, or at `rotation`."""
        position, current = self.world.eef()
        delta = self.position_gain * (np.asarray(target) - position) / _POSITION_UNIT
        delta *= min(1.0, speed / max(np.abs(delta).max(), 1e-9))
        if rotation is None:
            x = np.array([np.cos(yaw), np.sin(yaw), 0.0])
            rotation = np.stack([x, np.cross(_DOWN, x), _DOWN], 1)
        turn = rotation_vector(rotation @ current.T) * self.rotation_gain / _ROTATION_UNIT
        turn *= min(1.0, self.rotation_limit / max(np.abs(turn).max(), 1e-9))
        return np.concatenate([delta, turn, [grip]])

    def _yaw_error(self, yaw: float) -> float:
        return float(abs((self.yaw_now() - yaw + np.pi) % (2 * np.pi) - np.pi))

    def yaw_now(self) -> float:
        rotation = self.world.eef()[1]
        return float(np.arctan2(rotation[1, 0], rotation[0, 0]))


class Sequence(Expert):
    """One expert after the other; the next begins when the one before says it is finished."""

    def __init__(self, world: World, parts: list[Expert]):
        super().__init__(world)
        self.parts = list(parts)

    def _act(self) -> np.ndarray:
        if self.parts[0].finished and len(self.parts) > 1:
            self.parts.pop(0)
        action = self.parts[0].act()
        self.phase = self.parts[0].phase
        return action

    def aims(self) -> np.ndarray:
        return self.parts[0].aims()


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle (3,) of a rotation matrix."""
    import mujoco

    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(rotation).reshape(9))
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector
