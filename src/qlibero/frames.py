"""What a policy wants to be given of a camera's frame, and the functions that make it, exact to the last bit.

Simulators bring frames to that form where they render them: one thread feeds the GPU, and must not touch pixels. A
frame that has the form already stays as it is, so a policy applies its own to whatever it is given, and frames may come
either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

Resize = Literal["pil", "area", "torch"]


@dataclass(frozen=True)
class FrameFormat:
    """Square frames of `size` pixels; `pil` gives uint8, `area` float32 in 0…255, `torch` float32 in [-1, 1]."""

    size: int
    resize: Resize

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8 if self.resize == "pil" else np.float32)

    @property
    def nbytes(self) -> int:
        """Of one frame."""
        return self.size * self.size * 3 * self.dtype.itemsize

    def of(self, frame: np.ndarray) -> np.ndarray:
        """(S, S, 3) uint8 → (size, size, 3) of `dtype`; a frame of this format comes back as it is."""
        if frame.shape[0] == self.size and frame.dtype == self.dtype:
            return frame
        return {"pil": resize_pil, "area": resize_area, "torch": resize_torch}[self.resize](frame, self.size)


def resize_pil(image: np.ndarray, size: int) -> np.ndarray:
    """openpi's resize of a square uint8 image: PIL's antialiased bilinear, integers throughout (22 bits of fraction,
    rounded to uint8 between its two passes)."""
    if image.shape[0] == size:
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.BILINEAR))


def resize_area(image: np.ndarray, size: int) -> np.ndarray:
    """The mean of what each target pixel covers, float32 in 0…255: k×k blocks where sizes are multiples, else
    partly covered pixels by their share.

    Every sum is of integers that its type holds exactly, so the result does not depend on an order.
    """
    source = image.shape[0]
    factor, remainder = divmod(source, size)
    if not remainder:
        rows = image[::factor].astype(np.uint32 if factor > 16 else np.uint16)
        for k in range(1, factor):
            np.add(rows, image[k::factor], out=rows)
        total = rows[:, ::factor].copy()
        for k in range(1, factor):
            np.add(total, rows[:, k::factor], out=total)
        return np.asarray(total.astype(np.float32) / np.float32(factor * factor))
    shares = _shares(source, size)
    across = shares @ image.reshape(source, -1).astype(np.float64)
    whole = np.matmul(shares, across.reshape(size, source, 3))
    return np.asarray(whole / source**2, np.float32)


def resize_torch(image: np.ndarray, size: int) -> np.ndarray:
    """LeRobot's: plain bilinear without antialias on floats, in [-1, 1].

    torch itself, because its last bits follow the processor: a simulator that needs this imports it.
    """
    import torch
    import torch.nn.functional as F

    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255.0
    if image.shape[0] != size:
        planes = F.interpolate(planes, size=(size, size), mode="bilinear", align_corners=False).clamp(-1.0, 1.0)
    return np.asarray((planes[0] * 2.0 - 1.0).permute(1, 2, 0))


@cache
def _shares(source: int, target: int) -> np.ndarray:
    """(target, source) float64: how much of each source pixel a target pixel covers, in units of 1/source of
    a target pixel; rows sum to `source`."""
    edges = np.arange(target + 1) * source  # in units of 1/target of a source pixel
    pixels = np.arange(source + 1) * target
    covered = np.minimum(edges[1:, None], pixels[None, 1:]) - np.maximum(edges[:-1, None], pixels[None, :-1])
    return np.asarray(np.maximum(covered, 0), np.float64)
