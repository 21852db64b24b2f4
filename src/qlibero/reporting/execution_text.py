"""Measures of execution in words: what they are called and how a shift is written."""

from __future__ import annotations

from qlibero.results.execution import MEASURES, Shift

QUALITY = {
    "time_to_success": "time to success",
    "steps_to_success": "steps, both succeed",
    "path_length_m": "path (m)",
    "gripper_flips": "gripper flips",
    "jerk": "jerk (m/s³)",
}
assert tuple(QUALITY) == MEASURES


def shift_text(shift: Shift) -> str:
    """'+3.1 [+0.4, +5.8]'."""
    if shift.interval95 is None:
        return signed(shift.shift)
    return f"{signed(shift.shift)} [{', '.join(map(signed, shift.interval95))}]"


def signed(x: float) -> str:
    return f"{x:+.2g}".replace("-", "−") if abs(x) < 10 else f"{x:+.0f}".replace("-", "−")
