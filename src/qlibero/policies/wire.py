"""openpi's wire format: msgpack with numpy arrays, no pickle, byte-compatible with openpi-client 0.1.2.

    array  → {b"__ndarray__": True, b"data": bytes in C order, b"dtype": dtype.str, b"shape": shape}
    scalar → {b"__npgeneric__": True, b"data": value, b"dtype": dtype.str}

What comes in is checked before it becomes an array: only plain number types (and one text alone, as openpi's clients
may send the prompt), exactly as many bytes as the shape says, and no more items than two frames written as lists have.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import msgpack
import numpy as np

NOT_FINITE = "the policy answered with actions that are not finite"
"""What our server says instead of sending them; to a `RemotePolicy` it is the failure of that one episode."""
Counted = TypeVar("Counted", list[Any], dict[Any, Any])
_KINDS = "biuf"
"""Boolean, signed, unsigned, floating point: neither objects nor anything with structure."""
MAX_DIMENSIONS = 32
_MALFORMED = (msgpack.exceptions.UnpackException, msgpack.exceptions.ExtraData)
MAX_ITEMS = 420_000
"""In all lists and mappings of a message: two frames of 224 px as nested lists have 401,856."""


def pack(message: Any) -> bytes:
    """One message as one binary frame."""
    frame: bytes = msgpack.packb(message, default=_encode)
    return frame


def unpack(frame: bytes) -> Any:
    """Inverse of `pack`. Arrays are read-only views of the frame; copy before writing.

    Raises ValueError, with a message of one short line, on anything odd.
    """
    items = 0

    def count(found: Counted) -> Counted:
        nonlocal items
        items += len(found) + 1
        if items > MAX_ITEMS:
            raise ValueError(f"more than {MAX_ITEMS:,} items")
        return found

    try:
        return msgpack.unpackb(
            frame,
            object_hook=lambda found: _decode(count(found)),
            list_hook=count,
            strict_map_key=False,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
        )
    except (*_MALFORMED, ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"not a message of openpi's protocol: {short(str(error) or type(error).__name__)}") from None


def short(text: str, most: int = 200) -> str:
    """One line of `text`: what a client sends does not decide how much is logged, or sent back."""
    return " ".join((text if len(text) <= most else f"{text[:most]}…").split())


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "VOc":
        raise ValueError(f"arrays of {value.dtype} cannot travel")
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} cannot travel")


def _decode(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        shape, data = _shape(value[b"shape"]), value[b"data"]
        dtype = _type(value[b"dtype"], alone=math.prod(shape) == 1)
        if not isinstance(data, bytes) or math.prod(shape) * dtype.itemsize != len(data):
            size = f"{len(data)} bytes" if isinstance(data, bytes) else f"data of type {type(data).__name__}"
            raise ValueError(f"an array of shape {shape} and type {dtype} is not {size}")
        return np.frombuffer(data, dtype).reshape(shape)
    if b"__npgeneric__" in value:
        number = value[b"data"]
        if not isinstance(number, int | float):
            raise ValueError(f"a number is expected, not {type(number).__name__}")
        return _type(value[b"dtype"]).type(number)
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_DIMENSIONS:
        raise ValueError(f"a shape of at most {MAX_DIMENSIONS} numbers is expected")
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in value):
        raise ValueError("a shape consists of whole numbers")
    return tuple(value)


def _type(name: Any, alone: bool = False) -> np.dtype:
    try:
        dtype = np.dtype(name) if isinstance(name, str) and len(name) < 16 else None
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or dtype.kind not in _KINDS + "U" * alone:
        raise ValueError(f"arrays of type {short(repr(name)[:80], 40)} are not accepted")
    return dtype
