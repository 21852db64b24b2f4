"""Turn the stove on: straddle the knob's ridge, close, and turn the hand with it."""

from __future__ import annotations

import numpy as np

from .expert import CLOSED, OPEN, Expert
from .world import World


class Knob(Expert):
    def __init__(self, world: World):
        super().__init__(world)
        model = world.model
        self._geoms = [
            g
            for g in range(model.ngeom)
            if model.body(model.geom_bodyid[g]).name.endswith("button") and model.geom_contype[g]
        ]

    def _ridge(self) -> tuple[np.ndarray, float]:
        """Middle (3,) of the knob's upper geoms, and the height of its top."""
        data, half = self.world.data, self.world.model.geom_size
        tops = [data.geom_xpos[g][2] + (np.abs(data.geom_xmat[g].reshape(3, 3)) @ half[g])[2] for g in self._geoms]
        upper = [g for g in self._geoms if data.geom_xpos[g][2] + half[g].min() > max(tops) - 0.03]
        return np.mean([data.geom_xpos[g] for g in upper], 0), max(tops)

    def aims(self) -> np.ndarray:
        return np.stack([self._ridge()[0]] * 2)

    def _act(self) -> np.ndarray:
        position = self.world.eef()[0]
        centre, top = self._ridge()
        if self.phase == "plan":
            self.centre, now = centre, self.yaw_now()
            self.yaw = min((np.pi / 2 + k * np.pi for k in (-2, -1, 0, 1)), key=lambda yaw: abs(yaw - now))
            self._enter("above")
        grip = np.array([*self.centre[:2], top - 0.012])
        if self.phase == "above":
            target = grip + [0, 0, 0.06]
            arrived = np.linalg.norm(target - position) < 0.01 and self._yaw_error(self.yaw) < 0.05
            if not arrived and self.clock <= 80:
                return self._servo(target, self.yaw, OPEN)
            self._enter("down")
        if self.phase == "down":
            if abs(position[2] - grip[2]) >= 0.006 and self.clock <= 30:
                return self._servo(grip, self.yaw, OPEN, 0.6)
            self._enter("close")
        if self.phase == "close":
            if self.clock <= 10:
                return self._servo(position, self.yaw, CLOSED)
            self.height = position[2]
            self._enter("turn")
        if self.clock > 90:  # slipped off: begin again
            self._enter("plan")
            return self._servo(position + [0, 0, 0.05], self.yaw_now(), OPEN)
        self.yaw += 0.04
        return self._servo([*centre[:2], self.height], self.yaw, CLOSED, 0.5)
