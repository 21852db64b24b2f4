"""From camera frames to the network's input, exactly as each family of checkpoints was trained to see them.

`pil`    openpi: PIL's antialiased bilinear on uint8. Stays uint8 until it is where the network runs.
`torch`  LeRobot: plain bilinear without antialias on floats, whose last bits are torch's own.
`area`   our compact policies: the exact mean of the pixels that a target pixel covers (2×2 of LIBERO's 256 px).

Frames are square, so the padding of the original functions never applies; anything else is refused.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from qlibero.errors import UserError
from qlibero.frames import FrameFormat


def to_network(image: np.ndarray, wanted: FrameFormat) -> Tensor:
    """(S, S, 3) uint8, or what `wanted` made of it → (3, size, size) float32 in [-1, 1]; under `pil` (size, size, 3)
    uint8, which `as_floats` completes."""
    size = wanted.size
    ready = image.dtype == wanted.dtype and image.shape == (size, size, 3)
    if not ready and (
        image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]
    ):
        raise UserError(f"an observation image must be (S, S, 3) uint8, got {image.shape} {image.dtype}")
    pixels = np.ascontiguousarray(wanted.of(image))
    if wanted.resize == "pil":
        return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
    planes = torch.from_numpy(pixels).permute(2, 0, 1)
    return planes if wanted.resize == "torch" else planes / 255.0 * 2.0 - 1.0


def as_floats(images: Tensor) -> Tensor:
    """(…, size, size, 3) uint8 → (…, 3, size, size) float32 in [-1, 1] on the same device; floats as they are.

    Looked up, not computed: every device gives the bits that the CPU's x / 255 · 2 - 1 has.
    """
    if images.dtype != torch.uint8:
        return images
    return _levels(images.device)[images.int()].movedim(-1, -3)


@cache
def _levels(device: torch.device) -> Tensor:
    """(256,) float32: what each pixel value becomes."""
    return (torch.arange(256).float() / 255.0 * 2.0 - 1.0).to(device)
