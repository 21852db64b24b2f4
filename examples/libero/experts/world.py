"""What an expert may know: a privileged, read-only view of a LIBERO scene.

LIBERO's objects are collections of collision boxes, so boxes are all the geometry an expert needs: for
grasps (sampled on them), for clearances along a path and for the height of what lies below.
"""

from __future__ import annotations

import numpy as np


class World:
    """Poses and collision boxes of a robosuite-level LIBERO environment. Units: metres, world frame."""

    ROBOT = "robot"

    def __init__(self, env):
        import mujoco  # late: a policy in the same process must have loaded torch before (see rollout.py)

        self.env = env
        self.model, self.data = env.sim.model._model, env.sim.data._data
        self._grip_site = env.robots[0].eef_site_id
        model = self.model
        names = {int(body): name for name, body in env.obj_body_id.items()}
        owner: list[str | None] = [None] * model.nbody
        for body in range(1, model.nbody):
            owner[body] = names.get(body, owner[model.body_parentid[body]])
            if owner[body] is None and model.body(body).name.startswith(("robot0", "gripper0", "mount0")):
                owner[body] = self.ROBOT
        solid = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
        boxes = np.flatnonzero(solid & (model.geom_type == mujoco.mjtGeom.mjGEOM_BOX))
        self._box_ids = np.array([g for g in boxes if owner[model.geom_bodyid[g]] != self.ROBOT], int)
        self.box_owner = np.array([str(owner[model.geom_bodyid[g]]) for g in self._box_ids])
        self._finger_bodies = {
            side: {b for b in range(model.nbody) if model.body(b).name.startswith("gripper0_" + side)}
            for side in ("left", "right")
        }
        self._body_owner = owner

    # ---- poses
    def eef(self) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) and rotation (3, 3) of the grip site (between the finger tips)."""
        site = self._grip_site
        return self.data.site_xpos[site].copy(), self.data.site_xmat[site].reshape(3, 3).copy()

    def position(self, name: str) -> np.ndarray:
        return self.data.xpos[self.env.obj_body_id[name]].copy()

    def site(self, name: str) -> np.ndarray:
        return self.data.site(name).xpos.copy()

    def finger_gap(self) -> float:
        """Distance between the finger pads in metres: 0.08 open, 0 closed on nothing."""
        robot = self.env.robots[0]
        left, right = (self.data.qpos[i] for i in robot._ref_gripper_joint_pos_indexes)
        return float(left - right)

    def touched_by_both_fingers(self, name: str) -> bool:
        touched = set()
        for contact in self.data.contact[: self.data.ncon]:
            bodies = self.model.geom_bodyid[[contact.geom1, contact.geom2]]
            if name in (self._body_owner[bodies[0]], self._body_owner[bodies[1]]):
                touched |= {side for side, ids in self._finger_bodies.items() if ids & set(bodies.tolist())}
        return len(touched) == 2

    # ---- boxes
    def boxes(self, *, of: str | None = None, ignore: tuple[str, ...] = ()):
        """Centres (N, 3), rotations (N, 3, 3), half sizes (N, 3) of the collision boxes of `of` (None: all)."""
        keep = ~np.isin(self.box_owner, ignore) if of is None else self.box_owner == of
        ids = self._box_ids[keep]
        rotation = self.data.geom_xmat[ids].reshape(-1, 3, 3)
        return self.data.geom_xpos[ids].copy(), rotation.copy(), self.model.geom_size[ids].copy()

    def extents(self, **selection) -> tuple[np.ndarray, np.ndarray]:
        """Centres (N, 3) and axis-aligned half extents (N, 3) of the selected boxes."""
        centre, rotation, half = self.boxes(**selection)
        return centre, np.einsum("nij,nj->ni", np.abs(rotation), half)

    def bounds(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner (3,) of the object's axis-aligned bounding box."""
        centre, half = self.extents(of=name)
        return (centre - half).min(0), (centre + half).max(0)

    def points(self, name: str, spacing: float = 0.004) -> np.ndarray:
        """A grid of points (N, 3) filling the object's boxes."""
        clouds = []
        for centre, rotation, half in zip(*self.boxes(of=name), strict=True):
            axes = [np.linspace(-a, a, max(2, int(2 * a / spacing) + 1)) for a in half]
            grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
            clouds.append(grid @ rotation.T + centre)
        return np.concatenate(clouds)

    def surface_height(self, xy, ignore: tuple[str, ...], radius: float = 0.03) -> float:
        """Top of whatever lies within `radius` of `xy`."""
        centre, half = self.extents(ignore=ignore)
        gap = np.maximum(np.abs(centre[:, :2] - np.asarray(xy)) - half[:, :2], 0)
        below = np.linalg.norm(gap, axis=1) < radius
        return float((centre[below, 2] + half[below, 2]).max())

    def highest_along(self, start, end, ignore: tuple[str, ...], radius: float) -> float:
        """Top of the boxes within `radius` of the horizontal line from `start` to `end`; -1 if there is none."""
        centre, half = self.extents(ignore=ignore)
        ts = np.linspace(0, 1, 25)[:, None]
        line = np.asarray(start)[:2] * (1 - ts) + np.asarray(end)[:2] * ts
        gap = np.maximum(np.abs(line[:, None] - centre[None, :, :2]) - half[None, :, :2], 0)
        near = np.linalg.norm(gap, axis=-1).min(0) < radius
        return float((centre[near, 2] + half[near, 2]).max(initial=-1.0))
