"""pi0.5 in plain PyTorch: one class for the compact embedded policy and for the real 3.35 B checkpoint.

State-dict names equal openpi's `PI0Pytorch(pi05=True)`. The network is two functions, both differentiable:

    prefix = model.prefix(images, tokens, token_mask, state=…)      # once a chunk: vision and language model
    v = model.velocity(prefix, x_t, t)                              # once a flow step: action expert

Training calls `velocity` with several flow samples a prefix (rows of `x_t` = K × rows of the prefix), which
spreads the cost of the vision tower. Inference should use `sampler.Sampler`, which does the same mathematics
with less work.

    flow: x = noise at t = 1; x ← x - v(x, t)/n at t = 1, 1 - 1/n, …; target of v is noise - actions (MSE),
    with x_t = t·noise + (1 - t)·actions and t ~ Beta(1.5, 1)·0.999 + 0.001 (openpi).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlibero.policies.pi05.config import Pi05Config
from qlibero.policies.pi05.layers import MASKED, GemmaStack, RMSNorm, attend, project, rope_tables
from qlibero.policies.pi05.vision import ConvTower, SiglipTower, VisionFeatures, vision_tower


@dataclass(frozen=True)
class Prefix:
    """What the action expert reads of images, state and text."""

    kv: list[tuple[Tensor, Tensor]]
    """A layer's rotated keys and values, each (B, P, head_dim)."""
    mask: Tensor | None
    """Additive, (B, 1, P): 0 for live positions, `MASKED` for padding; None when every position is live."""
    length: Tensor
    """(B,) int64: live positions; the expert's tokens are at length + 0 … H-1."""
    hidden: Tensor | None
    """(B, P, llm width): what enters the last language-model layer. For auxiliary training losses only."""
    vision: VisionFeatures | None
    """The vision tower's features (and keypoint heat maps). For auxiliary training losses only."""


class Projector(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)


class PaliGemmaModel(nn.Module):
    def __init__(self, config: Pi05Config):
        super().__init__()
        self.vision_tower = vision_tower(config.vision)
        self.multi_modal_projector = Projector(self.vision_tower.out_width, config.llm.width)
        self.language_model = GemmaStack(config.llm, vocab_size=config.vocab_size)


class PaliGemma(nn.Module):
    def __init__(self, config: Pi05Config):
        super().__init__()
        self.model = PaliGemmaModel(config)


class Expert(nn.Module):
    def __init__(self, config: Pi05Config, cond_dim: int | None):
        super().__init__()
        self.model = GemmaStack(config.expert, cond_dim=cond_dim)


class Networks(nn.Module):
    """Language model and action expert under openpi's names."""

    def __init__(self, config: Pi05Config, cond_dim: int | None):
        super().__init__()
        self.paligemma = PaliGemma(config)
        self.gemma_expert = Expert(config, cond_dim)


