"""Normalisation of states and actions, in the two modes and the two spellings (openpi's, LeRobot's) that exist.

A policy without its statistics is not a policy: reading them is strict, and there is no default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from qlibero.documents import JsonObject
from qlibero.errors import UserError

Mode = Literal["quantile", "mean_std"]


@dataclass(frozen=True)
class Statistics:
    """Per-dimension statistics of one quantity, float64. `low`/`high` are q01/q99 (quantile mode) or mean/std."""

    mode: Mode
    low: np.ndarray
    high: np.ndarray
    epsilon: float
    """openpi adds 1e-6 to the spread in both directions; LeRobot 1e-8 to std when normalising, nothing to
    quantiles."""
    epsilon_inverse: float

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise UserError(f"normalisation mode {self.mode!r} is not known; known: {', '.join(get_args(Mode))}")
        for name, values in (("low", self.low), ("high", self.high)):
            if values.ndim != 1 or not np.isfinite(values).all():
                raise UserError(f"normalisation statistics: {name} is not a finite vector: {values}")
        if self.low.shape != self.high.shape:
            raise UserError(f"normalisation statistics: lengths differ, {len(self.low)} and {len(self.high)}")

    def _spread(self, epsilon: float) -> np.ndarray:
        spread: np.ndarray = (self.high - self.low if self.mode == "quantile" else self.high) + epsilon
        spread[spread == 0] = 1e-8
        return spread

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """x (..., n ≤ dims) → network units, float32."""
        n = x.shape[-1]
        y = (np.asarray(x, np.float64) - self.low[:n]) / self._spread(self.epsilon)[:n]
        unit: np.ndarray = y * 2.0 - 1.0 if self.mode == "quantile" else y
        return unit.astype(np.float32)

    def denormalize(self, y: np.ndarray) -> np.ndarray:
        """Network units (..., n) → environment units, float32; dimensions beyond the statistics pass unchanged."""
        y = np.asarray(y, np.float64)
        n = min(len(self.low), y.shape[-1])
        unit = (y[..., :n] + 1.0) / 2.0 if self.mode == "quantile" else y[..., :n]
        x = unit * self._spread(self.epsilon_inverse)[:n] + self.low[:n]
        return np.concatenate([x, y[..., n:]], -1).astype(np.float32)


def from_openpi(entry: JsonObject, mode: Mode, where: str) -> Statistics:
    """From one entry ("state" or "actions") of `norm_stats.json`."""
    return _read(entry, mode, where, 1e-6, 1e-6)


def from_lerobot(entry: JsonObject, mode: Mode, where: str) -> Statistics:
    """From the tensors `<feature>.{mean,std,q01,q99}` of a LeRobot normaliser file."""
    return _read(entry, mode, where, 1e-8 if mode == "mean_std" else 0.0, 0.0)


def _read(entry: JsonObject, mode: Mode, where: str, epsilon: float, epsilon_inverse: float) -> Statistics:
    keys = ("q01", "q99") if mode == "quantile" else ("mean", "std")
    missing = [key for key in keys if entry.get(key) is None]
    if missing:
        raise UserError(
            f"{where}: {mode} normalisation needs {' and '.join(keys)}, missing: {', '.join(missing)}; "
            f"found: {', '.join(sorted(key for key in entry if entry[key] is not None)) or 'nothing'}"
        )
    low, high = (np.asarray(entry[key], np.float64) for key in keys)
    return Statistics(mode, low, high, epsilon, epsilon_inverse)
