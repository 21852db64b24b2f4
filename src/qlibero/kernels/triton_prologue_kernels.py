"""The prologue's GPU programs: block-rotate, permute, block-rotate, absmax, quantize (see `triton_prologue.py`).

Factors are as `Prologue` lays them out; `HAS_…` says which are there. Codes are written row by row or as their image
(`tiled.py`).
"""

# What triton.jit takes is no Python: its types are the compiler's
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from qlibero.kernels.triton_pdl import INTERPRETED, pdl_wait
from qlibero.kernels.triton_quantizer import codes_of, peak_of, scale_of, where_code

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def plain_kernel(
    x_ptr,
    scale_ptr,
    order_ptr,
    codes_ptr,
    s_ptr,
    K,
    groups,
    clip,
    limit,
    HAS_SCALE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    WIDTH: tl.constexpr,
    TILED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """No rotation. Grid: one program per row."""
    pdl_wait(OVERLAP)
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    inside = k < K
    source = k
    if HAS_ORDER:
        source = tl.load(order_ptr + k, mask=inside, other=0)
    y = tl.load(x_ptr + m * K + source, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        y = y * tl.load(scale_ptr + source, mask=inside, other=0.0)
    s = scale_of(peak_of(y, 0), clip, limit)
    tl.store(codes_ptr + where_code(m, k, K, groups, TILED), codes_of(y, s, limit), mask=inside)
    tl.store(s_ptr + m, s)


@triton.jit
def fused_small_m_kernel(
    x_ptr,
    scale_ptr,
    first_ptr,
    order_ptr,
    second_ptr,
    y_ptr,
    peak_ptr,
    arrived_ptr,
    codes_ptr,
    s_ptr,
    K,
    groups,
    clip,
    limit,
    HAS_SCALE: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    FIRST_SHARED: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    SECOND_SHARED: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    TILED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid: (rows, K / B). `peak` (float bits) and `arrived` are zero before, and left zero."""
    m = tl.program_id(0)
    g = tl.program_id(1)
    i = tl.arange(0, B)
    j = tl.arange(0, B)
    place = g * B + i
    source = place
    if HAS_ORDER:
        source = tl.load(order_ptr + place)
    if HAS_SECOND:  # asked for before the first rotation is waited for
        block = 0 if SECOND_SHARED else g * B * B
        second = tl.load(second_ptr + block + i[:, None] * B + j[None, :])
    if HAS_FIRST:
        row = source % B if FIRST_SHARED else place
        first = tl.load(first_ptr + row[:, None] * B + j[None, :]).to(tl.float32)
    pdl_wait(OVERLAP)
    if HAS_FIRST:
        channel = (source // B * B)[:, None] + j[None, :]  # the input block that each gathered channel is made of
        x = tl.load(x_ptr + m * K + channel).to(tl.float32)
        if HAS_SCALE:
            x = x * tl.load(scale_ptr + channel)
        y = tl.sum(x * first, axis=1)
    else:
        y = tl.load(x_ptr + m * K + source).to(tl.float32)
        if HAS_SCALE:
            y = y * tl.load(scale_ptr + source)
    if HAS_SECOND:
        y = tl.sum(y[:, None] * second.to(tl.float32), axis=0)
    tl.store(y_ptr + m * K + g * B + j, y)
    # Bits of non-negative floats order as integers. Relaxed: the arrival below orders it before the last program's
    # look.
    tl.atomic_max(peak_ptr + m, peak_of(y, 0).to(tl.int32, bitcast=True), sem="relaxed")
    tl.debug_barrier()  # the whole block is stored before its arrival is announced
    if tl.atomic_add(arrived_ptr + m, 1) == tl.num_programs(1) - 1:
        s = scale_of(tl.load(peak_ptr + m, cache_modifier=".cg").to(tl.float32, bitcast=True), clip, limit)
        for start in range(0, K, CHUNK):
            k = start + tl.arange(0, CHUNK)
            done = tl.load(y_ptr + m * K + k, mask=k < K, other=0.0, cache_modifier=".cg")
            tl.store(codes_ptr + where_code(m, k, K, groups, TILED), codes_of(done, s, limit), mask=k < K)
        tl.store(s_ptr + m, s)
        tl.debug_barrier()  # every thread has read the maximum before it is wiped
        tl.store(peak_ptr + m, 0)
        tl.store(arrived_ptr + m, 0)


@triton.jit
def _product(z, rotation, y):
    """z · rotation + y of bfloat16 operands; in the interpreter (no bfloat16 in numpy) of the same numbers."""
    if _INTERPRETED:
        return tl.dot(z.to(tl.float32), rotation.to(tl.float32), y)
    return tl.dot(z, rotation, y)


@triton.jit
def _rotate(z, rotation, y):
    """z (m, i) · rotation (i, j) + y → fp32 (m, j)."""
    if z.dtype == tl.bfloat16:
        return _product(z, rotation, y)
    z = z.to(tl.float32)
    high = z.to(tl.bfloat16)
    rest = z - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return _product(high, rotation, _product(middle, rotation, _product(low, rotation, y)))  # small to large


@triton.jit(do_not_specialize=["M"])
def first_kernel(
    x_ptr,
    scale_ptr,
    first_ptr,
    inverse_ptr,
    z_ptr,
    peak_ptr,
    M,
    K,
    STRIDE,
    HAS_SCALE: tl.constexpr,
    FIRST_SHARED: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BM: tl.constexpr,
    B: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """First rotation, stored transposed: z (K, STRIDE), whole tiles. Also zeroes `peak` for the second."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    g = tl.program_id(1)
    j = tl.arange(0, B)
    row = j
    if not FIRST_SHARED:
        row = g * B + j
        if HAS_ORDER:
            row = tl.load(inverse_ptr + row)
    pdl_wait(OVERLAP)
    z = tl.zeros((BM, B), tl.float32)
    for start in tl.static_range(0, B, DEPTH):
        i = start + tl.arange(0, DEPTH)
        x = tl.load(x_ptr + rm[:, None].to(tl.int64) * K + (g * B + i)[None, :], mask=rm[:, None] < M, other=0.0)
        if HAS_SCALE:
            x = x.to(tl.float32) * tl.load(scale_ptr + g * B + i)[None, :]
        z = _rotate(x, tl.load(first_ptr + row[None, :] * B + i[:, None]), z)
    tl.store(z_ptr + (g * B + j)[:, None].to(tl.int64) * STRIDE + rm[None, :], tl.trans(z))
    if g == 0:
        tl.store(peak_ptr + rm, tl.zeros((BM,), tl.int32))


@triton.jit(do_not_specialize=["M"])
def second_kernel(
    z_ptr,
    scale_ptr,
    order_ptr,
    second_ptr,
    y_ptr,
    peak_ptr,
    M,
    K,
    STRIDE_M,
    STRIDE_K,
    HAS_SCALE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    SECOND_SHARED: tl.constexpr,
    WHOLE: tl.constexpr,
    BM: tl.constexpr,
    B: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Gather and second rotation → y (M, K) fp32, and the row maxima (float bits) where `peak` was zero.

    z[m, k] lies at m·STRIDE_M + k·STRIDE_K: the first's output, which has WHOLE tiles of rows, or the input.
    """
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    g = tl.program_id(1)
    j = tl.arange(0, B)
    pdl_wait(OVERLAP)
    y = tl.zeros((BM, B), tl.float32)
    for start in tl.static_range(0, B, DEPTH):
        i = start + tl.arange(0, DEPTH)
        if HAS_SECOND:  # asked for before the order is waited for
            rotation = tl.load(second_ptr + (0 if SECOND_SHARED else g * B * B) + i[:, None] * B + j[None, :])
        source = g * B + i
        if HAS_ORDER:
            source = tl.load(order_ptr + source)
        where = rm[:, None].to(tl.int64) * STRIDE_M + source[None, :].to(tl.int64) * STRIDE_K
        if WHOLE:
            z = tl.load(z_ptr + where)
        else:
            z = tl.load(z_ptr + where, mask=rm[:, None] < M, other=0.0)
        if HAS_SCALE:
            z = z.to(tl.float32) * tl.load(scale_ptr + source)[None, :]
        if HAS_SECOND:
            y = _rotate(z, rotation, y)
        else:
            y = z.to(tl.float32)  # DEPTH is B then
    # Bits of non-negative floats order as integers. Relaxed: the next launch comes after all of it anyway.
    tl.atomic_max(peak_ptr + rm, peak_of(y, 1).to(tl.int32, bitcast=True), sem="relaxed")
    tl.store(y_ptr + rm[:, None].to(tl.int64) * K + (g * B + j)[None, :], y, mask=rm[:, None] < M)


@triton.jit
def quantize_kernel(
    y_ptr,
    peak_ptr,
    codes_ptr,
    s_ptr,
    K,
    groups,
    clip,
    limit,
    CHUNK: tl.constexpr,
    TILED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Rounds transformed rows whose maxima are known. Grid: (rows, K / CHUNK)."""
    pdl_wait(OVERLAP)
    m = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    s = scale_of(tl.load(peak_ptr + m).to(tl.float32, bitcast=True), clip, limit)
    y = tl.load(y_ptr + m * K + k, mask=k < K, other=0.0)
    tl.store(codes_ptr + where_code(m, k, K, groups, TILED), codes_of(y, s, limit), mask=k < K)
    if tl.program_id(1) == 0:
        tl.store(s_ptr + m, s)
