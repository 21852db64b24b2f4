"""How two arms move differently on the same episodes: paired shifts of execution quality, and where they part.

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
from qlibero.results.quality import first_apart, first_divergence, first_opposed_grip, jerk, motion_difference

VISIBLE_M = 0.01  # grippers this far apart are apart to the eye


def execution_quality(pairs: Sequence[Pair], reference: Arm, other: Arm) -> dict[str, Any]:
    """Means per measure: {"pairs", "reference", "arm", "shift" (arm − reference), "p" (paired sign flip)} or None."""
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
    """What the reference's own actions differ by when it runs again: 99th percentile of ‖a_control − a_reference‖∞
    over the arm's six action values in the first executed chunk of every A/A pair. 0 without trajectories.

    Only that chunk: both runs answer the very same observation there, so nothing but rounding makes them differ.
    One chunk later the rounding has moved the robot, feedback multiplies it, and within some forty steps the two
    runs may do different things altogether (opposite grippers: a difference of 2), which is no measure of noise.
    """
    differences = []
    for pair in pairs:
        left, right = _trajectories(pair, reference, control)
        if left is not None and right is not None:
            differences.append(motion_difference(left, right)[: _first_chunk(pair)])
    return float(np.percentile(np.concatenate(differences), 99)) if differences else 0.0


def divergences(pairs: Sequence[Pair], reference: Arm, other: Arm, threshold: float) -> dict[str, Any]:
    """Where the two arms of each episode part, in three ways that come one after the other:

    `steps`: arm motions differ by more than `threshold` (`action_noise`; 0 without an A/A arm, so any difference
    at all); `visible_steps`: the grippers are 1 cm apart; `gripper_steps`: one opens and the other closes. Each
    maps an episode to its first such step or None. A quantized policy exceeds rounding noise in its first action, so
    the first says little about success; the others say when the robots did different things.

    {"threshold", "compared", "diverged", "median_step", "visibly_diverged", "median_visible_step", "gripper_diverged",
    "median_gripper_step", "first_chunk_difference", "steps", "visible_steps", "gripper_steps"}, where medians are over
    the episodes that part and `first_chunk_difference` is the median over episodes of the largest difference of an arm
    action in the first executed chunk: the arm's error on observations that both saw, in units of the action.
    """
    steps: dict[str, int | None] = {}
    visible: dict[str, int | None] = {}
    gripper: dict[str, int | None] = {}
    first_chunks = []
    for pair in pairs:
        left, right = _trajectories(pair, reference, other)
        if left is None or right is None:
            continue
        key = str(pair.key)
        steps[key] = first_divergence(left, right, threshold)
        visible[key] = first_apart(left, right, VISIBLE_M)
        gripper[key] = first_opposed_grip(left, right)
        first_chunks.append(motion_difference(left, right)[: _first_chunk(pair)].max(initial=0.0))
    return {
        "threshold": threshold,
        "compared": len(steps),
        "diverged": _parted(steps),
        "median_step": _median(steps),
        "visibly_diverged": _parted(visible),
        "median_visible_step": _median(visible),
        "gripper_diverged": _parted(gripper),
        "median_gripper_step": _median(gripper),
        "first_chunk_difference": float(f"{np.median(first_chunks):.6g}") if first_chunks else None,
        "steps": steps,
        "visible_steps": visible,
        "gripper_steps": gripper,
    }


def _first_chunk(pair: Pair) -> int:
    """A number of steps surely in both arms' first chunk: ⌈steps / policy calls⌉ never exceeds its length."""
    return min(-(-r.steps // max(r.replans, 1)) for r in (pair.reference, pair.other))


def _parted(steps: dict[str, int | None]) -> int:
    return sum(step is not None for step in steps.values())


def _median(steps: dict[str, int | None]) -> float | None:
    found = [step for step in steps.values() if step is not None]
    return float(np.median(found)) if found else None


def _trajectories(pair: Pair, reference: Arm, other: Arm) -> tuple[np.ndarray | None, np.ndarray | None]:
    return (
        read_trajectory(reference.run_dirs[pair.key], pair.reference),
        read_trajectory(other.run_dirs[pair.key], pair.other),
    )
