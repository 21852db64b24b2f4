"""How an episode was executed, beyond whether it succeeded: path length, jerk, gripper flips.

At 97 % success the way a policy moves tells arms apart long before success does. A trajectory is one float32
row per executed step (settle steps excluded): 7 action values, then the end-effector position in metres.
"""

from __future__ import annotations

import math

import numpy as np

CONTROL_HZ = 20.0  # LIBERO's control rate
MOTION = slice(0, 6)  # the arm's part of an action; the gripper's is a command, open or closed
EEF = slice(7, 10)
GRIPPER = 6
GRIPPER_DEAD_ZONE = 0.05  # a command this near zero moves the fingers neither way


def path_length_m(trajectory: np.ndarray) -> float:
    """Length in metres of the end-effector's way; 0 for fewer than two rows. `trajectory` (steps, 10)."""
    position = trajectory[:, EEF].astype(np.float64)
    return float(np.linalg.norm(np.diff(position, axis=0), axis=1).sum())


def jerk(trajectory: np.ndarray, hz: float = CONTROL_HZ) -> float | None:
    """Mean norm of the third difference of the end-effector position times hz³, in m/s³; None below four rows.

    It gives 1 on p = t³/6. Comparable within a pair only up to the earlier end of the two episodes.
    """
    position = trajectory[:, EEF].astype(np.float64)
    if len(position) < 4:
        return None
    return float(np.linalg.norm(np.diff(position, n=3, axis=0), axis=1).mean() * hz**3)


def gripper_flips(trajectory: np.ndarray, dead_zone: float = GRIPPER_DEAD_ZONE) -> int:
    """Sign changes of the gripper command after dropping |g| ≤ dead zone."""
    command = trajectory[:, GRIPPER]
    signs = np.sign(command[np.abs(command) > dead_zone])
    return int(np.count_nonzero(signs[1:] != signs[:-1]))


def first_divergence(reference: np.ndarray, other: np.ndarray, threshold: float) -> int | None:
    """First step at which two streams' arm motions differ by more than `threshold` (maximum norm); None if never.

    Only the common steps are looked at. Means something under the shared noise contract, and up to that step
    only: afterwards the two arms see different observations. The gripper has its own measure,
    `first_opposed_grip`: its command jumps between −1 and 1, and a difference of 2 would drown every other.
    """
    return first_true(motion_difference(reference, other) > threshold)


def first_opposed_grip(reference: np.ndarray, other: np.ndarray) -> int | None:
    """First common step at which one arm opens its gripper and the other closes it; None if never."""
    steps = min(len(reference), len(other))
    left, right = reference[:steps, GRIPPER], other[:steps, GRIPPER]
    decided = np.minimum(np.abs(left), np.abs(right)) > GRIPPER_DEAD_ZONE
    return first_true(decided & (np.sign(left) != np.sign(right)))


def first_apart(reference: np.ndarray, other: np.ndarray, metres: float) -> int | None:
    """First common step at which the two grippers are more than `metres` from each other; None if never."""
    steps = min(len(reference), len(other))
    return first_true(np.linalg.norm(reference[:steps, EEF] - other[:steps, EEF], axis=1) > metres)


def control_steps(latency_ms: float) -> int:
    """Control steps that begin before an answer of that latency is there: 0 ms is none, 1 to 50 ms is one."""
    return math.ceil(latency_ms * CONTROL_HZ / 1e3 - 1e-9)


def motion_difference(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Maximum norm of the difference of the arm's six action values, per common step."""
    steps = min(len(reference), len(other))
    largest: np.ndarray = np.abs(reference[:steps, MOTION] - other[:steps, MOTION]).max(axis=1, initial=0.0)
    return largest


def first_true(found: np.ndarray) -> int | None:
    return int(np.argmax(found)) if found.any() else None
