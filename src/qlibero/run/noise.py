"""One noise for every backend (contract 2).

A flow-matching policy turns noise into actions, so two backends can be paired only if they denoise the same noise.
The noise of a policy call is therefore a pure function of the episode's key and of the index of the call within
the episode; it is drawn on the CPU whatever device the policy runs on, and knows nothing of arms, batches or workers.
"""

from __future__ import annotations

import hashlib

import numpy as np

from qlibero.episode_key import EpisodeKey

# Part of what is hashed: a change of the recipe must change this name, for old and new episodes are then no pairs.
RECIPE = "qlibero-noise-1"


def call_noise(key: EpisodeKey, call: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise of policy call `call` (0, 1, …) of episode `key`: float32 of `shape`, e.g. (H, D)."""
    digest = hashlib.sha256(f"{RECIPE}/{key}/{call}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.standard_normal(shape, dtype=np.float32)
