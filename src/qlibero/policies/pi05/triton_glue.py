"""`glue.py`'s functions as one Triton kernel each, for CUDA (and, under TRITON_INTERPRET=1, for the tests on
a CPU).

A flow step at full size has 18 layers of which each has four matrix products over 10 tokens; in plain torch
some twenty more launches of a few microseconds lie between them. Here they are six.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

KEYS_AT_ONCE = 64


class TritonGlue:
    """See `glue.Glue`. Rows must be contiguous in their last dimension."""

    name = "triton"

    def residual_norm(self, h, delta, gate, scale, shift):
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
            DELTA=delta is not None,
            GATE=gate is not None,
            SHIFT=shift is not None,
            num_warps=4 if block <= 2048 else 8,
        )
        return out, y

    def rotate_split(self, joined, cos, sin, keys, values):
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
        )
        return q

    def gelu_gate(self, gate, up):
        batch, length, width = gate.shape
        gate, up = gate.reshape(-1, width), up.reshape(-1, width)  # views: batch and length fold
        out = torch.empty(batch * length, width, dtype=gate.dtype, device=gate.device)
        block = 1024
        _gelu_gate[(batch * length, triton.cdiv(width, block))](
            gate, up, out, width, gate.stride(0), up.stride(0), BLOCK=block, num_warps=4
        )
        return out.view(batch, length, width)

    def attend_few(self, q, k, v, mask):
        batch, length, heads, dim = q.shape
        q = q.contiguous()
        out = torch.empty_like(q)
        _attend_few[(batch, heads)](
            q,
            k,
            v,
            k if mask is None else mask,
            out,
            length,
            heads,
            k.shape[1],
            dim**-0.5,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            0 if mask is None else mask.stride(0),
            LENGTH=max(16, triton.next_power_of_2(length)),
            DIM=dim,
            KEYS=KEYS_AT_ONCE if dim >= 64 else 32,
            MASK=mask is not None,
            num_warps=4,
            num_stages=2,
        )
        return out.view(batch, length, heads * dim)


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
    DELTA: tl.constexpr,
    GATE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * width
    i = tl.arange(0, BLOCK)
    here = i < width
    h = tl.load(h_ptr + row + i, mask=here, other=0.0).to(tl.float32)
    if DELTA:
        delta = tl.load(delta_ptr + row + i, mask=here, other=0.0).to(tl.float32)
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
):
    batch, t, part = tl.program_id(0) // length, tl.program_id(0) % length, tl.program_id(1)
    i = tl.arange(0, HALF)
    source = joined_ptr + batch.to(tl.int64) * jb + t * jt + part * 2 * HALF
    first, second = tl.load(source + i), tl.load(source + HALF + i)
    if part <= heads:
        cos, sin = cos_ptr + batch * cb + t * ct, sin_ptr + batch * sb + t * st
        a, b = first.to(tl.float32), second.to(tl.float32)
        # the sign of the first half's sine is in the table
        first = (a * tl.load(cos + i).to(tl.float32) + b * tl.load(sin + i).to(tl.float32)).to(first.dtype)
        second = (b * tl.load(cos + HALF + i).to(tl.float32) + a * tl.load(sin + HALF + i).to(tl.float32)).to(
            first.dtype
        )
    if part < heads:
        target = q_ptr + ((batch.to(tl.int64) * length + t) * heads + part) * 2 * HALF
    elif part == heads:
        target = k_ptr + batch.to(tl.int64) * kb + t * kt
    else:
        target = v_ptr + batch.to(tl.int64) * vb + t * vt
    tl.store(target + i, first)
    tl.store(target + HALF + i, second)


@triton.jit
def _gelu_gate(gate_ptr, up_ptr, out_ptr, width, gs, us, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = i < width
    x = tl.load(gate_ptr + row * gs + i, mask=here, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * us + i, mask=here, other=0.0).to(tl.float32)
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    # gelu_tanh(x) = x·sigmoid(2·inner); rounded before the product, as torch rounds it
    gelu = (x / (1.0 + tl.exp(-2.0 * inner))).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + i, (gelu * up).to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _attend_few(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    length,
    heads,
    keys,
    scale,
    kb,
    kt,
    vb,
    vt,
    mb,
    LENGTH: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
):
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, d, n = tl.arange(0, LENGTH), tl.arange(0, DIM), tl.arange(0, KEYS)
    rows = ((batch * length + t) * heads + head) * DIM
    live = t < length
    q = tl.load(q_ptr + rows[:, None] + d[None, :], mask=live[:, None], other=0.0)
    peak = tl.full((LENGTH,), -1e30, tl.float32)
    total = tl.zeros((LENGTH,), tl.float32)
    out = tl.zeros((LENGTH, DIM), tl.float32)
    for start in range(0, keys, KEYS):
        there = start + n < keys
        k = tl.load(
            k_ptr + batch * kb + (start + n)[:, None] * kt + d[None, :], mask=there[:, None], other=0.0
        )
        v = tl.load(
            v_ptr + batch * vb + (start + n)[:, None] * vt + d[None, :], mask=there[:, None], other=0.0
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASK:
            scores += tl.load(mask_ptr + batch * mb + start + n, mask=there, other=0.0).to(tl.float32)[
                None, :
            ]
        scores = tl.where(there[None, :], scores, -1e38)
        highest = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp(scores - highest[:, None])
        fade = tl.exp(peak - highest)
        total = total * fade + tl.sum(weights, 1)
        out = out * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        peak = highest
    out = out / total[:, None]
    tl.store(out_ptr + rows[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=live[:, None])
