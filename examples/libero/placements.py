"""Move the objects of a freshly reset scene further than its suite would ever place them.

LIBERO's own placements hardly vary (`spread.py` measures it), so a policy trained on them could memorise
coordinates. Half of the demonstrations therefore start from displaced objects, and the same function makes
the displaced-object control of the model card.
"""

from __future__ import annotations

import numpy as np
from experts import World

SETTLE = np.array([0, 0, 0, 0, 0, 0, -1.0])
RADIUS = {"libero_object": 0.08, "libero_spatial": 0.05, "libero_goal": 0.06}  # metres
_ON_FIXTURE = 0.015  # metres an object on a stove or in a drawer may move
_GAP = 0.012  # metres kept between bounding boxes


def displace(scene, rng: np.random.Generator, low: float, high: float, only: str | None = None) -> bool:
    """Displace every stack of objects (or only that of object `only`) by `low`..`high` metres, then settle.

    Objects lying on others move with them, what rests on a fixture moves at most 1.5 cm, and a displacement
    that would collide or leave the workspace is drawn anew, up to 40 times. Returns False when the scene is
    of no use afterwards: an object fell, the goal is already reached, or `only` could not be moved.
    """
    world = World(scene.env)
    names = list(scene.env.objects_dict)
    bounds = {name: world.bounds(name) for name in names}
    table = min(low_corner[2] for low_corner, _ in bounds.values())
    corners = np.array([corner[:2] for pair in bounds.values() for corner in pair])
    field = corners.min(0) - 0.06, corners.max(0) + 0.06
    centre, half = world.extents(ignore=(*names, World.ROBOT))
    standing = (centre + half)[:, 2] > table + 0.01
    fixed = list(zip((centre - half)[standing, :2], (centre + half)[standing, :2], strict=True))

    moved = only is None
    upright = {name: world.data.xmat[scene.env.obj_body_id[name]][8] for name in names}
    for stack in _stacks(bounds):
        if only is not None and only not in stack:
            continue
        elevated = min(bounds[name][0][2] for name in stack) > table + 0.02
        if elevated and low > _ON_FIXTURE:
            continue
        others = [(a[:2], b[:2]) for name, (a, b) in bounds.items() if name not in stack]
        obstacles = others if elevated else others + fixed
        for _ in range(40):
            radius = rng.uniform(0, _ON_FIXTURE) if elevated else np.sqrt(rng.uniform(low**2, high**2))
            angle = rng.uniform(0, 2 * np.pi)
            shift = radius * np.array([np.cos(angle), np.sin(angle), 0.0])
            boxes = [(bounds[name][0] + shift, bounds[name][1] + shift) for name in stack]
            inside = all((a[:2] > field[0]).all() and (b[:2] < field[1]).all() for a, b in boxes)
            if inside and not any(_overlap(box, obstacle) for box in boxes for obstacle in obstacles):
                for name, box in zip(stack, boxes, strict=True):
                    bounds[name] = box
                    joint = scene.env.objects_dict[name].joints[-1]
                    pose = scene.env.sim.data.get_joint_qpos(joint)
                    scene.env.sim.data.set_joint_qpos(joint, np.concatenate([pose[:3] + shift, pose[3:]]))
                moved = True
                break
    scene.env.sim.forward()
    success = [scene.step(SETTLE, observe=False) for _ in range(10)]
    tilted = any(abs(world.data.xmat[scene.env.obj_body_id[n]][8] - upright[n]) > 0.05 for n in names)
    return moved and not tilted and not any(success)


def _stacks(bounds) -> list[list[str]]:
    """Objects grouped with whatever movable object they stand on."""
    support = {}
    for name, (low, high) in bounds.items():
        middle = (low + high)[:2] / 2
        for other, (other_low, other_high) in bounds.items():
            over = (middle > other_low[:2]).all() and (middle < other_high[:2]).all()
            if other != name and over and low[2] > other_low[2] + 0.004:
                support[name] = other
    stacks: dict[str, list[str]] = {}
    for name in bounds:
        root = name
        while root in support:
            root = support[root]
        stacks.setdefault(root, []).append(name)
    return list(stacks.values())


def _overlap(box, other) -> bool:
    (low, high), (other_low, other_high) = box, other
    return bool((low[:2] < other_high + _GAP).all() and (high[:2] > other_low - _GAP).all())
