"""Demonstration observations for calibration: one .npz of plain arrays, to travel with a checkpoint.

    jpeg     (bytes,) uint8     all images, JPEG-coded: agentview, wrist, agentview, wrist, …
    offsets  (2n + 1,) int64    image i is jpeg[offsets[i]:offsets[i + 1]]
    states   (n, 8) float32     as in `Observation.state`
    prompts  (n,) unicode       task instructions
    source   () unicode         where they come from; must not be evaluation episodes

Read with allow_pickle=False: the file may come from anywhere.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from qlibero import files
from qlibero.console import count_text
from qlibero.errors import UserError, cause
from qlibero.policies.base import Observation

JPEG_QUALITY = 92
EXPECTED = (
    "Expected is an .npz of demonstration observations with the arrays jpeg, offsets, states, prompts and "
    "source; `qlibero.quant.observations.write_demonstrations(path, observations, source)` writes one from "
    "(image, wrist_image, state, prompt) of any data set"
)
#: array -> kinds of its dtype, dimensions, in words
ARRAYS = {
    "jpeg": ("u", 1, "(bytes,) uint8"),
    "offsets": ("iu", 1, "(2n + 1,) int64"),
    "states": ("f", 2, "(n, 8) float32"),
    "prompts": ("U", 1, "(n,) unicode"),
    "source": ("U", 0, "() unicode"),
}


@dataclass(frozen=True)
class Demonstrations:
    """Observations with what an artifact records of them."""

    observations: tuple[Observation, ...]
    source: str
    sha256: str

    def sample(self, count: int, seed: int) -> Demonstrations:
        """`count` of them (all, if there are no more), drawn without replacement from `seed`, in file order."""
        if count >= len(self.observations):
            return self
        chosen = self.indices(count, seed)
        return Demonstrations(tuple(self.observations[i] for i in chosen), self.source, self.sha256)

    def indices(self, count: int, seed: int) -> list[int]:
        """Which observations `sample` takes."""
        total = len(self.observations)
        if count >= total:
            return list(range(total))
        return sorted(np.random.default_rng(seed).permutation(total)[:count].tolist())


def write_demonstrations(path: Path, observations: Sequence[Observation], source: str) -> Path:
    """Write the file; images are (H, W, 3) uint8 and lose a little to JPEG."""
    coded = [_encode(image) for o in observations for image in (o.image, o.wrist_image)]
    path = Path(path)
    partial = files.beside(path)
    with open(partial, "wb") as file:
        np.savez(
            file,
            jpeg=np.frombuffer(b"".join(coded), np.uint8),
            offsets=np.cumsum([0, *map(len, coded)], dtype=np.int64),
            states=np.stack([np.asarray(o.state, np.float32) for o in observations]),
            prompts=np.array([o.prompt for o in observations]),
            source=np.array(source),
        )
    files.settle(partial, path)
    return path


def read_demonstrations(path: Path) -> Demonstrations:
    """All observations of a file.

    Raises:
        UserError: no such file, not this format, or not finite; the message says which array or observation is
            wrong, what is expected and how to make one.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        what = "a directory" if path.is_dir() else cause(error)
        raise _foreign(path, what) from None
    if not data.startswith(b"PK"):
        raise _foreign(path, _kind(data))
    arrays = _arrays(path, data)
    offsets, jpeg, states, prompts = (arrays[name] for name in ("offsets", "jpeg", "states", "prompts"))
    if len(offsets) != 2 * len(states) + 1 or not len(states) or len(prompts) != len(states):
        raise _foreign(
            path,
            f"{count_text(len(offsets) - 1, 'image')}, {count_text(len(states), 'state')} and "
            f"{count_text(len(prompts), 'prompt')} do not belong together "
            "(2n, n and n, with n ≥ 1)",
        )
    with np.errstate(over="ignore"):
        states = states.astype(np.float32)
    finite = np.isfinite(states).all(1)
    if not finite.all():
        i, odd = int(np.argmin(finite)), len(finite) - int(finite.sum())
        others = f" (and so in {count_text(odd - 1, 'other observation')})" if odd > 1 else ""
        raise UserError(
            f"calibration.path {path}: the state of observation {i} holds {_odd(states[i])}{others}; "
            "transforms cannot be fitted on that: leave such observations out (key `states`)"
        )
    for i in np.flatnonzero((np.diff(offsets) < 1) | (offsets[:-1] < 0) | (offsets[1:] > len(jpeg)))[:1]:
        where = f"offsets {offsets[i]} to {offsets[i + 1]} do not lie in the {len(jpeg)} bytes of jpeg"
        raise UserError(f"{_place(path, i)}: {where}")
    images = [_image(path, jpeg, offsets, i) for i in range(len(offsets) - 1)]
    observations = tuple(
        Observation(images[2 * i], images[2 * i + 1], states[i], str(prompts[i])) for i in range(len(states))
    )
    return Demonstrations(observations, str(arrays["source"]), hashlib.sha256(data).hexdigest())


def _arrays(path: Path, data: bytes) -> dict[str, np.ndarray]:
    """The file's arrays, each of the kind and shape that it must have."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            missing = [name for name in ARRAYS if name not in file.files]
            if missing:
                held = ", ".join(file.files[:8])[:200] or "nothing"
                raise _foreign(path, f"it has no array {', '.join(missing)} (it holds {held})")
            arrays = {}
            for name in ARRAYS:
                try:
                    arrays[name] = file[name]
                except ValueError:  # of Python objects; NumPy's own words advise to unpickle them
                    raise _foreign(path, f"array {name} holds Python objects, which are never loaded") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise _foreign(path, f"it is damaged ({type(error).__name__})") from None
    for name, (kinds, dimensions, said) in ARRAYS.items():
        array = arrays[name]
        if array.dtype.kind not in kinds or array.ndim != dimensions or (name == "states" and array.shape[1] != 8):
            raise _foreign(path, f"array {name} is {array.dtype} {array.shape}, it must be {said}")
    return arrays


def _image(path: Path, jpeg: np.ndarray, offsets: np.ndarray, i: int) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"{_place(path, i)}: its bytes are no image") from None


def _place(path: Path, i: int) -> str:
    return f"calibration.path {path}: image {i} (observation {i // 2}, {('agentview', 'wrist')[i % 2]})"


def _foreign(path: Path, what: str) -> UserError:
    return UserError(f"calibration.path {path} is not a file of demonstration observations: {what}. {EXPECTED}")


def _kind(data: bytes) -> str:
    known = ((b"\x89HDF", "an HDF5 file"), (b"PAR1", "a Parquet file"), (b"\x93NUMPY", "a single NumPy array"))
    return next((name for magic, name in known if data.startswith(magic)), "no .npz file")


def _odd(state: np.ndarray) -> str:
    i = int(np.argmin(np.isfinite(state)))
    return f"{'NaN' if np.isnan(state[i]) else 'an infinity'} (value {i})"


def _encode(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
