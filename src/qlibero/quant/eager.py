"""One observation through the plain network, where every linear can be listened to.

The policy's own sampler replays CUDA graphs, fuses and pads, all of which hide or add activations.
Calibration asks the model itself, for one observation at its exact length: no padded token, no masked camera,
every flow step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qlibero.policies.base import Observation

if TYPE_CHECKING:
    from qlibero.policies.pi05.model import Pi05Model
    from qlibero.policies.pi05.policy import Pi05Policy


@torch.no_grad()
def sample_eagerly(policy: Pi05Policy, model: Pi05Model, observation: Observation, noise: np.ndarray) -> Tensor:
    """The network's own action chunk (H, D) float32 for one observation and its noise (H, D); `model` is the
    policy's or a twin of it."""
    policy.sampler  # noqa: B018 (making it lays plain linears out together, which can move last bits: always, or never)
    images, tokens, state = policy.preprocess(observation)
    device, steps = policy.device, policy.flow_steps
    state = torch.from_numpy(np.asarray(state))[None].to(device) if model.config.state_dim else None
    prefix = model.prefix(images[None].to(device), torch.tensor([tokens], device=device), state=state)
    x = torch.from_numpy(np.asarray(noise))[None].to(device)
    for step in range(steps):
        t = torch.full((1,), 1.0 - step / steps, device=device)
        x = x - model.velocity(prefix, x, t) / steps
    return x[0]
