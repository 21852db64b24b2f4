"""What `openpi_parity.py` and `lerobot_parity.py` share: our network beside another, same weights and inputs.

Sizes are small (two vision layers, three transformer layers) so that it runs in seconds: three cameras of which
one is masked, ragged prompts padded to the limit, batch 2. Ours is asked as a policy asks it, without the masked camera
and with 32 text positions; theirs computes everything.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model

from qlibero.policies.pi0.family import FAMILY as PI0
from qlibero.policies.pi05.checkpoint import load_model, open_checkpoint
from qlibero.policies.pi05.config import GemmaConfig, SiglipConfig
from qlibero.policies.pi05.family import FAMILY as PI05
from qlibero.policies.pi05.family import Family
from qlibero.policies.pi05.model import Pi05Model, cast, initialize
from qlibero.policies.pi05.sampler import Sampler
from qlibero.policies.pi05.tensor_table import tensor_table

FAMILIES = {"pi05": PI05, "pi0": PI0}
CONFIGS = {
    name: family.config(
        llm=GemmaConfig(64, 3, 96, 8, 32),
        expert=GemmaConfig(48, 3, 64, 8, 32),
        vision=SiglipConfig(64, 2, 96, 16, 14, 56),
        vocab_size=300,
    )
    for name, family in FAMILIES.items()
}
CONFIG = CONFIGS["pi05"]
LIVE = (23, 9)


@dataclass(frozen=True)
class Inputs:
    """One batch; images and cameras a list of one tensor a camera, as both upstreams take them."""

    images: list[torch.Tensor]
    cameras: list[torch.Tensor]
    tokens: torch.Tensor
    token_mask: torch.Tensor
    state: torch.Tensor
    noise: torch.Tensor
    actions: torch.Tensor
    time: torch.Tensor


@dataclass(frozen=True)
class Upstream:
    """Another implementation: its network, how to sample 10 steps from it, its training loss unreduced, and what
    its checkpoint folders hold: the module to save and config.json."""

    model: torch.nn.Module
    sample: Callable[[Inputs], torch.Tensor]
    loss: Callable[[Inputs], torch.Tensor]
    saved: torch.nn.Module
    config: dict[str, Any]


def shrink_paligemma(config: Any) -> Any:
    """A transformers PaliGemma configuration in the sizes of CONFIG."""
    v = config.vision_config
    v.hidden_size, v.num_hidden_layers = CONFIG.vision.width, CONFIG.vision.depth
    v.num_attention_heads, v.intermediate_size = CONFIG.vision.num_heads, CONFIG.vision.mlp_dim
    v.image_size, v.projection_dim = CONFIG.vision.image_size, CONFIG.llm.width
    config.text_config.vocab_size = config._vocab_size = config.image_token_index = CONFIG.vocab_size
    return config


def compare(theirs: Upstream, dtype: str, about: dict[str, Any], family: str = "pi05") -> None:
    """Print how far apart the two are; the last line of stdout is JSON."""
    torch.set_num_threads(1)
    config = CONFIGS[family]
    ours = initialize(FAMILIES[family].model(config), 0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.ndim == 1 or "dense" in name:
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)
    wanted, here = theirs.model.state_dict().keys(), ours.state_dict().keys()
    mismatch = (wanted ^ here) - {name for name in wanted if "lm_head" in name}
    theirs.model.load_state_dict(ours.state_dict(), strict=False)
    loaded_exactly = _through_a_file(theirs, ours, FAMILIES[family])
    cast(ours, getattr(torch, dtype))

    inputs = _inputs(g, family)
    state = inputs.state if config.state_dim else None
    images, cameras = torch.stack(inputs.images, 1), torch.stack(inputs.cameras, 1)
    with torch.no_grad():
        expected, loss = theirs.sample(inputs), theirs.loss(inputs).float()
        prefix = ours.prefix(images, inputs.tokens, inputs.token_mask, state=state, camera_mask=cameras)
        t = inputs.time[:, None, None]
        velocity = ours.velocity(prefix, t * inputs.noise + (1 - t) * inputs.actions, inputs.time)
        our_loss = (velocity - (inputs.noise - inputs.actions)).square()
    got, _ = Sampler(ours)(
        images[:, :2], inputs.tokens[:, :32], inputs.noise, token_mask=inputs.token_mask[:, :32], state=state
    )
    result = {
        **about,
        "family": family,
        "torch": torch.__version__,
        "dtype": dtype,
        "names_that_differ": sorted(mismatch),
        "their_file_loads_exactly": loaded_exactly,
        "sample_max_abs_difference": float((got - expected).abs().max()),
        "sample_largest": float(expected.abs().max()),
        "loss_max_abs_difference": float((our_loss - loss).abs().max()),
        "loss_largest": float(loss.abs().max()),
    }
    for key, value in result.items():
        print(f"{key}: {value}", file=sys.stderr)
    print(json.dumps(result))


def _inputs(g: torch.Generator, family: str) -> Inputs:
    config = CONFIGS[family]
    batch, size, padded = 2, config.vision.image_size, config.max_token_len
    images = torch.rand(batch, 3, 3, size, size, generator=g) * 2 - 1
    images[:, 2] = -1.0
    tokens = torch.randint(1, CONFIG.vocab_size, (batch, padded), generator=g)
    noise = torch.randn(batch, config.action_horizon, config.action_dim, generator=g)
    return Inputs(
        list(images.unbind(1)),
        list(torch.tensor([[True, True, False]] * batch).unbind(1)),
        tokens,
        torch.arange(padded)[None] < torch.tensor(LIVE)[:, None],
        torch.randn(batch, 32, generator=torch.Generator().manual_seed(2)),
        noise,
        torch.randn(noise.shape, generator=g),
        torch.tensor([0.3, 0.85]),
    )


def _through_a_file(theirs: Upstream, ours: Pi05Model, family: Family) -> bool:
    """Save as theirs is saved (safetensors.torch.save_model, tied weights once), read with our strict loader."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(theirs.saved, str(Path(folder) / "model.safetensors"))
        (Path(folder) / "config.json").write_text(json.dumps(theirs.config))
        checkpoint = open_checkpoint(Path(folder), family)
        notes = "; ".join(tensor_table(checkpoint).notes)
        print(f"tensors as they save them: {len(checkpoint.shapes)}; {notes}", file=sys.stderr)
        read = load_model(checkpoint, torch.float32, torch.device("cpu")).state_dict()
    precise = {name: t.float() for name, t in theirs.model.state_dict().items()}
    return checkpoint.config == CONFIGS[family.name] and all(
        torch.equal(read[name], precise[name]) for name in ours.state_dict()
    )