class Pi05Model(nn.Module):
    """See the module's docstring. Construct under `torch.device("meta")` so that loading does not allocate twice."""

    attend = staticmethod(attend)
    """The attention product; a twin of the model may have one that tells what it is asked."""

    def __init__(self, config: Pi05Config):
        super().__init__()
        self.config = config
        expert = config.expert
        self.paligemma_with_expert = Networks(config, cond_dim=expert.width if self.adaptive else None)
        self.action_in_proj = nn.Linear(config.action_dim, expert.width)
        self.action_out_proj = nn.Linear(expert.width, config.action_dim)
        self.make_heads()

    adaptive = True
    """Whether the expert's norms are adaptive (AdaRMS): how the flow time enters."""

    def make_heads(self) -> None:
        """The heads that differ between the networks of this family."""
        llm, expert = self.config.llm, self.config.expert
        self.time_mlp_in = nn.Linear(expert.width, expert.width)
        self.time_mlp_out = nn.Linear(expert.width, expert.width)
        if self.config.state_dim:
            self.state_proj = nn.Linear(self.config.state_dim, llm.width)

    # -- parts, by short names ------------------------------------------------------------------------------------
    @property
    def vision(self) -> SiglipTower | ConvTower:
        """The vision tower."""
        return self.paligemma_with_expert.paligemma.model.vision_tower

    @property
    def projector(self) -> nn.Linear:
        """Vision features → language-model width."""
        return self.paligemma_with_expert.paligemma.model.multi_modal_projector.linear

    @property
    def llm(self) -> GemmaStack:
        """The language model."""
        return self.paligemma_with_expert.paligemma.model.language_model

    @property
    def expert(self) -> GemmaStack:
        """The action expert."""
        return self.paligemma_with_expert.gemma_expert.model

    @property
    def stream_dtype(self) -> torch.dtype:
        """The dtype of the residual streams (that of the projector: never quantized, never an fp32 island)."""
        return self.projector.weight.dtype

    # -- prefix ---------------------------------------------------------------------------------------------------
    def embed_images(
        self, images: Tensor, run: Callable[[nn.Module, Tensor], VisionFeatures] | None = None
    ) -> tuple[Tensor, VisionFeatures]:
        """(B, cameras, 3, S, S) in [-1, 1] → tokens (B, cameras · tokens, llm width); image tokens are not scaled.
        `run` is what runs the tower."""
        features = self.vision(images) if run is None else run(self.vision, images)
        tokens: Tensor = self.projector(features.tokens.to(self.projector.weight.dtype))
        return tokens.flatten(1, 2), features

    def embed_prefix(self, image_tokens: Tensor, tokens: Tensor, state: Tensor | None) -> Tensor:
        """Images, then the state token if there is one, then text (so that padding comes last)."""
        dtype = self.stream_dtype
        text = self.llm.embed_tokens(tokens).to(dtype) * math.sqrt(self.config.llm.width)
        parts = [image_tokens, text]
        if self.config.prefix_state_tokens:
            if state is None:
                raise ValueError("this network has a state token; pass state (B, state_dim)")
            parts.insert(1, self.state_proj(state.to(self.state_proj.weight.dtype))[:, None].to(dtype))
        return torch.cat(parts, 1)

    def prefix(
        self,
        images: Tensor,
        tokens: Tensor,
        token_mask: Tensor | None = None,
        *,
        state: Tensor | None = None,
        camera_mask: Tensor | None = None,
    ) -> Prefix:
        """Run vision and language model.

        images (B, cameras, 3, S, S) in [-1, 1]; tokens (B, T) int64; token_mask (B, T) bool, True = live
        (None: all); state (B, state_dim) normalised; camera_mask (B, cameras) bool (None: all; leaving a
        camera out is the same and cheaper, with the SigLIP tower).
        """
        image_tokens, features = self.embed_images(images)
        x = self.embed_prefix(image_tokens, tokens, state)
        live = None
        if token_mask is not None or camera_mask is not None:
            batch, per_camera = tokens.shape[0], image_tokens.shape[1] // images.shape[1]
            live = torch.ones(batch, x.shape[1], dtype=torch.bool, device=x.device)
            if camera_mask is not None:
                live[:, : image_tokens.shape[1]] = camera_mask.repeat_interleave(per_camera, 1)
            if token_mask is not None:
                live[:, x.shape[1] - tokens.shape[1] :] = token_mask
        return self.run_llm(x, live, features)

    def run_llm(self, x: Tensor, live: Tensor | None, features: VisionFeatures | None) -> Prefix:
        """The language model over embedded positions (B, P, width); `live` (B, P) bool or None = all.

        The last layer stops after its keys and values: nothing else of it reaches the actions (exact, -5.5 %
        work at full size). Hence five linears of that layer never run.
        """
        batch, count, _ = x.shape
        if live is None:
            mask = None
            positions = torch.arange(count, device=x.device)[None]
            length = torch.full((batch,), count, dtype=torch.int64, device=x.device)
        else:
            mask = torch.where(live, 0.0, MASKED)[:, None].to(x.dtype)
            positions, length = live.cumsum(1) - 1, live.sum(1)
        cos, sin = rope_tables(positions, self.config.llm.head_dim, x.dtype)
        kv = []
        last = len(self.llm.layers) - 1
        for i, layer in enumerate(self.llm.layers):
            attention = layer.self_attn
            if i == last:
                kv.append(attention.kv(layer.input_layernorm(x), cos, sin))
                break
            q, k, v = attention.qkv(layer.input_layernorm(x), cos, sin)
            kv.append((k, v))
            x = x + project(self.attend(q, k, v, mask), attention.o_proj)[0]
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return Prefix(kv, mask, length, x, features)

    def add_state(self, prefix: Prefix, state: Tensor | None) -> Prefix:
        """The prefix with what of the state the expert reads beside it: here nothing, the state is in the prefix."""
        return prefix

    # -- suffix ---------------------------------------------------------------------------------------------------
    def time_embedding(self, t: Tensor) -> Tensor:
        """Sinusoids (B, expert width) of flow times (B,), float64 as in openpi."""
        half = self.config.expert.width // 2
        fraction = torch.linspace(0.0, 1.0, half, dtype=torch.float64, device=t.device)
        period = self.config.min_period * (self.config.max_period / self.config.min_period) ** fraction
        angle = (2 * math.pi / period)[None] * t.double()[:, None]
        return torch.cat([angle.sin(), angle.cos()], 1)

    def time_condition(self, t: Tensor) -> Tensor:
        """What of the flow times (B,) the expert is given, (B, expert width): here the AdaRMS condition."""
        embedding = self.time_embedding(t).to(self.time_mlp_in.weight.dtype)
        hidden: Tensor = self.time_mlp_out(F.silu(self.time_mlp_in(embedding)))
        return F.silu(hidden)

    def embed_actions(self, x_t: Tensor, condition: Tensor) -> Tensor:
        """Noisy actions (N, H, D) as the expert's tokens (N, H, width), in the stream's dtype."""
        tokens: Tensor = self.action_in_proj(x_t.to(self.action_in_proj.weight.dtype))
        return tokens.to(self.stream_dtype)

    def velocity(self, prefix: Prefix, x_t: Tensor, t: Tensor) -> Tensor:
        """v(x_t, t), (N, H, D) float32, for x_t (N, H, D) and t (N,), where N = K·B: K flow samples of each
        prefix row, consecutive. The H action tokens see each other and all live prefix positions."""
        samples = x_t.shape[0] // prefix.length.shape[0]
        condition = self.time_condition(t)
        x = self.embed_actions(x_t, condition)
        horizon = x.shape[1]
        length = prefix.length.repeat_interleave(samples)
        positions = length[:, None] + torch.arange(horizon, device=x.device)[None]
        cos, sin = rope_tables(positions, self.config.expert.head_dim, x.dtype)
        mask = prefix.mask
        if mask is not None:
            mask = F.pad(mask, (0, horizon)).repeat_interleave(samples, 0)
        for (prefix_k, prefix_v), layer in zip(prefix.kv, self.expert.layers, strict=True):
            scale, shift, gate = layer.input_layernorm.modulation(condition)
            q, k, v = layer.self_attn.qkv(layer.input_layernorm.modulated(x, scale, shift), cos, sin)
            k = torch.cat([prefix_k.repeat_interleave(samples, 0), k], 1)
            v = torch.cat([prefix_v.repeat_interleave(samples, 0), v], 1)
            x = x + project(self.attend(q, k, v, mask), layer.self_attn.o_proj)[0] * gate.to(x.dtype)
            scale, shift, gate = layer.post_attention_layernorm.modulation(condition)
            x = x + layer.mlp(layer.post_attention_layernorm.modulated(x, scale, shift)) * gate.to(x.dtype)
        scale, shift, _ = self.expert.norm.modulation(condition)
        x = self.expert.norm.modulated(x, scale, shift)
        velocity: Tensor = self.action_out_proj(x.to(self.action_out_proj.weight.dtype))
        return velocity.float()


