"""Attention with one K/V head in Triton: heads are rows of one query matrix, since they share their keys.

Few queries (a flow step: 8 heads of 10 tokens) cannot fill a GPU, so keys are cut too, and a second kernel joins the
parts. Many (a prefix) walk along all keys, a tile of queries a program. A library's kernels, given a mask and a head
of 256 channels, take twice as long at a batch of one.

Imports triton at the top, as `triton_fused_ops.py` does.
"""

# What triton.jit takes is no Python: its types are the compiler's
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlibero.kernels.triton_pdl import launch, pdl_wait, prefetch

FEW_QUERIES = 512
"""Rows of the query matrix (heads · positions) up to which keys are cut."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """See `layers.attend`."""
    few = q.shape[1] * q.shape[2] <= FEW_QUERIES
    return (_few if few else _many)(q.contiguous(), k, v, mask).flatten(2)


def _many(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    batch, length, heads, dim = q.shape
    rows, out = length * heads, torch.empty_like(q)
    roomy = q.element_size() == 2 and _shared_memory(q.device) >= 200 << 10
    wide = roomy and triton.cdiv(rows, 64) * batch > 264  # two programs for each of an H100's multiprocessors
    _attend[(triton.cdiv(rows, 128 if wide else 64), batch)](
        q,
        k,
        v,
        k if mask is None else mask,
        out,
        rows,
        k.shape[1],
        dim**-0.5,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        0 if mask is None else mask.stride(0),
        ROWS=128 if wide else 64,
        DIM=dim,
        KEYS=64 if roomy else 32,
        MASK=mask is not None,
        num_warps=8 if wide else 4,
        num_stages=2,
        **launch(q.device, batch * length),
    )
    return out


def _few(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    batch, length, heads, dim = q.shape
    rows, keys = length * heads, k.shape[1]
    at_once = 64 if dim >= 64 and q.element_size() == 2 else 32
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
        **launch(q.device, batch * length),
    )
    _attend_join[(rows, batch)](
        parts,
        sums,
        out,
        rows,
        splits,
        DIM=dim,
        SPLITS=triton.next_power_of_2(splits),
        num_warps=4,
        **launch(q.device, batch * length),
    )
    return out


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have."""
    if device.type != "cuda":
        return 0
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the field
    return int(properties.shared_memory_per_block_optin)


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
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
    OVERLAP: tl.constexpr,
):
    """Some query rows against all keys, some at a time (Dao, FlashAttention-2, arXiv:2307.08691, algorithm 1)."""
    pdl_wait(OVERLAP)
    batch = tl.program_id(1).to(tl.int64)
    r, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    place = (batch * rows + r)[:, None] * DIM + d[None, :]
    q = tl.load(q_ptr + place, mask=(r < rows)[:, None], other=0.0)
    out, total = tl.zeros((ROWS, DIM), tl.float32), tl.zeros((ROWS,), tl.float32)
    peak = tl.full((ROWS,), -1e30, tl.float32)
    for first in range(0, keys, KEYS):
        n = first + tl.arange(0, KEYS)
        there = n < keys
        k = tl.load(k_ptr + batch * kb + n[:, None] * kt + d[None, :], mask=there[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASK:
            scores += tl.load(mask_ptr + batch * mb + n, mask=there, other=0.0).to(tl.float32)[None, :]
        scores = tl.where(there[None, :], scores, -1e38)
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights, fade = tl.exp(scores - higher[:, None]), tl.exp(peak - higher)
        v = tl.load(v_ptr + batch * vb + n[:, None] * vt + d[None, :], mask=there[:, None], other=0.0)
        out = tl.dot(weights.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
        total, peak = total * fade + tl.sum(weights, 1), higher
    out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, out, mask=(r < rows)[:, None])


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
    OVERLAP: tl.constexpr,
):
    """Some query rows against some keys: unscaled output, largest score and sum of weights, for `_attend_join`.

    Heads are rows of one query matrix, since they share their keys. Ten queries are too few to fill a GPU, and one
    program that walks along all keys waits for memory at every step; so each program takes one stretch of them.
    """
    batch, split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    r, n, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), split * KEYS + tl.arange(0, KEYS), tl.arange(0, DIM)
    live, there = r < rows, n < keys
    k_ptrs = k_ptr + batch * kb + n[:, None] * kt + d[None, :]
    v_ptrs = v_ptr + batch * vb + n[:, None] * vt + d[None, :]
    # Nearly all keys and values have been there since the prefix; that the last may not yet be does no harm.
    near, lines = tl.minimum(n, keys - 1)[:, None], tl.arange(0, max(DIM // 64, 1))[None, :] * 64
    prefetch(k_ptr + batch * kb + near * kt + lines, OVERLAP)
    prefetch(v_ptr + batch * vb + near * vt + lines, OVERLAP)
    pdl_wait(OVERLAP)
    q = tl.load(q_ptr + (batch * rows + r)[:, None] * DIM + d[None, :], mask=live[:, None], other=0.0)
    k, v = tl.load(k_ptrs, mask=there[:, None], other=0.0), tl.load(v_ptrs, mask=there[:, None], other=0.0)
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
def _attend_join(
    parts_ptr, sums_ptr, out_ptr, rows, splits, DIM: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr
):
    """Adds the parts of one query row, each faded to the largest score of all."""
    pdl_wait(OVERLAP)
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
