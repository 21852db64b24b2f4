"""The safetensors files of a checkpoint: one, or shards with their index; headers first, tensors one at a time.

Strict: a tensor is one of three floating types, stands there under one name, and holds numbers a network can have. A
flipped exponent, a forgotten tensor of zeros or integers under a weight's name are found by reading it once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlibero.console import count_text
from qlibero.errors import UserError, cause
from qlibero.identity import file_sha256
from qlibero.policies.pi05.unreadable import why_no_weights
from qlibero.policies.structured import Open, fit, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATING = ("F32", "BF16", "F16")
LARGEST = 1e6
"""Nothing in a trained network is this large; a flipped exponent bit is."""


class _Index(Open):
    weight_map: Annotated[dict[str, Annotated[str, Field(pattern=r"^[^/\\]+\.safetensors$")]], Field(min_length=1)]


@dataclass(frozen=True)
class Weights:
    """Headers of all files. `files` are the safetensors files in order, `index` names the shards' index, if any."""

    files: tuple[Path, ...]
    index: Path | None
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    file_of: dict[str, Path]

    def __str__(self) -> str:
        return str(self.index or self.files[0])

    @property
    def sha256(self) -> str:
        """Of the file; of shards, of the text that `sha256sum` prints for them in order of their names."""
        if self.index is None:
            return _sha256_once(self.files[0])
        listed = "".join(f"{_sha256_once(file)}  {file.name}\n" for file in self.files)
        return hashlib.sha256(listed.encode()).hexdigest()

    def read(self, wanted: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) on the CPU in the file's dtype for each {key: name in the file}, one at a time."""
        for file in self.files:
            names = {key: name for key, name in wanted.items() if self.file_of[name] == file}
            if names:
                with safe_open(file, framework="pt") as tensors:
                    for key, name in names.items():
                        yield key, tensors.get_tensor(name)


def find_weights(path: Path) -> Weights:
    """The weights of the checkpoint directory `path`; UserError when they are not there or cannot be read, which says
    what is there instead and what to do about it."""
    whole, index = path / WEIGHTS, path / INDEX
    if index.is_file() and whole.is_file():
        raise UserError(f"{path} has both {WEIGHTS} and {INDEX}: one of them is stale; move it away")
    problem = why_no_weights(path, WEIGHTS, INDEX)
    if problem:
        raise UserError(problem)
    files: tuple[Path, ...] = (whole,)
    listed: dict[str, str] | None = None
    if not whole.is_file():
        listed = fit(_Index, read_json(index), str(index)).weight_map
        files = tuple(path / name for name in sorted(set(listed.values())))
        if gone := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{index} names shards that are not there: {', '.join(gone)}; the download is incomplete")
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    file_of: dict[str, Path] = {}
    for file in files:
        for name, (shape, dtype) in header(file).items():
            if name in file_of:
                raise UserError(f"{file}: tensor {name} is also in {file_of[name].name}; which one is meant?")
            if listed is not None and listed.get(name) != file.name:
                raise UserError(f"{file}: tensor {name} is not where {INDEX} says ({listed.get(name, 'nowhere')})")
            shapes[name], dtypes[name], file_of[name] = shape, dtype, file
    if listed is not None and (lost := sorted(listed.keys() - file_of.keys())):
        raise UserError(f"{index}: {count_text(len(lost), 'tensor')} in no shard, first {lost[0]}")
    return Weights(files, index if listed is not None else None, shapes, dtypes, file_of)


def header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name: (shape, dtype)} of a safetensors file. UserError when it cannot be read as one."""
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
            return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except OSError as error:
        raise UserError(f"{file} cannot be read: {cause(error)}") from None
    except (SafetensorError, ValueError, MemoryError, OverflowError) as error:
        raise UserError(
            f"{file} cannot be read as safetensors ({file.stat().st_size} bytes): {error}; "
            "if it was downloaded, the download is incomplete"
        ) from None


def fault_of(tensor: Tensor) -> str | None:
    """What no weight of a trained network can be, or None: "NaN or infinity", "all zeros" (a vector may be: a bias
    never trained), or the absurd size of its largest value. One pass over the tensor; an empty one, or one of another
    type, is not looked at: it fits no network.
    """
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not tensor.numel():
        return None
    low, high = (float(value) for value in torch.aminmax(tensor))
    if not (abs(low) <= torch.finfo(torch.float64).max and abs(high) <= torch.finfo(torch.float64).max):
        return "NaN or infinity"
    if low == high == 0 and tensor.ndim > 1:
        return "all zeros"
    if max(-low, high) > LARGEST:
        return f"values up to {max(-low, high):.0e}"
    return None


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_once(path: Path) -> str:
    about = path.stat()
    return _remembered(path, about.st_ino, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=64)
def _remembered(path: Path, _inode: int, _mtime_ns: int, _size: int) -> str:
    return file_sha256(path)  # seconds for a checkpoint of 7 GB, so once, and once a process where it is brand-new
