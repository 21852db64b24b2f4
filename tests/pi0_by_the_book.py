"""pi0 written down from openpi's formulas, in float64, with nothing of qlibero: what `test_pi0.py` is held against.

One joint pass over [images | text | state | actions] for each flow step, under openpi's block-causal mask, every layer
of both stacks whole; no prefix is kept, no state is run alone, nothing is padded away.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LLM = "paligemma_with_expert.paligemma.model.language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
TOWER = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear"


def actions(w: dict[str, Tensor], images: Tensor, tokens: Tensor, live: Tensor, state: Tensor, noise: Tensor) -> Tensor:
    """Ten flow steps. images (B, cameras, 3, S, S), tokens and live (B, T), state (B, 32), noise (B, H, D)."""
    w = {name: tensor.double() for name, tensor in w.items()}
    batch, horizon = noise.shape[:2]
    seen = torch.cat([_linear(w, PROJECTOR, _tower(w, image.double())) for image in images.unbind(1)], 1)
    width = w[f"{LLM}embed_tokens.weight"].shape[1]
    prefix = torch.cat([seen, w[f"{LLM}embed_tokens.weight"][tokens] * math.sqrt(width)], 1)
    there = torch.cat([torch.ones(batch, seen.shape[1], dtype=torch.bool), live], 1)
    there = torch.cat([there, torch.ones(batch, 1 + horizon, dtype=torch.bool)], 1)
    block = torch.tensor([0] * prefix.shape[1] + [1] + [2] * horizon)
    may = (block[None, :] <= block[:, None])[None] & there[:, None, :] & there[:, :, None]
    positions = there.cumsum(1) - 1
    x = noise.double()
    for step in range(10):
        time = _sinusoids(1.0 - step / 10, w["action_in_proj.weight"].shape[0]).expand(batch, horizon, -1)
        mixed = torch.cat([_linear(w, "action_in_proj", x), time], -1)
        acts = _linear(w, "action_time_mlp_out", F.silu(_linear(w, "action_time_mlp_in", mixed)))
        suffix = torch.cat([_linear(w, "state_proj", state.double())[:, None], acts], 1)
        out = _stacks(w, prefix, suffix, may, positions)[:, 1:]
        x = x - _linear(w, "action_out_proj", out) / 10
    return x


def _stacks(w: dict[str, Tensor], prefix: Tensor, suffix: Tensor, may: Tensor, positions: Tensor) -> Tensor:
    split, layer = prefix.shape[1], 0
    while f"{LLM}layers.{layer}.self_attn.q_proj.weight" in w:
        stems = f"{LLM}layers.{layer}.", f"{EXPERT}layers.{layer}."
        streams = prefix, suffix
        normed = [_norm(w, f"{stem}input_layernorm", x) for stem, x in zip(stems, streams, strict=True)]
        q, k, v = (
            torch.cat([_linear(w, f"{stem}self_attn.{name}_proj", x) for stem, x in zip(stems, normed, strict=True)], 1)
            for name in "qkv"
        )
        dim = k.shape[-1]
        q = _rotated(q.unflatten(-1, (-1, dim)), positions)  # (B, T, heads, d); one key/value head for all
        k = _rotated(k[:, :, None], positions)[:, :, 0]
        logits = torch.einsum("bthd,bsd->bhts", q, k) / math.sqrt(dim)
        attended = torch.einsum("bhts,bsd->bthd", logits.masked_fill(~may[:, None], -1e30).softmax(-1), v).flatten(2)
        after = []
        for stem, x, part in zip(stems, streams, (attended[:, :split], attended[:, split:]), strict=True):
            x = x + _linear(w, f"{stem}self_attn.o_proj", part)
            y = _norm(w, f"{stem}post_attention_layernorm", x)
            gate = F.gelu(_linear(w, f"{stem}mlp.gate_proj", y), approximate="tanh")
            after.append(x + _linear(w, f"{stem}mlp.down_proj", gate * _linear(w, f"{stem}mlp.up_proj", y)))
        prefix, suffix = after
        layer += 1
    return _norm(w, f"{EXPERT}norm", suffix)


def _tower(w: dict[str, Tensor], image: Tensor, heads: int = 16) -> Tensor:
    patch = w[f"{TOWER}embeddings.patch_embedding.weight"]
    x = F.conv2d(image, patch, w[f"{TOWER}embeddings.patch_embedding.bias"], stride=patch.shape[-1])
    x = x.flatten(2).transpose(1, 2) + w[f"{TOWER}embeddings.position_embedding.weight"]
    layer = 0
    while f"{TOWER}encoder.layers.{layer}.layer_norm1.weight" in w:
        stem = f"{TOWER}encoder.layers.{layer}."
        y = _layer_norm(w, f"{stem}layer_norm1", x)
        q, k, v = (_linear(w, f"{stem}self_attn.{n}_proj", y).unflatten(-1, (heads, -1)) for n in "qkv")
        logits = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
        x = x + _linear(
            w, f"{stem}self_attn.out_proj", torch.einsum("bhts,bshd->bthd", logits.softmax(-1), v).flatten(2)
        )
        y = F.gelu(_linear(w, f"{stem}mlp.fc1", _layer_norm(w, f"{stem}layer_norm2", x)), approximate="tanh")
        x = x + _linear(w, f"{stem}mlp.fc2", y)
        layer += 1
    return _layer_norm(w, f"{TOWER}post_layernorm", x)


def _linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _layer_norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def _norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + w[f"{name}.weight"])


def _rotated(x: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None].double() / 10_000.0 ** (torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def _sinusoids(t: float, width: int) -> Tensor:
    periods = 4e-3 * (4.0 / 4e-3) ** torch.linspace(0, 1, width // 2, dtype=torch.float64)
    angle = 2 * math.pi * t / periods
    return torch.cat([angle.sin(), angle.cos()])
