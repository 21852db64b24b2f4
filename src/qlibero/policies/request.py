"""From the keys of a client's request to an observation and its noise; what cannot be computed is refused here.

Requests of several clients share a batch. Whatever is wrong with one of them must come to light before it
stands beside the others, and the answer must name the key.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qlibero.documents import JsonObject
from qlibero.policies.base import Observation

IMAGES = ("observation/image", "observation/wrist_image")
STATE, PROMPT = "observation/state", "prompt"
MAX_CHARACTERS = 4096
"""Of a prompt; LIBERO's longest instruction has 104."""


def read_observation(request: Any) -> Observation:
    """An observation from openpi's LIBERO keys. Images are square, (S, S, 3) or (3, S, S), uint8 or float 0…1, as
    openpi allows; the state is 8 finite numbers. `ValueError` names the key."""
    keys = (*IMAGES, STATE, PROMPT)
    missing = [key for key in keys if not isinstance(request, dict) or key not in request]
    if missing:
        raise ValueError(f"the request lacks {', '.join(missing)}")
    state = _finite(request[STATE], STATE, (8,))
    image, wrist_image = (_image(request[key], key) for key in IMAGES)
    return Observation(image, wrist_image, state, _prompt(request[PROMPT]))


def read_noise(request: JsonObject, shape: tuple[int, int]) -> np.ndarray | None:
    """The request's own flow noise, float32 of `shape`; None when it brings none."""
    return None if request.get("noise") is None else _finite(request["noise"], "noise", shape)


def _prompt(value: Any) -> str:
    """A text, or an array of one text, as openpi's own transforms accept it."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if not isinstance(value, str):
        raise ValueError(f"{PROMPT} is {type(value).__name__}, expected text")
    if len(value) > MAX_CHARACTERS:
        raise ValueError(f"{PROMPT} has {len(value):,} characters, at most {MAX_CHARACTERS:,} are read")
    return value


def _finite(value: Any, key: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        numbers = np.asarray(value, np.float32)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{key} does not consist of numbers, this policy takes {shape} of them") from None
    if numbers.shape != shape:
        raise ValueError(f"{key} has shape {numbers.shape}, this policy takes {shape}")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{key} holds NaN or infinity")
    return numbers


def _image(value: Any, key: str) -> np.ndarray:
    try:
        image = np.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{key} is no array, expected (S, S, 3)") from None
    if image.ndim == 3 and image.shape[0] == 3 != image.shape[2]:
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1] or image.size == 0:
        raise ValueError(f"{key} has shape {np.shape(value)}, expected (S, S, 3)")
    if np.issubdtype(image.dtype, np.floating):
        if not ((image >= 0) & (image <= 1)).all():
            raise ValueError(f"{key} is {image.dtype} with values outside 0…1")
        image = (255 * image).astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(f"{key} is {image.dtype}, expected uint8, or float in 0…1")
    return np.ascontiguousarray(image)
