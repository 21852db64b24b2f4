"""What lies between the matrix products of a layer: residuals, norms, rotations, gates, and the small
attention of a flow step.

At full size on a GPU these are many tiny kernels, and a flow step is mostly waiting for them;
`triton_glue.py` has each as one kernel. This file is the same in plain torch, for every device, and chooses
between the two. Both compute in float32 inside; they may differ in the last bit of the stream's dtype, so the
choice is one per process and recorded.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qlibero.policies.pi05.layers import attend, modulated, rotate


class Glue(Protocol):
    """One implementation. All tensors are on one device; h, delta, … have the stream's dtype."""

    name: str

    def residual_norm(
        self, h: Tensor, delta: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """h' = h + delta·gate (a missing delta adds nothing, a missing gate is 1); y = h'/rms(h')·scale +
        shift.

        h, delta (B, T, W); gate (1, 1, W); scale, shift float32 (1, 1, W). Returns (h', y).
        """
        ...

    def rotate_split(self, joined: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Split q|k|v (B, T, (heads + 2)·d), rotate q and k, write k and v to `keys`, `values` (B, T, d, any
        batch stride), return q (B, T, heads, d). cos, sin (B, T, 1, d) as from `rope_tables`."""
        ...

    def gelu_gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """gelu_tanh(gate) · up, (B, T, F) each, rows may be strided."""
        ...

    def attend_few(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`layers.attend` for few query positions."""
        ...


class TorchGlue:
    """Plain torch, any device."""

    name = "torch"

    def residual_norm(self, h, delta, gate, scale, shift):
        if delta is not None:
            h = h + delta if gate is None else torch.addcmul(h, delta, gate)
        if shift is None:
            return h, F.rms_norm(h.float(), (h.shape[-1],), scale.flatten(), 1e-6).to(h.dtype)
        return h, modulated(h, scale, shift)

    def rotate_split(self, joined, cos, sin, keys, values):
        dim = cos.shape[-1]
        qk, v = joined.split([joined.shape[-1] - dim, dim], -1)
        qk = rotate(qk.unflatten(-1, (-1, dim)), cos, sin)
        keys.copy_(qk[:, :, -1])
        values.copy_(v)
        return qk[:, :, :-1]

    def gelu_gate(self, gate, up):
        return F.gelu(gate, approximate="tanh") * up

    def attend_few(self, q, k, v, mask):
        return attend(q, k, v, mask)


def choose_glue(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Glue, str]:
    """The glue for a model and why. Triton's is tried against torch's on random data first; a mismatch or an
    error means torch's, with the reason."""
    if device.type != "cuda":
        return TorchGlue(), "no GPU"
    try:
        from qlibero.policies.pi05.triton_glue import TritonGlue

        worst = _compare(TritonGlue(), TorchGlue(), device, dtype, head_dim)
    except Exception as error:
        return TorchGlue(), f"triton glue failed: {type(error).__name__}: {error}"[:300]
    if not worst < 0.02:
        return TorchGlue(), f"triton glue differs from torch by {worst:.3g} of the largest value"
    return TritonGlue(), f"triton glue agrees with torch within {worst:.2g} of the largest value"


def _compare(one: Glue, other: Glue, device: torch.device, dtype: torch.dtype, dim: int) -> float:
    """Largest difference of the two on random data, relative to the largest value, over every function."""
    g = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=g, device=device).to(dtype)

    heads, length, total, width = 8, 10, 75, 1024
    h, delta, gate = random(2, length, width), random(2, length, width), random(1, 1, width)
    scale, shift = random(1, 1, width, dtype=torch.float32), random(1, 1, width, dtype=torch.float32)
    joined, cos, sin = (
        random(2, length, (heads + 2) * dim),
        random(2, length, 1, dim),
        random(2, length, 1, dim),
    )
    gate_up = random(2, length, 2 * width)
    k, v = random(2, total, dim), random(2, total, dim)
    mask = (
        torch.where(torch.arange(total, device=device) % 5 < 3, 0.0, -2.3819763e38)
        .expand(2, 1, total)
        .to(dtype)
        .contiguous()
    )

    def everything(glue: Glue) -> list[Tensor]:
        keys, values = torch.zeros_like(k), torch.zeros_like(v)
        q = glue.rotate_split(joined, cos, sin, keys[:, -length:], values[:, -length:])
        return [
            *glue.residual_norm(h, delta, gate, scale, shift),
            *glue.residual_norm(h, None, None, scale, None),
            q.contiguous(),
            keys,
            values,
            glue.gelu_gate(*gate_up.chunk(2, -1)),
            glue.attend_few(q, k, v, mask),
            glue.attend_few(q, k, v, None),
        ]

    pairs = zip(everything(one), everything(other), strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)
