"""From camera frames to the network's input, exactly as each family of checkpoints was trained to see them.

`pil`    openpi: PIL's antialiased bilinear on uint8. Stays uint8 until it is where the network runs.
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
from qlibero.frames import FrameFormat

Resize = Literal["pil", "torch", "area"]


def frame_format(size: int, resize: Resize) -> FrameFormat | None:
    """What a simulator can prepare; None for `torch`, whose floats are rounded as torch rounds them."""
    return None if resize == "torch" else FrameFormat(size, resize)


def to_network(image: np.ndarray, size: int, resize: Resize) -> Tensor:
    """(S, S, 3) uint8, or what the policy's `FrameFormat` made of it → (3, size, size) float32 in [-1, 1]; under `pil`
    (size, size, 3) uint8, which `as_floats` completes."""
    prepared = frame_format(size, resize)
    ready = prepared is not None and image.dtype == prepared.dtype and image.shape == (size, size, 3)
    if not ready and (
        image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]
    ):
        raise UserError(f"an observation image must be (S, S, 3) uint8, got {image.shape} {image.dtype}")
    if prepared is None:
        planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255.0
        if image.shape[0] != size:
            planes = F.interpolate(planes, size=(size, size), mode="bilinear", align_corners=False).clamp(-1.0, 1.0)
        return planes[0] * 2.0 - 1.0
    pixels = np.ascontiguousarray(prepared.of(image))
    if resize == "pil":
        return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255.0 * 2.0 - 1.0


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
