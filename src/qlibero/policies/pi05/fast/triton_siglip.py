"""The SigLIP tower with half its launches: each residual sum and the norm behind it in one, gelu inside fc1's product.

Attention and products stay the library's. Numbers are those of `vision.SiglipTower` but for the gelu, which reads the
product's float32 sum where plain torch has rounded it first. Imports triton at the top, as `triton_fused_ops.py` does.
"""

# What triton.jit takes is no Python: its types are the compiler's
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from qlibero.policies.pi05.layers import plain
from qlibero.policies.pi05.vision import SiglipMLP, SiglipTower, VisionFeatures


def siglip(tower: SiglipTower, images: Tensor) -> VisionFeatures:
    """`tower(images)`."""
    vision: Any = tower.vision_model
    x = vision.embeddings(images.flatten(0, 1)).to(vision.post_layernorm.weight.dtype)
    layers = list(vision.encoder.layers)
    norms = [norm for layer in layers for norm in (layer.layer_norm1, layer.layer_norm2)] + [vision.post_layernorm]
    y = residual_norm(x, None, norms[0])[1]
    for i, layer in enumerate(layers):
        x, y = residual_norm(x, layer.self_attn(y), norms[2 * i + 1])
        x, y = residual_norm(x, _mlp(layer.mlp, y), norms[2 * i + 2])
    return VisionFeatures(y.unflatten(0, images.shape[:2]), None)


def _mlp(mlp: SiglipMLP, y: Tensor) -> Any:
    weight, bias = plain((mlp.fc1,)) or (None, None)
    if weight is None or bias is None or not y.is_cuda:  # quantized or listened to; and a CPU's fused gelu is another
        return mlp(y)
    return mlp.fc2(torch._addmm_activation(bias, y.flatten(0, 1), weight.t(), use_gelu=True)).view(y.shape)


def residual_norm(x: Tensor, delta: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """x (..., W), delta the same or None -> x' = x + delta, and norm(x')."""
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    y, out = torch.empty_like(x), x if delta is None else torch.empty_like(x)
    _residual_norm[(rows,)](
        x,
        x if delta is None else delta.contiguous(),
        norm.weight,
        norm.bias,
        out,
        y,
        width,
        norm.eps,
        BLOCK=triton.next_power_of_2(width),
        ADD=delta is not None,
        num_warps=4,
    )
    return out, y


@triton.jit
def _residual_norm(
    x_ptr, delta_ptr, weight_ptr, bias_ptr, out_ptr, y_ptr, width, eps, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    """Grid: (rows,)."""
    i = tl.arange(0, BLOCK)
    there, place = i < width, tl.program_id(0).to(tl.int64) * width + i
    x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
    if ADD:
        stored = (x + tl.load(delta_ptr + place, mask=there, other=0.0).to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, stored, mask=there)
        x = stored.to(tl.float32)  # the norm reads what the stream holds, as in torch
    x = tl.where(there, x - tl.sum(x, 0) / width, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    y = y * tl.load(weight_ptr + i, mask=there, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + i, mask=there, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=there)
