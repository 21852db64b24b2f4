"""What a policy is to the rest of qlibero: observations and noise in, a chunk of environment-ready actions out.

The flow noise is an argument, never drawn inside (contract 2), so that every backend denoises the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Observation:
    """One moment of one episode, as LIBERO gives it (after the 180° rotation), before a policy's preprocessing."""

    image: np.ndarray
    """(256, 256, 3) uint8: agentview, upright."""
    wrist_image: np.ndarray
    """(256, 256, 3) uint8: eye-in-hand camera."""
    state: np.ndarray
    """(8,) float32: end effector position (m) 3, axis-angle (rad) 3, gripper joint positions 2."""
    prompt: str
    """The task's language instruction."""


def grey(prompt: str, state: np.ndarray | None = None) -> Observation:
    """An observation of nothing, for calls before the first episode."""
    image = np.full((256, 256, 3), 127, np.uint8)
    return Observation(image, image, np.zeros(8, np.float32) if state is None else state, prompt)


@dataclass(frozen=True)
class Chunk:
    """A policy's answer to a batch of observations."""

    actions: np.ndarray
    """(B, H, 7) float32, ready for `env.step` (un-normalised; gripper -1 open, +1 close). A row that is not finite is a
    policy that has failed: it ends its own episode as a failure, and no other."""
    phases_ms: dict[str, float] = field(default_factory=dict)
    """Wall time of each phase of this call, device-synchronised: preprocess, vision, prefix, flow (ms)."""


class Policy(Protocol):
    """Anything that turns observations and noise into action chunks."""

    name: str
    noise_shape: tuple[int, int]
    """(H, D) of the flow noise of one observation."""
    model: torch.nn.Module | None
    """The network, for quantization; None when it lives in another process."""

    def infer(self, observations: Sequence[Observation], noise: np.ndarray) -> Chunk:
        """`noise` is (B, H, D) float32, one slice an observation. Actions come back in the same order."""
        ...

    def rehearsal(self, prompts: Sequence[str]) -> list[Observation]:
        """Observations that together need all a call with these prompts can need (shapes, kernels, graphs)."""
        ...

    def provenance(self) -> dict[str, Any]:
        """JSON-ready identity: type, checkpoint path and sha256, semantics profile, dtype, device, parameters."""
        ...
