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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from qlibero.errors import UserError
from qlibero.policies.base import Observation

JPEG_QUALITY = 92


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
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self.observations))[:count])
        return Demonstrations(tuple(self.observations[i] for i in chosen), self.source, self.sha256)


def write_demonstrations(path: Path, observations: Sequence[Observation], source: str) -> Path:
    """Write the file; images are (H, W, 3) uint8 and lose a little to JPEG."""
    coded = [_encode(image) for o in observations for image in (o.image, o.wrist_image)]
    np.savez(
        path,
        jpeg=np.frombuffer(b"".join(coded), np.uint8),
        offsets=np.cumsum([0, *map(len, coded)], dtype=np.int64),
        states=np.stack([np.asarray(o.state, np.float32) for o in observations]),
        prompts=np.array([o.prompt for o in observations]),
        source=np.array(source),
    )
    return Path(path)


def read_demonstrations(path: Path) -> Demonstrations:
    """All observations of a file.

    Raises:
        UserError: no such file, or not this format; the message says which array is wrong.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"calibration.path {path}: {error.strerror}; write the .npz of demonstration observations"
        ) from None
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            jpeg, offsets, states, prompts = (arrays[name] for name in ("jpeg", "offsets", "states", "prompts"))
            source = str(arrays["source"])
        images = [
            np.asarray(Image.open(io.BytesIO(jpeg[a:b].tobytes())).convert("RGB"))
            for a, b in zip(offsets[:-1], offsets[1:], strict=True)
        ]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"calibration.path {path} is not a file of demonstration observations: {error}") from None
    if len(images) != 2 * len(states) or states.shape[1:] != (8,) or len(prompts) != len(states):
        raise UserError(
            f"calibration.path {path}: {len(images)} images, {states.shape} states and {len(prompts)} "
            "prompts do not belong together (2n, (n, 8) and n)"
        )
    observations = tuple(
        Observation(images[2 * i], images[2 * i + 1], states[i].astype(np.float32), str(prompts[i]))
        for i in range(len(states))
    )
    return Demonstrations(observations, source, hashlib.sha256(data).hexdigest())


def _encode(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
