"""Antipodal top-down grasps, sampled on an object's collision boxes.

A candidate is a point and a yaw; its cost adds up turning, distance from the object's middle, fingers and
hand inside other boxes, a too wide or too thin grip, and reach. Hollow objects (bowls) are gripped at the
rim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .world import World

TIP = 0.013  # the finger tips reach this far below the grip site
HALF_OPENING = 0.040  # from the grip site to a pad's inner face, fully open


@dataclass(frozen=True)
class Grasp:
    position: np.ndarray  # (3,) of the grip site
    yaw: float  # of the axis along which the fingers close
    width: float  # of what is gripped
    cost: float


def plan_grasp(world: World, name: str) -> Grasp | None:
    """The cheapest grasp of object `name` from the hand's present orientation; None if nothing fits."""
    cloud = world.points(name)
    top, bottom = cloud[:, 2].max(), cloud[:, 2].min()
    rotation = world.eef()[1]
    yaw_now = np.arctan2(rotation[1, 0], rotation[0, 0])
    middle = (cloud[:, :2].max(0) + cloud[:, :2].min(0)) / 2
    upper = cloud[cloud[:, 2] > top - 0.012]
    hollow = np.linalg.norm(upper[:, :2] - middle, axis=1).min() > 0.015
    height = max(top - (0.016 if hollow else 0.022), bottom + TIP + 0.001)
    slab = cloud[(cloud[:, 2] > height - 0.008) & (cloud[:, 2] < height + 0.014), :2]

    if hollow:
        radius = np.linalg.norm(slab - middle, axis=1).max() - 0.004
        angles = np.arange(0, 2 * np.pi, np.pi / 18)
        candidates = [(middle + radius * np.array([np.cos(a), np.sin(a)]), a) for a in angles]
    else:
        low, high = slab.min(0), slab.max(0)
        grid = [
            np.array([x, y])
            for x in np.arange(low[0], high[0] + 1e-6, 0.008)
            for y in np.arange(low[1], high[1] + 1e-6, 0.008)
        ]
        candidates = [(c, a) for c in [middle, *grid] for a in np.arange(0, np.pi, np.pi / 12)]

    obstacle, obstacle_rotation, obstacle_half = world.boxes()
    reach = np.linalg.norm(obstacle[:, :2] - middle, axis=1) - np.linalg.norm(obstacle_half, axis=1)
    near = reach < 0.2
    obstacle, obstacle_rotation, obstacle_half = obstacle[near], obstacle_rotation[near], obstacle_half[near]
    shoulder = world.data.body("robot0_link2").xpos

    grasps = []
    for point, angle in candidates:
        closing = np.array([np.cos(angle), np.sin(angle)])
        across = np.array([-closing[1], closing[0]])
        along, aside = (slab - point) @ closing, (slab - point) @ across
        gripped = (np.abs(aside) < 0.009) & (np.abs(along) < (0.02 if hollow else HALF_OPENING + 0.01))
        if gripped.sum() < 3:
            continue
        first, last = along[gripped].min(), along[gripped].max()
        width = last - first
        if width > 2 * HALF_OPENING - 0.006:
            continue
        centre = point + closing * (first + last) / 2
        turn = (angle - yaw_now + np.pi / 2) % np.pi - np.pi / 2
        cover = np.ptp(aside[gripped])
        stretch = np.hypot(np.linalg.norm(centre - shoulder[:2]) - 0.088, height + 0.25 - shoulder[2])
        cost = (
            0.02 * abs(turn)
            + 0.3 * max(0, width - 0.068)
            + 0.5 * max(0, 0.012 - cover)
            + 1.5 * max(0, stretch - 0.60)
            + (0 if hollow else np.linalg.norm(centre - middle))
        )
        grasps.append(Grasp(np.array([*centre, height]), yaw_now + turn, float(width), float(cost)))

    best: Grasp | None = None
    for grasp in sorted(grasps, key=lambda grasp: grasp.cost):
        if best is not None and grasp.cost >= best.cost:
            break  # collisions only add to the cost
        closing = np.array([np.cos(grasp.yaw), np.sin(grasp.yaw), 0])
        frame = np.stack([closing, [-closing[1], closing[0], 0], [0, 0, 1.0]])
        hand = grasp.position + _HAND @ frame
        local = (hand[:, None] - obstacle)[:, :, None] @ obstacle_rotation  # in each box's own frame
        collisions = (np.abs(local[:, :, 0]) < obstacle_half + 0.002).all(-1).any(1).sum()
        cost = grasp.cost + 0.05 * float(collisions)
        if best is None or cost < best.cost:
            best = replace(grasp, cost=cost)
    return best


def _box_points(*axes) -> np.ndarray:
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


# Points of the open fingers and of the palm in the hand's frame (closing axis, across, up).
_FINGER = _box_points(
    np.linspace(HALF_OPENING + 0.001, HALF_OPENING + 0.025, 4),
    np.linspace(-0.012, 0.012, 3),
    np.linspace(-TIP, 0.08, 8),
)
_PALM = _box_points(np.linspace(-0.1, 0.1, 9), np.linspace(-0.03, 0.03, 3), np.linspace(0.037, 0.10, 4))
_HAND = np.concatenate([_FINGER, _FINGER * [-1, 1, 1], _PALM])
