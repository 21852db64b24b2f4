"""What a quantized policy does to actions, observation by observation, with how sure a few observations make it.

The arm's six numbers and the gripper are apart: the gripper's sign is a decision, and one that changes outweighs every
error of the arm. Errors are skewed, so medians stand for them, with intervals from order statistics, which assume
nothing of their distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import bdtr

from qlibero.documents import JsonObject

ARM, GRIPPER = slice(0, 6), 6  # of an action for LIBERO
FEWEST = 6  # observations; fewer have no 95 % interval of the median


@dataclass(frozen=True)
class ActionError:
    """`arm`: median over observations of the root mean square change of the arm's numbers, in the actions' own units,
    with its 95 % interval (None below 6 observations); `arm_action` the same of the actions themselves;
    `gripper_changed`: how many of `gripper_actions` gripper commands changed their sign; `largest`: change of any
    number."""

    observations: int
    arm: float
    arm95: tuple[float, float] | None
    arm_action: float
    gripper_changed: int
    gripper_actions: int
    largest: float

    def to_json(self) -> JsonObject:
        """Six significant digits; an interval as a list."""
        found = asdict(self)
        return {
            key: [_short(x) for x in value] if isinstance(value, tuple) else _short(value)
            for key, value in found.items()
        }


def arm_error(exact: np.ndarray, found: np.ndarray, steps: int | None = None) -> np.ndarray:
    """(n,) root mean square change of each chunk's first `steps` arm actions; exact, found (n, H, 7)."""
    change = found[:, :steps, ARM].astype(np.float64) - exact[:, :steps, ARM]
    errors: np.ndarray = np.sqrt((change**2).mean((1, 2)))
    return errors


def action_error(exact: np.ndarray, found: np.ndarray, steps: int | None = None) -> ActionError:
    """Of chunks (n, H, 7) with the same observations and noise; `steps`: the actions of a chunk that are executed."""
    errors = arm_error(exact, found, steps)
    size = np.sqrt((exact[:, :steps, ARM].astype(np.float64) ** 2).mean((1, 2)))
    one, other = (np.sign(chunks[:, :steps, GRIPPER]) for chunks in (exact, found))
    change = np.abs(found[:, :steps].astype(np.float64) - exact[:, :steps])
    return ActionError(
        len(exact),
        float(np.median(errors)),
        median_interval(errors),
        float(np.median(size)),
        int((one != other).sum()),
        one.size,
        float(change.max()),
    )


def median_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the median from order statistics (Hahn and Meeker 1991, section 5.2); None below 6 values."""
    ordered, n = np.sort(np.asarray(values, np.float64)), len(values)
    if n < FEWEST:
        return None
    rank = max(k for k in range(n // 2 + 1) if k == 0 or bdtr(k - 1, n, 0.5) <= 0.025)
    return float(ordered[rank - 1]), float(ordered[n - rank])


def between(interval: Sequence[float] | None, digits: int = 4) -> str:
    """`[0.0101, 0.0209]`."""
    return "" if interval is None else f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
