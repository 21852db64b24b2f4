"""Pick an object up and put it somewhere, from any state, with recovery from what goes wrong.

Phases: plan → above → down → close → lift → move → lower → open → retreat. Whatever breaks (blocked on a
rim, closed on nothing, object lost on the way) leads back to `plan`; an object already between the fingers
lets a fresh expert begin with `lift`.
"""

from __future__ import annotations

import numpy as np

from .expert import CLOSED, OPEN, Expert
from .grasp import TIP, Grasp, plan_grasp
from .world import World

_UP = np.array([0.0, 0.0, 0.05])


class PickPlace(Expert):
    """`place()` gives the point (3,) where the object's underside should rest; read anew at every step."""

    def __init__(self, world: World, obj: str, place, grasp_offset=(0.0, 0.0)):
        """`grasp_offset` (metres, xy) spoils the grasp on purpose: how recovery states are produced."""
        super().__init__(world)
        self.obj, self.place, self.grasp_offset = obj, place, np.array([*grasp_offset, 0.0])
        self.grasp: Grasp | None = None
        self.speed = 1.0

    # ---- what the phases need to know
    def _offset(self) -> np.ndarray:
        return self.world.position(self.obj) - self.world.eef()[0]

    def _clearance(self, start, end, radius: float) -> float:
        return self.world.highest_along(start, end, ignore=(self.obj, self.world.ROBOT), radius=radius)

    def _hold(self) -> None:
        """Remember how the object sits in the hand and choose the height to carry it at."""
        position = self.world.eef()[0]
        self.hang = max(0.0, position[2] - self.world.bounds(self.obj)[0][2])
        self.held_offset = self._offset()
        self.carry_yaw = self.yaw_now() if self.grasp is None else self.grasp.yaw
        destination = np.asarray(self.place())
        self.carry_height = max(position[2] + 0.04, self._clearance(position, destination, 0.10) + self.hang + 0.035)
        self.lift_xy = position[:2]
        self._enter("lift")

    def _lost(self) -> bool:
        return bool(np.linalg.norm(self._offset() - self.held_offset) > 0.05)

    def _give_up(self) -> np.ndarray:
        """Open, rise a little and plan anew."""
        self.grasp_offset = np.zeros(3)
        self._enter("plan")
        return self._servo(self.world.eef()[0] + _UP, self.yaw_now(), OPEN)

    def aims(self) -> np.ndarray:
        return np.stack([self.world.position(self.obj), np.asarray(self.place())])

    def _act(self) -> np.ndarray:
        while True:  # a phase either gives an action or has entered another phase
            action = getattr(self, "_" + self.phase)()
            if action is not None:
                return action

    # ---- the phases
    def _plan(self):
        held = 0.002 < self.world.finger_gap() < 0.078 and self.world.touched_by_both_fingers(self.obj)
        if self.grasp is None and held:
            return self._hold()
        self.grasp = plan_grasp(self.world, self.obj)
        position = self.world.eef()[0]
        if self.grasp is None:
            return self._servo(position + [0, 0, 0.01], self.yaw_now(), OPEN)
        self.goal = self.grasp.position + self.grasp_offset
        clear = self._clearance(position, self.goal, 0.06)
        self.approach_height = max(self.goal[2] + 0.07, min(clear + TIP + 0.02, self.goal[2] + 0.25))
        error = np.linalg.norm(self.goal[:2] - position[:2])
        if error < 0.008 and self._yaw_error(self.grasp.yaw) < 0.1 and self.world.finger_gap() > 0.07:
            return self._enter("down")
        return self._enter("above")

    def _above(self):
        position = self.world.eef()[0]
        target = np.array([*self.goal[:2], self.approach_height])
        error = np.linalg.norm(target[:2] - position[:2])
        if error > 0.06:
            target[2] = max(target[2], min(position[2], target[2] + 0.05))
        turned = self._yaw_error(self.grasp.yaw) < 0.06
        arrived = error < 0.006 and turned and abs(target[2] - position[2]) < 0.03
        if arrived or self.clock > 90 or (self._stuck() and turned):
            return self._enter("down")
        return self._servo(target, self.grasp.yaw, OPEN, self.speed)

    def _down(self):
        position = self.world.eef()[0]
        height = position[2] - self.goal[2]
        if height < 0.004 or self.clock > 40:
            return self._enter("close")
        error = np.linalg.norm(self.goal[:2] - position[:2])
        if height > 0.012 and self.clock > 3 and (self._stuck(6, 0.003) or error > 0.04):
            return self._give_up()  # blocked, or pushed far aside
        funnel = np.clip(6 * (error - 0.006), 0.0, 0.05)  # sink only as far as the hand is centred
        return self._servo(self.goal + [0, 0, funnel], self.grasp.yaw, OPEN, 0.7)

    def _close(self):
        if self.clock <= 11:
            return self._servo(self.goal, self.grasp.yaw, CLOSED)
        if self.world.finger_gap() < 0.002:
            return self._give_up()
        return self._hold()

    def _lift(self):
        if self._lost() and self.clock > 8:
            return self._give_up()
        if self.carry_height - self.world.eef()[0][2] < 0.02 or self.clock > 60:
            return self._enter("move")
        return self._servo([*self.lift_xy, self.carry_height + 0.01], self.carry_yaw, CLOSED, self.speed)

    def _move(self):
        position, destination, offset = self.world.eef()[0], np.asarray(self.place()), self._offset()
        if self._lost() and self.clock > 3:
            return self._give_up()
        clear = self._clearance(position, destination, 0.10)  # descend as soon as the way left is clear
        self.carry_height = min(self.carry_height, max(destination[2] + 0.05, clear + 0.035) + self.hang)
        target = np.array([*(destination - offset)[:2], self.carry_height])
        if np.linalg.norm(target[:2] - position[:2]) < 0.008 or self.clock > 100 or self._stuck():
            return self._enter("lower")
        return self._servo(target, self.carry_yaw, CLOSED, self.speed)

    def _lower(self):
        position, destination, offset = self.world.eef()[0], np.asarray(self.place()), self._offset()
        if self._lost():
            return self._give_up()
        height = destination[2] + self.hang
        error = np.linalg.norm((destination - offset - position)[:2])
        landed = self.clock > 12 and error < 0.012 and self._stuck(6, 0.0006)
        if position[2] - height < 0.006 or self.clock > 90 or landed:
            return self._enter("open")
        if error < 0.012 or self.clock > 60:
            z = height - 0.004
        else:
            z = max(height + 0.03, min(position[2] - 0.01, height + 0.05))
        speed = 1.0 if position[2] - height > 0.07 else 0.4
        return self._servo([*(destination - offset)[:2], z], self.carry_yaw, CLOSED, speed)

    def _open(self):
        if self.clock > 8:
            return self._enter("retreat")
        return self._servo(self.world.eef()[0], self.carry_yaw, OPEN)

    def _retreat(self):
        if self.clock > 25:
            self.grasp = None
            self._enter("plan")
        return self._servo(self.world.eef()[0] + _UP, self.carry_yaw, OPEN, 0.6)
