"""`glue.py`'s functions as one Triton kernel each, for CUDA (and, under TRITON_INTERPRET=1, for the tests on
a CPU).

A flow step at full size has 18 layers of which each has four matrix products over 10 tokens; in plain torch
some twenty more launches of a few microseconds lie between them. Here they are six, the attention two of them.
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
        q, rows, keys = q.contiguous(), length * heads, k.shape[1]
        at_once = KEYS_AT_ONCE if dim >= 64 and q.element_size() == 2 else 32
        splits = triton.cdiv(keys, at_once)
        parts = torch.empty(batch, splits, rows, dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(batch, splits, rows, 2, dtype=torch.float32, device=q.device)
        out = torch.empty_like(q)
        _attend_part[(triton.cdiv(rows, 16), splits, batch)](
            q,
            k,
            v,
            k if mask is None else mask,
            parts,
            sums,
            rows,
            keys,
            dim**-0.5,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            0 if mask is None else mask.stride(0),
            ROWS=16,
            DIM=dim,
            KEYS=at_once,
            MASK=mask is not None,
            num_warps=4,
        )
        _attend_join[(rows, batch)](
            parts, sums, out, rows, splits, DIM=dim, SPLITS=triton.next_power_of_2(splits), num_warps=4
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
def _attend_part(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    parts_ptr,
    sums_ptr,
    rows,
    keys,
    scale,
    kb,
    kt,
    vb,
    vt,
    mb,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
):
    """Some query rows against some keys: unscaled output, largest score and sum of weights, for `_attend_join`.

    Heads are rows of one query matrix, since they share their keys. Ten queries are too few to fill a GPU, and one
    program that walks along all keys waits for memory at every step; so each program takes one stretch of them.
    """
    batch, split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    r, n, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), split * KEYS + tl.arange(0, KEYS), tl.arange(0, DIM)
    live, there = r < rows, n < keys
    q = tl.load(q_ptr + (batch * rows + r)[:, None] * DIM + d[None, :], mask=live[:, None], other=0.0)
    k = tl.load(k_ptr + batch * kb + n[:, None] * kt + d[None, :], mask=there[:, None], other=0.0)
    v = tl.load(v_ptr + batch * vb + n[:, None] * vt + d[None, :], mask=there[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASK:
        scores += tl.load(mask_ptr + batch * mb + n, mask=there, other=0.0).to(tl.float32)[None, :]
    scores = tl.where(there[None, :], scores, -1e38)
    peak = tl.maximum(tl.max(scores, 1), -1e30)  # of masked keys alone: their weights are 0, not 1
    weights = tl.exp(scores - peak[:, None])
    out = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    place = (batch * tl.num_programs(1) + split) * rows + r
    tl.store(parts_ptr + place[:, None] * DIM + d[None, :], out, mask=live[:, None])
    tl.store(sums_ptr + 2 * place, peak, mask=live)
    tl.store(sums_ptr + 2 * place + 1, tl.sum(weights, 1), mask=live)


@triton.jit
def _attend_join(parts_ptr, sums_ptr, out_ptr, rows, splits, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """Adds the parts of one query row, each faded to the largest score of all."""
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s, d = tl.arange(0, SPLITS), tl.arange(0, DIM)
    there = s < splits
    place = (batch * splits + s) * rows + row
    peak = tl.load(sums_ptr + 2 * place, mask=there, other=-1e38)
    total = tl.load(sums_ptr + 2 * place + 1, mask=there, other=0.0)
    part = tl.load(parts_ptr + place[:, None] * DIM + d[None, :], mask=there[:, None], other=0.0)
    fade = tl.exp(peak - tl.max(peak, 0))
    out = tl.sum(part * fade[:, None], 0) / tl.sum(total * fade, 0)
    tl.store(out_ptr + (batch * rows + row) * DIM + d, out.to(out_ptr.dtype.element_ty))
