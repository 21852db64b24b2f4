"""`fused_ops.py`'s functions in Triton, for CUDA (and, under TRITON_INTERPRET=1, for the tests on a CPU).

A flow step at full size has 18 layers of which each has four matrix products over 10 tokens; in plain torch
some twenty more launches of a few microseconds lie between them. Here a layer is eight launches: norm, q/k/v
with their rotation, attention in two, o, norm, gate and up with their gelu, down.
"""

# What triton.jit takes is no Python: its types are the compiler's
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from qlibero.kernels.triton_pdl import launch, pdl_wait
from qlibero.kernels.triton_quantizer import gelu_times
from qlibero.policies.base import shares_input
from qlibero.policies.pi05.fast import triton_attention, triton_siglip, triton_skinny_gemm
from qlibero.policies.pi05.fast.triton_skinny_gemm import DEEP, GATED, TURNED, fits, turn
from qlibero.policies.pi05.layers import plain, project, project_joined
from qlibero.policies.pi05.vision import SiglipTower, VisionFeatures


class TritonOps:
    """See `fused_ops.LayerOps`. Rows must be contiguous in their last dimension."""

    name = "triton"

    def residual_norm(
        self, h: Tensor, delta: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows, width = h.shape[0] * h.shape[1], h.shape[2]
        h = h.contiguous()
        out = h if delta is None else torch.empty_like(h)
        y = torch.empty_like(h)
        block = triton.next_power_of_2(width)
        _residual_norm[(rows,)](
            h,
            h if delta is None else delta.contiguous(),
            h if gate is None else gate,
            scale,
            scale if shift is None else shift,
            out,
            y,
            width,
            BLOCK=block,
            PARTS=0 if delta is None else len(delta) if delta.dim() == 4 else 1,
            GATE=gate is not None,
            SHIFT=shift is not None,
            num_warps=4 if block <= 2048 else 8,
            **launch(h.device, rows),
        )
        return out, y

    def rotated(
        self, x: Tensor, qkv: tuple[nn.Module, ...], cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        whole = plain(qkv)
        if whole is not None and fits(TURNED, x, *whole) and cos.shape[-1] % (2 * TURNED.outputs) == 0:
            return triton_skinny_gemm.rotated(x, whole[0], cos, sin, keys, values)
        return self._rotate_split(project_joined(x, *qkv), cos, sin, keys, values)

    def parts(self, x: Tensor, linear: nn.Module) -> Tensor:
        whole = plain((linear,))
        if whole is None or not fits(DEEP, x, *whole):
            return project(x, linear)[0]
        return triton_skinny_gemm.parts(x, whole[0])

    def gated(self, x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor:
        whole = plain((gate, up))
        if whole is not None and fits(GATED, x, *whole):
            return triton_skinny_gemm.gated(x, whole[0])
        return self._gelu_gate(*project(x, gate, up))

    def mlp(self, x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
        if shares_input(down) and down.takes_gated(x.device):
            return down.of_gated(*project(x, gate, up))
        return self.parts(self.gated(x, gate, up), down)

    def _rotate_split(self, joined: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        batch, length, total = joined.shape
        dim = cos.shape[-1]
        heads = total // dim - 2
        q = torch.empty(batch, length, heads, dim, dtype=joined.dtype, device=joined.device)
        cos, sin = cos.expand(batch, length, 1, dim), sin.expand(batch, length, 1, dim)
        _rotate_split[(batch * length, heads + 2)](
            joined,
            cos,
            sin,
            q,
            keys,
            values,
            length,
            heads,
            joined.stride(0),
            joined.stride(1),
            cos.stride(0),
            cos.stride(1),
            sin.stride(0),
            sin.stride(1),
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            HALF=dim // 2,
            num_warps=1,
            **launch(joined.device, batch * length),
        )
        return q

    def _gelu_gate(self, gate: Tensor, up: Tensor) -> Tensor:
        batch, length, width = gate.shape
        gate, up = gate.reshape(-1, width), up.reshape(-1, width)  # views: batch and length fold
        out = torch.empty(batch * length, width, dtype=gate.dtype, device=gate.device)
        block = 1024
        _gelu_gate[(batch * length, triton.cdiv(width, block))](
            gate,
            up,
            out,
            width,
            gate.stride(0),
            up.stride(0),
            BLOCK=block,
            num_warps=4,
            **launch(gate.device, batch * length),
        )
        return out.view(batch, length, width)

    attend = staticmethod(triton_attention.attend)

    def vision(self, tower: nn.Module, images: Tensor) -> VisionFeatures:
        return (
            triton_siglip.siglip(tower, images)
            if isinstance(tower, SiglipTower)
            else cast(VisionFeatures, tower(images))
        )


@triton.jit
def _residual_norm(
    h_ptr,
    delta_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    y_ptr,
    width,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    GATE: tl.constexpr,
    SHIFT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    pdl_wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * width
    i = tl.arange(0, BLOCK)
    here = i < width
    h = tl.load(h_ptr + row + i, mask=here, other=0.0).to(tl.float32)
    if PARTS:
        delta = tl.load(delta_ptr + row + i, mask=here, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            delta += tl.load(delta_ptr + part * tl.num_programs(0) * width + row + i, mask=here, other=0.0)
        delta = delta.to(out_ptr.dtype.element_ty).to(tl.float32)  # a product's output, as it is elsewhere
        if GATE:
            delta *= tl.load(gate_ptr + i, mask=here, other=0.0).to(tl.float32)
        stored = (h + delta).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row + i, stored, mask=here)
        h = stored.to(tl.float32)  # the norm reads what the stream holds, as in torch
    y = h * tl.rsqrt(tl.sum(h * h, 0) / width + 1e-6) * tl.load(scale_ptr + i, mask=here, other=0.0)
    if SHIFT:
        y += tl.load(shift_ptr + i, mask=here, other=0.0)
    tl.store(y_ptr + row + i, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit
def _rotate_split(
    joined_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    length,
    heads,
    jb,
    jt,
    cb,
    ct,
    sb,
    st,
    kb,
    kt,
    vb,
    vt,
    HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    pdl_wait(OVERLAP)
    batch, t, part = tl.program_id(0) // length, tl.program_id(0) % length, tl.program_id(1)
    i = tl.arange(0, HALF)
    source = joined_ptr + batch.to(tl.int64) * jb + t * jt + part * 2 * HALF
    first, second = tl.load(source + i), tl.load(source + HALF + i)
    if part <= heads:
        cos, sin = cos_ptr + batch * cb + t * ct, sin_ptr + batch * sb + t * st
        first, second = turn(first, second, cos + i, sin + i, HALF)
    if part < heads:
        target = q_ptr + ((batch.to(tl.int64) * length + t) * heads + part) * 2 * HALF
    elif part == heads:
        target = k_ptr + batch.to(tl.int64) * kb + t * kt
    else:
        target = v_ptr + batch.to(tl.int64) * vb + t * vt
    tl.store(target + i, first)
    tl.store(target + HALF + i, second)


@triton.jit
def _gelu_gate(gate_ptr, up_ptr, out_ptr, width, gs, us, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    pdl_wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = i < width
    gate = tl.load(gate_ptr + row * gs + i, mask=here, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * us + i, mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + i, gelu_times(gate, up, out_ptr.dtype.element_ty), mask=here)
