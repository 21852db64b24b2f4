"""How two arms move differently on the same episodes: paired shifts of execution quality, and first
divergence.

Time to success, path length and gripper flips are compared where both arms succeed (whole episodes); jerk on
every pair up to the earlier end, since a longer episode would otherwise count its idle tail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qlibero.results.clusters import sign_flip_p
from qlibero.results.ledger import read_trajectory
from qlibero.results.pairing import Arm, Pair
from qlibero.results.quality import ACTION, EEF, first_divergence, jerk

VISIBLE_M = 0.01  # grippers this far apart are apart to the eye


def execution_quality(pairs: Sequence[Pair], reference: Arm, other: Arm) -> dict[str, Any]:
    """Per measure: {"pairs", "reference", "arm", "shift" (arm − reference), "p" (paired sign flip)} in means,
    or None.
    """
    both = [p for p in pairs if p.reference.succeeded and p.other.succeeded]
    jerks = []
    for pair in pairs:
        left, right = _trajectories(pair, reference, other)
        if left is not None and right is not None:
            end = min(len(left), len(right))
            if end >= 4:
                jerks.append((jerk(left[:end]), jerk(right[:end])))
    return {
        "steps_to_success": _shift(_both(both, lambda r: r.success_step)),
        "path_length_m": _shift(_both(both, lambda r: r.path_length_m)),
        "gripper_flips": _shift(_both(both, lambda r: r.gripper_flips)),
        "jerk": _shift(jerks),
    }


def _both(pairs: Sequence[Pair], value: Callable) -> list[tuple[float, float]]:
    values = [(value(p.reference), value(p.other)) for p in pairs]
    return [(x, y) for x, y in values if x is not None and y is not None]


def _shift(values: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    if not values:
        return None
    left, right = np.array(values, dtype=np.float64).T
    return {
        "pairs": len(values),
        "reference": round(float(left.mean()), 6),
        "arm": round(float(right.mean()), 6),
        "shift": round(float((right - left).mean()), 6),
        "p": sign_flip_p(right - left),
    }


def action_noise(pairs: Sequence[Pair], reference: Arm, control: Arm) -> float:
    """99th percentile over all common steps of ‖a_control − a_reference‖∞: what the reference differs from
    itself.
    """
    differences = []
    for pair in pairs:
        left, right = _trajectories(pair, reference, control)
        if left is not None and right is not None:
            end = min(len(left), len(right))
            differences.append(np.abs(left[:end, ACTION] - right[:end, ACTION]).max(axis=1))
    return float(np.percentile(np.concatenate(differences), 99)) if differences else 0.0


def divergences(pairs: Sequence[Pair], reference: Arm, other: Arm, threshold: float) -> dict[str, Any]:
    """First step per episode at which actions differ by more than `threshold`, and at which the grippers are
    1 cm apart.

    {"threshold", "compared", "diverged", "median_step", "steps": {key: step | None}, "visible_steps": {…}}
    """
    steps: dict[str, int | None] = {}
    visible: dict[str, int | None] = {}
    for pair in pairs:
        left, right = _trajectories(pair, reference, other)
        if left is None or right is None:
            continue
        steps[str(pair.key)] = first_divergence(left, right, threshold)
        end = min(len(left), len(right))
        apart = np.linalg.norm(left[:end, EEF] - right[:end, EEF], axis=1) > VISIBLE_M
        visible[str(pair.key)] = int(np.argmax(apart)) if apart.any() else None
    found = [s for s in steps.values() if s is not None]
    return {
        "threshold": threshold,
        "compared": len(steps),
        "diverged": len(found),
        "median_step": float(np.median(found)) if found else None,
        "steps": steps,
        "visible_steps": visible,
    }


def _trajectories(pair: Pair, reference: Arm, other: Arm) -> tuple[np.ndarray | None, np.ndarray | None]:
    return (
        read_trajectory(reference.run_dirs[pair.key], pair.reference),
        read_trajectory(other.run_dirs[pair.key], pair.other),
    )