@torch.no_grad()
def initialize(model: Pi05Model, seed: int) -> Pi05Model:
    """Weights to train from, a function of `seed` only.

    Linears: truncated normal, std 0.7/√fan_in. Embeddings: 1/√width, because they are scaled by √width when
    used. AdaRMS: weight zero, gate bias 1, so that the residual branches are open from the first step (for
    short trainings that is faster than the usual closed gates).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            continue
        if name.endswith("norm.dense"):
            module.weight.zero_()
            module.bias.zero_()
            module.bias[2 * module.out_features // 3 :] = 1.0
        elif isinstance(module, nn.Linear | nn.Conv2d):
            std = 0.7 / math.sqrt(module.weight[0].numel())
            _truncated_normal(module.weight, std if isinstance(module, nn.Linear) else std * 2, generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            _truncated_normal(module.weight, 1 / math.sqrt(module.embedding_dim), generator)
    return model


def _truncated_normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    values = torch.randn(weight.shape, generator=generator).clamp_(-2, 2) * std
    weight.copy_(values.to(weight.dtype))


def cast(model: Pi05Model, dtype: torch.dtype) -> Pi05Model:
    """`model.to(dtype)` that keeps openpi's float32 islands: patch and position embedding, every norm of both
    Gemma stacks (with AdaRMS dense), the action, time and state heads."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if is_float32_island(name) else dtype)
    return model


def is_float32_island(name: str) -> bool:
    """Whether the tensor of that name stays in float32 when the network runs in bfloat16 (openpi's rule)."""
    islands = (
        "patch_embedding",
        "position_embedding",
        "input_layernorm",
        "post_attention_layernorm",
        "model.norm.",
        "language_model.norm.",
        "vision_tower.cameras.",
    )
    return not name.startswith("paligemma_with_expert.") or any(island in name for island in islands)
