"""Push a plate: the closed gripper is pressed inside its rim and dragged to the region."""

from __future__ import annotations

import numpy as np

from .expert import CLOSED, Expert
from .world import World


class Push(Expert):
    def __init__(self, world: World, obj: str, region: str):
        super().__init__(world)
        self.obj, self.region = obj, region

    def aims(self) -> np.ndarray:
        return np.stack([self.world.position(self.obj), self.world.site(self.region)])

    def _act(self) -> np.ndarray:
        position, plate = self.world.eef()[0], self.world.position(self.obj)
        bottom = self.world.bounds(self.obj)[0][2]
        way = (self.world.site(self.region) - plate)[:2]
        way /= max(np.linalg.norm(way), 1e-6)
        if self.phase == "plan":
            now, yaw = self.yaw_now(), np.arctan2(way[0], -way[1])
            self.yaw = min((yaw + k * np.pi for k in (-2, -1, 0, 1, 2)), key=lambda y: abs(y - now))
            self._enter("above")
        if self.phase == "above":
            target = np.array([*plate[:2], bottom + 0.08])
            arrived = np.linalg.norm(target - position) < 0.012 and self._yaw_error(self.yaw) < 0.1
            if not arrived and self.clock <= 60:
                return self._servo(target, self.yaw, CLOSED)
            self._enter("down")
        if self.phase == "down":
            if self.clock > 15:
                self._enter("push")
            return self._servo([*plate[:2], bottom - 0.002], self.yaw, CLOSED, 0.6)
        relative = (position - plate)[:2]
        if np.linalg.norm(relative) > 0.09:
            self._enter("plan")
        sideways = relative - (relative @ way) * way
        return self._servo([*(position[:2] + way * 0.07 - 0.5 * sideways), bottom + 0.002], self.yaw, CLOSED)
