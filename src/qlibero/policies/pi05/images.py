"""From camera frames to the network's input, exactly as each family of checkpoints was trained to see them.

`pil`    openpi: PIL's antialiased bilinear on uint8, rounded to uint8 between its two passes. Done here in
         integers, with PIL's fixed-point coefficients: the same to the last bit, without PIL.
`torch`  LeRobot: plain bilinear without antialias on floats.
`area`   our compact policies: the exact mean of the pixels that a target pixel covers (2×2 of LIBERO's 256 px).

Frames are square, so the padding of the original functions never applies; anything else is refused.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qlibero.errors import UserError

Resize = Literal["pil", "torch", "area"]
_PRECISION = 22
"""Bits of PIL's fixed-point coefficients (32 - 8 - 2)."""


def to_network(image: np.ndarray, size: int, resize: Resize) -> Tensor:
    """(S, S, 3) uint8 → (3, size, size) float32 in [-1, 1]."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
        raise UserError(f"an observation image must be (S, S, 3) uint8, got {image.shape} {image.dtype}")
    if resize == "pil":
        pixels = torch.from_numpy(resize_pil(image, size)).permute(2, 0, 1).float()
    elif resize == "area":
        pixels = torch.from_numpy(resize_area(image, size)).permute(2, 0, 1)
    else:
        planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255.0
        if image.shape[0] != size:
            planes = F.interpolate(planes, size=(size, size), mode="bilinear", align_corners=False).clamp(-1.0, 1.0)
        return planes[0] * 2.0 - 1.0
    return pixels / 255.0 * 2.0 - 1.0


def resize_area(image: np.ndarray, size: int) -> np.ndarray:
    """The mean of what each target pixel covers, float32 in 0…255: k×k blocks where sizes are multiples, else
    partly covered pixels by their share.

    Every sum is of integers that its type holds exactly, so the result does not depend on an order.
    """
    source = image.shape[0]
    factor, remainder = divmod(source, size)
    if not remainder:
        total = np.zeros((size, size, 3), np.uint32)
        for row in range(factor):
            for column in range(factor):
                total += image[row::factor, column::factor]
        return total.astype(np.float32) / np.float32(factor * factor)
    shares = _shares(source, size)
    rows = shares @ image.reshape(source, -1).astype(np.float64)
    total = np.matmul(shares, rows.reshape(size, source, 3))
    return (total / source**2).astype(np.float32)


@cache
def _shares(source: int, target: int) -> np.ndarray:
    """(target, source) float64: how much of each source pixel a target pixel covers, in units of 1/source of
    a target pixel; rows sum to `source`."""
    edges = np.arange(target + 1) * source  # in units of 1/target of a source pixel
    pixels = np.arange(source + 1) * target
    covered = np.minimum(edges[1:, None], pixels[None, 1:]) - np.maximum(edges[:-1, None], pixels[None, :-1])
    return np.maximum(covered, 0).astype(np.float64)


def resize_pil(image: np.ndarray, size: int) -> np.ndarray:
    """`PIL.Image.resize((size, size), BILINEAR)` of a square uint8 image, bit for bit."""
    if image.shape[0] == size:
        return image
    rows = _pil_pass(image.transpose(1, 0, 2), size)  # horizontal first, as PIL does
    return np.ascontiguousarray(_pil_pass(rows.transpose(1, 0, 2), size))


def _pil_pass(lines: np.ndarray, size: int) -> np.ndarray:
    """(source, n, 3) uint8 → (size, n, 3) uint8. Coefficients sum to 2²², so every sum stays below 2³¹."""
    first, taps = _pil_taps(lines.shape[0], size)
    total = np.full((size, *lines.shape[1:]), 1 << (_PRECISION - 1), np.int32)
    for k in range(taps.shape[1]):
        source = np.minimum(first + k, lines.shape[0] - 1)  # past the edge the coefficient is 0
        total += taps[:, k, None, None] * lines[source].astype(np.int32)
    return (total >> _PRECISION).clip(0, 255).astype(np.uint8)


@cache
def _pil_taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """PIL's bilinear (triangle) filter: first source index (target,), fixed-point coefficients (target, taps)."""
    scale = source / target
    support = max(scale, 1.0)
    starts, rows = [], []
    for i in range(target):
        center = (i + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), source)
        taps = np.array([max(0.0, 1.0 - abs((x - center + 0.5) / support)) for x in range(first, last)])
        starts.append(first)
        rows.append(np.floor(taps / taps.sum() * (1 << _PRECISION) + 0.5).astype(np.int32))
    table = np.zeros((target, max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return np.array(starts), table
