"""The Gemma layers of both stacks: RMSNorm (plain, adaptive), rotary embedding, one-K/V-head attention, gated MLP.

Module and parameter names are openpi's. Quantization enters at one place, `project`; nothing else here knows
of it.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlibero.policies.base import shares_input
from qlibero.policies.pi05.config import GemmaConfig

MASKED = -2.3819763e38
"""openpi's additive mask value: the most negative bfloat16-safe number it uses."""


def project(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """The outputs of several linears that read the same input `x` (..., K), each (..., N_i).

    Those with `prepare` are quantized: their input's transform and codes are computed once and shared. When
    all are plain and have been laid out together (`fuse`), one matmul does the work of all.
    """
    first = next(filter(shares_input, linears), None)
    if first is not None:
        prepared = first.prepare(x)
        return tuple(linear.from_prepared(prepared) if shares_input(linear) else linear(x) for linear in linears)
    whole = plain(linears)
    if whole is not None:
        sizes = [cast(nn.Linear, linear).out_features for linear in linears]
        parts: tuple[Tensor, ...] = F.linear(x, *whole).split(sizes, -1)
        return parts
    return tuple(linear(x) for linear in linears)


def project_joined(x: Tensor, *linears: nn.Module) -> Tensor:
    """`project`, its outputs concatenated along the last dimension; free when the linears are fused, or quantized and
    multiplied together."""
    whole = plain(linears)
    if whole is not None:
        return F.linear(x, *whole)
    first = linears[0]
    if shares_input(first) and first.precedes(*linears[1:]):
        return first.joined(x, linears[-1])
    return torch.cat(project(x, *linears), -1)


def fuse(*linears: nn.Module) -> None:
    """Lay the weights (and biases) of plain linears out in one tensor, of which each keeps its rows: no second copy.

    For inference. Left as they are: quantized linears, linears of which only some have a bias, and linears of
    which some are already laid out elsewhere (a twin model that shares them).
    """
    ours = [linear for linear in linears if type(linear) is nn.Linear]
    if len(ours) < len(linears) or any(linear.weight.is_meta or "fused" in vars(linear) for linear in ours):
        return
    if len({linear.bias is None for linear in ours}) > 1:
        return
    sizes = [linear.out_features for linear in ours]
    weight = torch.cat([linear.weight.detach() for linear in ours])
    bias = None if ours[0].bias is None else torch.cat([linear.bias.detach() for linear in ours])
    for linear, rows in zip(ours, weight.split(sizes), strict=True):
        linear.weight = nn.Parameter(rows, requires_grad=False)
        vars(linear)["fused"] = True
    if bias is not None:
        for linear, rows in zip(ours, bias.split(sizes), strict=True):
            linear.bias = nn.Parameter(rows, requires_grad=False)
    vars(ours[0])["fused_tensors"] = (weight, bias)


def plain(linears: tuple[nn.Module, ...]) -> tuple[Tensor, Tensor | None] | None:
    """The weight (N of all, K) and bias of one matmul that does the work of `linears`, or None: when one is quantized,
    when they are not (or no more) laid out together, or when somebody listens to them one by one."""
    first = linears[0]
    if len(linears) == 1:
        return (first.weight, first.bias) if type(first) is nn.Linear and not _listened(first) else None
    whole: tuple[Tensor, Tensor | None] | None = first.__dict__.get("fused_tensors")
    if whole is None or torch.compiler.is_compiling():
        return whole
    row = 0
    for linear in linears:
        # A copied, moved or reassigned weight is no view any more; a forward hook (calibration) must see its
        # own call.
        if type(linear) is not nn.Linear or _listened(linear):
            return None
        if not all(map(_is_view, (linear.weight, linear.bias), whole, (row, row))):
            return None
        row += linear.out_features
    return whole if row == len(whole[0]) else None


def _is_view(part: Tensor | None, whole: Tensor | None, row: int) -> bool:
    if part is None or whole is None:
        return part is whole
    return part.data_ptr() == whole.data_ptr() + row * whole.stride(0) * whole.element_size()


def _listened(linear: nn.Module) -> bool:
    return not torch.compiler.is_compiling() and bool(linear._forward_hooks or linear._forward_pre_hooks)


class RMSNorm(nn.Module):
    """Gemma's norm: float32 inside, factor (1 + weight); with `cond_dim`, AdaRMS: scale, shift, gate = dense(cond)."""

    def __init__(self, width: int, cond_dim: int | None = None, eps: float = 1e-6):
        super().__init__()
        self.width, self.eps = width, eps
        if cond_dim is None:
            self.weight = nn.Parameter(torch.zeros(width))
        self.dense = None if cond_dim is None else nn.Linear(cond_dim, width * 3)

    def normalize(self, x: Tensor) -> Tensor:
        """x / rms(x) over the last dimension, float32."""
        return F.rms_norm(x.float(), (self.width,), None, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """The plain norm (language model)."""
        return F.rms_norm(x.float(), (self.width,), 1.0 + self.weight.float(), self.eps).to(x.dtype)

    def modulation(self, cond: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1 + scale, shift, gate), each (B, 1, width) in the dense layer's dtype, from `cond` (B, cond_dim); of a
        plain norm its factor, no shift and an open gate, (1, 1, width)."""
        if self.dense is None:
            factor = (1.0 + self.weight.float())[None, None]
            return factor, torch.zeros_like(factor), torch.ones_like(factor)
        scale, shift, gate = self.dense(cond.to(self.dense.weight.dtype))[:, None].chunk(3, -1)
        return 1.0 + scale, shift, gate

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """AdaRMS with a modulation from `modulation` (scale already has its 1 added)."""
        return torch.addcmul(shift.float(), self.normalize(x), scale.float()).to(x.dtype)


def modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) · scale + shift in float32, as x's dtype; scale has its 1 added.

    The RMS norm of x is the layer norm of [x, -x], whose mean is 0: one fused kernel instead of six small
    ones, which is a fifth of a compact policy's time on a CPU.
    """
    width = x.shape[-1]
    if x.device.type != "cpu":
        return torch.addcmul(shift, F.rms_norm(x.float(), (width,), None, eps), scale).to(x.dtype)
    wide = x.float()
    doubled = F.layer_norm(torch.cat((wide, -wide), -1), (2 * width,), eps=eps)
    return torch.addcmul(shift, doubled[..., :width], scale).to(x.dtype)


def rope_tables(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (B, T, 1, head_dim), for integer positions (B, T); base 10000, rotate-half layout.

    The sign of the rotated first half is in `sin` already, see `rotate`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * (1.0 / 10000.0**exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1)[:, :, None].to(dtype), torch.cat((-sin, sin), -1)[:, :, None].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (B, T, heads, head_dim): rotate-half is a roll once the sign is in `sin`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √d + mask) v → (B, T, heads·d).

    q (B, T, heads, d); k, v (B, P, d), the one K/V head all query heads share; mask additive (B, 1, P) or
    None when every key is live. Heads are folded into the query length: one small attention, no copies of K
    and V.
    """
    batch, length, heads, dim = q.shape
    mask = None if mask is None else mask[:, None]
    out = F.scaled_dot_product_attention(
        q.reshape(batch, 1, length * heads, dim), k[:, None], v[:, None], attn_mask=mask
    )
    return out.reshape(batch, length, heads * dim)


class Attention(nn.Module):
    """Projections of one layer's attention (one K/V head); the attention product itself is `attend`."""

    def __init__(self, c: GemmaConfig):
        super().__init__()
        self.num_heads, self.head_dim = c.num_heads, c.head_dim
        self.q_proj = nn.Linear(c.width, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.width, c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.width, c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.width, bias=False)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q (B, T, heads, d), rotated k and plain v (B, T, d). q and k are rotated in one go."""
        joined = project_joined(x, self.q_proj, self.k_proj, self.v_proj)
        qk, v = joined.split([joined.shape[-1] - self.head_dim, self.head_dim], -1)
        qk = rotate(qk.unflatten(-1, (self.num_heads + 1, self.head_dim)), cos, sin)
        return qk[:, :, :-1], qk[:, :, -1], v

    def kv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """k and v only: all that the last language-model layer gives to the actions."""
        k, v = project(x, self.k_proj, self.v_proj)
        return rotate(k[:, :, None], cos, sin)[:, :, 0], v


class GatedMLP(nn.Module):
    """down(gelu_tanh(gate(x)) · up(x))."""

    def __init__(self, c: GemmaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.mlp_dim, bias=False)
        self.up_proj = nn.Linear(c.width, c.mlp_dim, bias=False)
        self.down_proj = nn.Linear(c.mlp_dim, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return project(F.gelu(gate, approximate="tanh") * up, self.down_proj)[0]


class GemmaLayer(nn.Module):
    """One transformer layer; `cond_dim` makes its norms adaptive (the expert)."""

    def __init__(self, c: GemmaConfig, cond_dim: int | None = None):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = GatedMLP(c)
        self.input_layernorm = RMSNorm(c.width, cond_dim)
        self.post_attention_layernorm = RMSNorm(c.width, cond_dim)


class GemmaStack(nn.Module):
    """A stack of layers with its final norm and, for the language model, the token embedding."""

    def __init__(self, c: GemmaConfig, vocab_size: int | None = None, cond_dim: int | None = None):
        super().__init__()
        if vocab_size is not None:
            self.embed_tokens = nn.Embedding(vocab_size, c.width)
        self.layers = cast(list[GemmaLayer], nn.ModuleList(GemmaLayer(c, cond_dim) for _ in range(c.depth)))
        self.norm = RMSNorm(c.width, cond_dim)
