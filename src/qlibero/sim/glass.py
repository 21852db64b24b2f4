"""The loop of glass noise, compiled: pixel by pixel, for each takes what the ones before it have left."""

from __future__ import annotations

from typing import Any

from numba import njit
from numpy.typing import NDArray


@njit(cache=True)  # type: ignore[untyped-decorator]
def shuffle(frame: NDArray[Any], moves: NDArray[Any], margin: int) -> None:
    """Give each pixel of `frame` (R, R, 3) the colour `moves` away from it, from the last row and column on, in place.

    `moves` (R - 2 margin, R - 2 margin, 2): columns and rows, each in ±margin; a margin stays on all sides.
    """
    last = frame.shape[0] - margin
    for i in range(moves.shape[0]):
        for j in range(moves.shape[1]):
            row, column = last - i, last - j
            dx, dy = moves[i, j]
            for channel in range(3):
                frame[row, column, channel] = frame[row + dy, column + dx, channel]
