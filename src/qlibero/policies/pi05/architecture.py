"""The sizes of a network with openpi's names, read off its tensors.

openpi's and LeRobot's config.json name variants ("gemma_2b"), not sizes, and are not always there; the tensors
cannot be wrong about themselves.
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

from qlibero.console import count_text
from qlibero.errors import UserError
from qlibero.policies.pi05.config import Pi05Config
from qlibero.policies.pi05.unreadable import other_network

if TYPE_CHECKING:
    from qlibero.policies.pi05.family import Family

EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
TIED = "paligemma_with_expert.paligemma.lm_head.weight"
"""Where openpi's converter saves the embedding when it stores tied weights once."""


_PREFIXES = ("model.", "module.", "_orig_mod.")
"""What LeRobot, DistributedDataParallel and torch.compile put before every name, alone or together."""


def strip(name: str) -> str:
    """A tensor's name as openpi writes it, without what wrappers put before it (a compiled part: inside it, too)."""
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name.replace("._orig_mod.", ".")


def architecture(shapes: dict[str, tuple[int, ...]], action_horizon: int, where: str, family: Family) -> Pi05Config:
    """Sizes of the network that tensors of these names and shapes make; head_dim is k_proj's height, because there is
    one key/value head. `UserError` when a tensor that tells is missing, or tells what cannot be."""
    names = {strip(name): shape for name, shape in shapes.items()}

    def shape(name: str, dimensions: int = 2) -> tuple[int, ...]:
        if name not in names:
            raise UserError(
                f"{where}: tensor {name} is missing; "
                + (
                    other_network(names, family.name)
                    or f"this is not a {family.title} checkpoint with openpi's names "
                    f"({count_text(len(names), 'tensor')}, first: {next(iter(sorted(names)), 'none')})"
                )
            )
        if len(names[name]) != dimensions or 0 in names[name]:
            raise UserError(
                f"{where}: tensor {name} has shape {names[name]}; it should have {count_text(dimensions, 'dimension')}"
            )
        return names[name]

    def depth(stem: str) -> int:
        layers = [name[len(stem) :].split(".")[0] for name in names if name.startswith(stem)]
        if strange := [layer for layer in layers if not (layer.isdecimal() and layer.isascii() and len(layer) < 5)]:
            raise UserError(f"{where}: {stem}{strange[0]} is no layer of a {family.title}")
        return 1 + max(map(int, layers), default=-1)

    def stack(stem: str) -> dict[str, int]:
        query, key = (
            shape(f"{stem}layers.0.self_attn.q_proj.weight"),
            shape(f"{stem}layers.0.self_attn.k_proj.weight"),
        )
        return {
            "width": query[1],
            "depth": depth(f"{stem}layers."),
            "mlp_dim": shape(f"{stem}layers.0.mlp.gate_proj.weight")[0],
            "num_heads": query[0] // key[0],
            "head_dim": key[0],
        }

    pali, vit = (
        "paligemma_with_expert.paligemma.model.",
        "paligemma_with_expert.paligemma.model.vision_tower.vision_model.",
    )
    llm, expert = stack(f"{pali}language_model."), stack("paligemma_with_expert.gemma_expert.model.")
    if other := other_network(names, family.name):
        raise UserError(f"{where}: {other}")
    patch = shape(f"{vit}embeddings.patch_embedding.weight", 4)
    positions = shape(f"{vit}embeddings.position_embedding.weight")[0]
    vision = {
        "type": "siglip",
        "width": patch[0],
        "depth": depth(f"{vit}encoder.layers."),
        "mlp_dim": shape(f"{vit}encoder.layers.0.mlp.fc1.weight")[0],
        "num_heads": 16,
        "patch": patch[2],
        "image_size": isqrt(positions) * patch[2],
    }
    return family.config.from_dict(
        {
            "llm": llm,
            "expert": expert,
            "vision": vision,
            "vocab_size": shape(EMBEDDING if EMBEDDING in names else TIED)[0],
            "action_dim": shape("action_in_proj.weight")[1],
            "action_horizon": action_horizon,
            **({"state_dim": shape("state_proj.weight")[1]} if family.config.suffix_state_tokens else {}),
        },
        where,
    )
