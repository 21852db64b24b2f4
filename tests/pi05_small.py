"""Small networks, observations and statistics that the policy tests share; nothing here is asserted."""

from __future__ import annotations

import numpy as np
import torch

from qlibero.policies.base import Observation
from qlibero.policies.pi05.config import ConvConfig, GemmaConfig, Pi05Config, SiglipConfig
from qlibero.policies.pi05.model import Pi05Model, initialize

PROMPTS = (
    "pick up the milk and place it in the basket",
    "open the top drawer and put the bowl inside",
    "turn on the stove",
)
STATISTICS = {
    "state": {
        "mean": [0.1 * i for i in range(8)],
        "std": [0.5 + 0.1 * i for i in range(8)],
        "q01": [-1.0 - 0.1 * i for i in range(8)],
        "q99": [1.0 + 0.2 * i for i in range(8)],
    },
    "actions": {
        "mean": [0.01 * i for i in range(7)],
        "std": [0.3 + 0.05 * i for i in range(7)],
        "q01": [-0.9] * 6 + [-1.0],
        "q99": [0.8] * 6 + [1.0],
    },
}


def conv_config(**changes) -> Pi05Config:
    """A compact policy of about 0.5 M parameters: convolutional towers, a state token."""
    values = dict(
        llm=GemmaConfig(64, 3, 96, 4, 16),
        expert=GemmaConfig(48, 3, 64, 4, 16),
        vision=ConvConfig((16, 16, 24), 32, keypoints=3),
        vocab_size=96,
        action_dim=7,
        state_dim=8,
        max_token_len=32,
    )
    return Pi05Config(**{**values, **changes})


def siglip_config(**changes) -> Pi05Config:
    """openpi's shape in miniature: SigLIP tower at 28 px, 32 action dimensions, no state token."""
    values = dict(
        llm=GemmaConfig(64, 3, 96, 4, 16),
        expert=GemmaConfig(48, 3, 64, 4, 16),
        vision=SiglipConfig(32, 2, 48, 16, 14, 28),
        vocab_size=300,
        max_token_len=200,
    )
    return Pi05Config(**{**values, **changes})


def random_model(config: Pi05Config, seed: int = 0, model: type[Pi05Model] = Pi05Model) -> Pi05Model:
    """Every tensor random, norms and adaptive norms too, so that no part of the network is the identity."""
    made = initialize(model(config), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1 or "dense" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made.eval()


def random_inputs(
    config: Pi05Config, batch: int, text: int, seed: int = 0, cameras: int = 2
) -> dict[str, torch.Tensor]:
    """images, tokens, state (or None) and noise for `batch` rows."""
    g = torch.Generator().manual_seed(seed)
    size = config.vision.image_size
    return {
        "images": torch.rand(batch, cameras, 3, size, size, generator=g) * 2 - 1,
        "tokens": torch.randint(1, config.vocab_size, (batch, text), generator=g),
        "state": torch.randn(batch, config.state_dim, generator=g) if config.state_dim else None,
        "noise": torch.randn(batch, config.action_horizon, config.action_dim, generator=g),
    }


def observations(count: int, seed: int = 0) -> list[Observation]:
    """Random frames and states with instructions of different lengths."""
    r = np.random.default_rng(seed)
    return [
        Observation(
            r.integers(0, 256, (256, 256, 3), dtype=np.uint8),
            r.integers(0, 256, (256, 256, 3), dtype=np.uint8),
            r.normal(size=8).astype(np.float32),
            PROMPTS[i % len(PROMPTS)],
        )
        for i in range(count)
    ]


def noises(count: int, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """(count, H, D) float32."""
    return np.random.default_rng(seed + 1000).normal(size=(count, *shape)).astype(np.float32)
