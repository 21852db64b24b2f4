"""openpi's wire format: msgpack with numpy arrays, no pickle, byte-compatible with openpi-client 0.1.2.

    array  → {b"__ndarray__": True, b"data": bytes in C order, b"dtype": dtype.str, b"shape": shape}
    scalar → {b"__npgeneric__": True, b"data": value, b"dtype": dtype.str}

What comes in is checked before it becomes an array: only plain number types, and exactly as many bytes as the
shape says.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np

_KINDS = "biuf"
"""Boolean, signed, unsigned, floating point: neither objects nor anything with structure."""


def pack(message: Any) -> bytes:
    """One message as one binary frame."""
    return msgpack.packb(message, default=_encode)


def unpack(frame: bytes) -> Any:
    """Inverse of `pack`. Arrays are read-only views of the frame; copy before writing. `ValueError` on anything odd."""
    try:
        return msgpack.unpackb(frame, object_hook=_decode, strict_map_key=False)
    except (msgpack.exceptions.UnpackException, msgpack.exceptions.ExtraData, TypeError, KeyError) as error:
        raise ValueError(f"not a message of openpi's protocol: {error!r}") from None


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


def _decode(value: dict) -> Any:
    if b"__ndarray__" in value:
        dtype, shape, data = _number_type(value[b"dtype"]), tuple(value[b"shape"]), value[b"data"]
        if not all(isinstance(n, int) and n >= 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} and type {dtype} is not {len(data)} bytes")
        return np.frombuffer(data, dtype).reshape(shape)
    if b"__npgeneric__" in value:
        return _number_type(value[b"dtype"]).type(value[b"data"])
    return value


def _number_type(name: Any) -> np.dtype:
    dtype = np.dtype(name) if isinstance(name, str) else None
    if dtype is None or dtype.kind not in _KINDS:
        raise ValueError(f"arrays of type {name!r} are not accepted")
    return dtype
