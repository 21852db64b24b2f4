"""The sizes of a network with openpi's names, read off its tensors.

openpi's and LeRobot's config.json name variants ("gemma_2b"), not sizes, and are not always there; the tensors
cannot be wrong about themselves.
"""

from __future__ import annotations

from pathlib import Path

from qlibero.errors import UserError
from qlibero.policies.pi05.config import GemmaConfig, Pi05Config, SiglipConfig

EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
TIED = "paligemma_with_expert.paligemma.lm_head.weight"
"""Where openpi's converter saves the embedding when it stores tied weights once."""


def strip(name: str) -> str:
    """A tensor's name without LeRobot's prefix."""
    return name.removeprefix("model.")


def architecture(shapes: dict[str, tuple[int, ...]], action_horizon: int, where: Path) -> Pi05Config:
    """Sizes of the network that tensors of these names and shapes make; head_dim is k_proj's height, because there is
    one key/value head. `UserError` when a tensor that tells is missing."""
    names = {strip(name): shape for name, shape in shapes.items()}

    def shape(name: str) -> tuple[int, ...]:
        if name not in names:
            raise UserError(
                f"{where}: tensor {name} is missing; this is not a pi0.5 checkpoint with openpi's names "
                f"({len(names)} tensors, first: {next(iter(sorted(names)), 'none')})"
            )
        return names[name]

    def depth(stem: str) -> int:
        return 1 + max((int(name[len(stem) :].split(".")[0]) for name in names if name.startswith(stem)), default=-1)

    def stack(stem: str) -> GemmaConfig:
        query, key = (
            shape(f"{stem}layers.0.self_attn.q_proj.weight"),
            shape(f"{stem}layers.0.self_attn.k_proj.weight"),
        )
        return GemmaConfig(
            width=query[1],
            depth=depth(f"{stem}layers."),
            mlp_dim=shape(f"{stem}layers.0.mlp.gate_proj.weight")[0],
            num_heads=query[0] // key[0],
            head_dim=key[0],
        )

    pali, vit = (
        "paligemma_with_expert.paligemma.model.",
        "paligemma_with_expert.paligemma.model.vision_tower.vision_model.",
    )
    llm, expert = stack(f"{pali}language_model."), stack("paligemma_with_expert.gemma_expert.model.")
    patch = shape(f"{vit}embeddings.patch_embedding.weight")
    positions = shape(f"{vit}embeddings.position_embedding.weight")[0]
    vision = SiglipConfig(
        width=patch[0],
        depth=depth(f"{vit}encoder.layers."),
        mlp_dim=shape(f"{vit}encoder.layers.0.mlp.fc1.weight")[0],
        num_heads=16,
        patch=patch[2],
        image_size=int(positions**0.5) * patch[2],
    )
    vocab = names.get(EMBEDDING) or shape(TIED)
    return Pi05Config(
        llm=llm,
        expert=expert,
        vision=vision,
        vocab_size=vocab[0],
        action_dim=shape("action_in_proj.weight")[1],
        action_horizon=action_horizon,
    )
