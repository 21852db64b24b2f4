"""The two vision towers: PaliGemma's SigLIP, with its names, and a small convolutional one for training from scratch.

Both turn images (B, cameras, 3, S, S) in [-1, 1] into features (B, cameras, tokens, out_width); the projector
of the network follows. Only the SigLIP tower knows masked cameras by count: a camera that is not there is
simply not passed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlibero.console import count_text
from qlibero.policies.pi05.config import ConvConfig, SiglipConfig
from qlibero.policies.pi05.layers import project


class VisionFeatures(NamedTuple):
    """`tokens` (B, cameras, tokens, out_width); `heat` (B, cameras, K, S/8, S/8) keypoint logits, or None."""

    tokens: Tensor
    heat: Tensor | None


class SiglipAttention(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.num_heads = c.num_heads
        self.k_proj = nn.Linear(c.width, c.width)
        self.v_proj = nn.Linear(c.width, c.width)
        self.q_proj = nn.Linear(c.width, c.width)
        self.out_proj = nn.Linear(c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in project(x, self.q_proj, self.k_proj, self.v_proj)
        )
        y: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class SiglipMLP(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.fc1 = nn.Linear(c.width, c.mlp_dim)
        self.fc2 = nn.Linear(c.mlp_dim, c.width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return y


class SiglipLayer(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.width, eps=1e-6)
        self.self_attn = SiglipAttention(c)
        self.layer_norm2 = nn.LayerNorm(c.width, eps=1e-6)
        self.mlp = SiglipMLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        y: Tensor = self.mlp(self.layer_norm2(x))
        return x + y


class SiglipEmbeddings(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, c.width, c.patch, c.patch)
        self.position_embedding = nn.Embedding(c.tokens, c.width)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))
        return (
            patches.flatten(2).transpose(1, 2).contiguous() + self.position_embedding.weight
        )  # or every layer would read across rows


class SiglipEncoder(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.layers = nn.ModuleList(SiglipLayer(c) for _ in range(c.depth))


class SiglipModel(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.embeddings = SiglipEmbeddings(c)
        self.encoder = SiglipEncoder(c)
        self.post_layernorm = nn.LayerNorm(c.width, eps=1e-6)


class SiglipTower(nn.Module):
    """SigLIP without its pooling head; openpi's `vision_model.{embeddings,encoder.layers,post_layernorm}`."""

    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.out_width = c.width
        self.vision_model = SiglipModel(c)

    def forward(self, images: Tensor) -> VisionFeatures:
        vision = self.vision_model
        x = vision.embeddings(images.flatten(0, 1))
        # The embeddings stay in float32 in openpi's bfloat16 mode; the encoder does not. A norm is asked for its
        # dtype, as any of the encoder's linears may be a quantized one, which has no weight.
        x = x.to(vision.post_layernorm.weight.dtype)
        for layer in vision.encoder.layers:
            x = layer(x)
        return VisionFeatures(vision.post_layernorm(x).unflatten(0, images.shape[:2]), None)


def _conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(8, outputs), nn.SiLU())


class ConvCamera(nn.Module):
    """One camera's tower: five convolutions to stride 16, beside which the pooled stride-8 map is handed on."""

    def __init__(self, c: ConvConfig):
        super().__init__()
        c2, c4, c8 = c.channels
        self.stride8 = nn.Sequential(_conv(3, c2, 2), _conv(c2, c4, 2), _conv(c4, c8, 2), _conv(c8, c8, 1))
        self.stride16 = _conv(c8, c.width, 2)
        self.position_embedding = nn.Embedding((c.image_size // 16) ** 2, c.width + c8)
        self.heat = nn.Conv2d(c8, c.keypoints, 1) if c.keypoints else None
        self.keypoint_token = nn.Linear(2 * c.keypoints, c.width + c8) if c.keypoints else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        fine = self.stride8(x)
        coarse = torch.cat([self.stride16(fine), F.avg_pool2d(fine, 2)], 1)
        tokens = coarse.flatten(2).transpose(1, 2) + self.position_embedding.weight
        if self.heat is None or self.keypoint_token is None:
            return tokens, None
        heat = self.heat(fine)
        coordinates = soft_argmax(heat).flatten(1)
        return torch.cat([tokens, self.keypoint_token(coordinates.to(tokens.dtype))[:, None]], 1), heat


def soft_argmax(heat: Tensor) -> Tensor:
    """Expected (row, column) of each heat map (B, K, h, w) in [-1, 1] image coordinates: (B, K, 2) float32."""
    height, width = heat.shape[-2:]
    weights = heat.float().flatten(2).softmax(-1).unflatten(-1, (height, width))
    rows = (torch.arange(height, device=heat.device) + 0.5) * (2 / height) - 1
    columns = (torch.arange(width, device=heat.device) + 0.5) * (2 / width) - 1
    return torch.stack([weights.sum(-1) @ rows, weights.sum(-2) @ columns], -1)


class ConvTower(nn.Module):
    """One `ConvCamera` a camera."""

    def __init__(self, c: ConvConfig):
        super().__init__()
        self.out_width = c.width + c.channels[2]
        self.cameras = nn.ModuleList(ConvCamera(c) for _ in range(c.cameras))

    def forward(self, images: Tensor) -> VisionFeatures:
        if images.shape[1] != len(self.cameras):
            raise ValueError(
                f"the conv tower was built for {count_text(len(self.cameras), 'camera')}, got {images.shape[1]}"
            )
        images = images.to(next(self.parameters()).dtype)
        outs = [camera(images[:, i]) for i, camera in enumerate(self.cameras)]
        heat = None if outs[0][1] is None else torch.stack([heat for _, heat in outs], 1)
        return VisionFeatures(torch.stack([tokens for tokens, _ in outs], 1), heat)


def vision_tower(c: SiglipConfig | ConvConfig) -> SiglipTower | ConvTower:
    """The tower a config names."""
    return SiglipTower(c) if isinstance(c, SiglipConfig) else ConvTower(c)
