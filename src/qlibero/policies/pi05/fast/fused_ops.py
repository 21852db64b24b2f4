"""What lies between the matrix products of a layer (residuals, norms, rotations, gates), attention, few-row products.

At full size on a GPU these are many tiny kernels, and a flow step is mostly waiting for them;
`triton_fused_ops.py` has fewer. This file is the same in plain torch, for every device, and chooses
between the two. Both compute in float32 inside; they may differ in the last bit of the stream's dtype, so the
choice is one per process and recorded.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlibero.policies.pi05.config import SiglipConfig
from qlibero.policies.pi05.layers import attend, fuse, modulated, project, project_joined, rotate
from qlibero.policies.pi05.vision import SiglipTower, VisionFeatures


class LayerOps(Protocol):
    """One implementation. All tensors are on one device; h, x, … have the stream's dtype."""

    name: str

    def residual_norm(
        self, h: Tensor, delta: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """h' = h + delta·gate (a missing delta adds nothing, a missing gate is 1); y = h'/rms(h')·scale + shift.

        h (B, T, W); delta likewise, or as `parts` gives it; gate (1, 1, W); scale, shift float32 (1, 1, W).
        Returns (h', y).
        """
        ...

    def parts(self, x: Tensor, linear: nn.Module) -> Tensor:
        """linear(x) (B, T, N), or float32 (S, B, T, N) whose sum over S it is."""
        ...

    def gated(self, x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor:
        """gelu_tanh(gate(x)) · up(x), (B, T, F)."""
        ...

    def mlp(self, x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
        """down(gelu_tanh(gate(x)) · up(x)), as `parts` gives it."""
        ...

    def rotated(
        self, x: Tensor, qkv: tuple[nn.Module, ...], cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Queries, keys and values of x (B, T, W) from their linears (q, k, v; or k, v alone), queries and keys
        rotated. Writes keys and values to `keys`, `values` (B, T, d, any batch stride), returns the queries
        (B, T, heads, d). cos, sin (B, T, 1, d) as from `rope_tables`."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`layers.attend`."""
        ...

    def vision(self, tower: nn.Module, images: Tensor) -> VisionFeatures:
        """`tower(images)`."""
        ...


class EagerOps:
    """Plain torch, any device."""

    name = "torch"

    def residual_norm(
        self, h: Tensor, delta: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if delta is not None:
            h = h + delta if gate is None else torch.addcmul(h, delta, gate)
        if shift is None:
            return h, F.rms_norm(h.float(), (h.shape[-1],), scale.flatten(), 1e-6).to(h.dtype)
        return h, modulated(h, scale, shift)

    def parts(self, x: Tensor, linear: nn.Module) -> Tensor:
        return project(x, linear)[0]

    def gated(self, x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor:
        opened, passed = project(x, gate, up)
        return F.gelu(opened, approximate="tanh") * passed

    def mlp(self, x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
        return self.parts(self.gated(x, gate, up), down)

    def rotated(
        self, x: Tensor, qkv: tuple[nn.Module, ...], cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        dim = cos.shape[-1]
        joined = project_joined(x, *qkv)
        qk, v = joined.split([joined.shape[-1] - dim, dim], -1)
        qk = rotate(qk.unflatten(-1, (-1, dim)), cos, sin)
        keys.copy_(qk[:, :, -1])
        values.copy_(v)
        return qk[:, :, :-1]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attend(q, k, v, mask)

    def vision(self, tower: nn.Module, images: Tensor) -> VisionFeatures:
        return cast(VisionFeatures, tower(images))


def choose_layer_ops(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[LayerOps, str]:
    """The ops for a model and why. Triton's is tried against torch's on random data first; a mismatch or an
    error means torch's, with the reason."""
    if device.type != "cuda":
        return EagerOps(), "no GPU"
    try:
        from qlibero.policies.pi05.fast.triton_fused_ops import TritonOps

        worst = _compare(TritonOps(), EagerOps(), device, dtype, head_dim)
    except Exception as error:
        return EagerOps(), f"triton ops failed: {type(error).__name__}: {error}"[:300]
    if not worst < 0.02:
        return EagerOps(), f"triton ops differs from torch by {worst:.3g} of the largest value"
    return TritonOps(), f"triton ops agrees with torch within {worst:.2g} of the largest value"


def _compare(one: LayerOps, other: LayerOps, device: torch.device, dtype: torch.dtype, dim: int) -> float:
    """Largest difference of the two on random data, relative to the largest value, over every function."""
    g = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=g, device=device).to(dtype)

    heads, length, total, width = 8, 10, 75, 1024
    h, delta, gate = random(1, length, width), random(1, length, width), random(1, 1, width)
    scale, shift = random(1, 1, width, dtype=torch.float32), random(1, 1, width, dtype=torch.float32)
    q, cos, sin = random(2, length, heads, dim), random(2, length, 1, dim), random(2, length, 1, dim)
    long, k, v = random(2, total, heads, dim), random(2, total, dim), random(2, total, dim)
    mask = (
        torch.where(torch.arange(total, device=device) % 5 < 3, 0.0, -2.3819763e38)
        .expand(2, 1, total)
        .to(dtype)
        .contiguous()
    )

    def linears(*outputs: int) -> list[nn.Linear]:
        made = [nn.Linear(width, n, bias=False, device="meta") for n in outputs]
        for linear, n in zip(made, outputs, strict=True):
            linear.weight = nn.Parameter(random(n, width) / width**0.5, requires_grad=False)
        fuse(*made)
        return made

    with torch.device("meta"):
        tower = SiglipTower(SiglipConfig(144, 2, 320, 2, 14, 56))
    for name, parameter in list(tower.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        value = random(*parameter.shape) * (0.05 if parameter.ndim > 1 else 1.0)
        setattr(tower.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
    images = random(1, 2, 3, 56, 56)
    qkv, mlp, (o,) = linears(heads * dim, dim, dim), linears(512, 512), linears(width)

    def everything(ops: LayerOps) -> list[Tensor]:
        keys, values = torch.zeros_like(k), torch.zeros_like(v)
        own = slice(total - length, None)
        few, many = (
            ops.rotated(x, tuple(qkv), cos[: len(x)], sin[: len(x)], keys[: len(x), own], values[: len(x), own])
            for x in (h, h.repeat(2, 1, 1))
        )
        return [
            *ops.residual_norm(h, delta, gate, scale, shift),
            *ops.residual_norm(h, None, None, scale, None),
            *ops.residual_norm(h, ops.parts(delta, o), gate, scale, shift),
            ops.gated(h, *mlp),
            ops.gated(h.repeat(2, 1, 1), *mlp),
            few.contiguous(),
            many.contiguous(),
            keys,
            values,
            *(ops.attend(x, k, v, hidden) for x in (q, long) for hidden in (mask, None)),
            ops.vision(tower, images).tokens,
        ]

    pairs = zip(everything(one), everything(other), strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)
