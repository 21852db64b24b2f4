"""Open a drawer: come in tilted, grasp the handle's bar, pull along the joint's axis, let go."""

from __future__ import annotations

import numpy as np

from .expert import CLOSED, OPEN, Expert, rotation_vector
from .world import World

_TILT = 1.2  # radians from pointing down towards pointing at the drawer
_OPENING = 0.155  # metres of joint travel at which the drawer counts as open


class Drawer(Expert):
    def __init__(self, world: World, region: str):
        super().__init__(world)
        model = world.model
        level = region.split("_")[-2]  # top, middle or bottom
        body = next(b for b in range(model.nbody) if model.body(b).name.endswith("cabinet_" + level))
        self._joint = model.body_jntadr[body]
        self._geoms = [g for g in range(model.ngeom) if model.geom_bodyid[g] == body and model.geom_contype[g]]

    def _outward(self) -> np.ndarray:
        sign = -1.0 if self.world.model.jnt_range[self._joint][0] < -0.05 else 1.0
        return sign * self.world.data.xaxis[self._joint]

    def _bar(self) -> np.ndarray:
        places, outward = self.world.data.geom_xpos, self._outward()
        return places[max(self._geoms, key=lambda g: places[g] @ outward)].copy()

    def aims(self) -> np.ndarray:
        travel = abs(self.world.data.qpos[self.world.model.jnt_qposadr[self._joint]])
        return np.stack([self._bar(), self._bar() + self._outward() * (_OPENING - travel)])

    def _act(self) -> np.ndarray:
        world, outward, bar = self.world, self._outward(), self._bar()
        position, rotation = world.eef()
        travel = abs(world.data.qpos[world.model.jnt_qposadr[self._joint]])
        if self.phase == "plan":
            approach = -outward * np.sin(_TILT) + [0, 0, -np.cos(_TILT)]
            closing = outward * np.cos(_TILT) + [0, 0, -np.sin(_TILT)]
            poses = [np.stack([s * closing, np.cross(approach, s * closing), approach], 1) for s in (1, -1)]
            self.pose = min(poses, key=lambda pose: np.linalg.norm(rotation_vector(pose @ rotation.T)))
            self.approach = approach
            self._enter("release" if travel > _OPENING else "before")
        if self.phase == "before":
            target = bar - 0.10 * self.approach
            turned = np.linalg.norm(rotation_vector(self.pose @ rotation.T)) < 0.12
            if not (np.linalg.norm(target - position) < 0.015 and turned) and self.clock <= 100:
                return self._servo(target, 0, OPEN, 0.7, self.pose)
            self._enter("approach")
        if self.phase == "approach":
            if np.linalg.norm(bar - position) >= 0.008 and self.clock <= 50:
                return self._servo(bar, 0, OPEN, 0.4, self.pose)
            self._enter("close")
        if self.phase == "close":
            if self.clock <= 12:
                return self._servo(position, 0, CLOSED, rotation=self.pose)
            self._enter("pull")
        if self.phase == "pull":
            if np.linalg.norm(bar - position) > 0.05:  # slipped off the handle
                self._enter("plan")
                return self._servo(position - self.approach * 0.05, 0, OPEN, rotation=self.pose)
            if travel <= _OPENING and self.clock <= 80:
                return self._servo(bar + outward * 0.06, 0, CLOSED, 0.7, self.pose)
            self._enter("release")
        if self.phase == "release":
            if self.clock <= 8:
                return self._servo(position, 0, OPEN, rotation=self.pose)
            self._enter("back")
        self.finished = self.clock > 14
        return self._servo(position - self.approach * 0.05 + [0, 0, 0.05], 0, OPEN, rotation=self.pose)
