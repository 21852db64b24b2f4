"""The W4A8 matrix product in Triton: int4 weights unpacked in registers, int8 tensor cores, the contract's epilogue.

    out[M, N] = epilogue(Σ_k x[m, k] · w[n, k])        x int8 (M, K), w packed khalf (N, K/2), see packing.py

Three ideas carry it:

* A byte's two nibbles, shifted and masked, are 16·w as int8: three ALU operations per eight weights. The accumulator is
  16 times too large, |16·acc| < 2^31 up to K = 132,104, and an arithmetic shift by 4 makes it exact again.
* The product is computed transposed: weights are the A operand, so that their unpacked form never leaves registers, and
  tokens are the MMA's n dimension, so that few tokens waste little.
* Split-K writes *integer* partial sums, which a second small kernel adds and scales. Scaling before adding (or atomics
  in floating point) would make the result depend on the order, and a bit-exact contract impossible.

fp contraction is switched off at launch: an FMA in the epilogue would round once where the contract rounds twice.
Imports triton at the top, so import this module only when `triton_w4a8.missing()` says there is one.
"""

# What triton.jit takes is no Python: its types are the compiler's
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlibero.kernels.triton_pdl import INTERPRETED, launch, pdl_wait, prefetch
from qlibero.kernels.triton_tiles import Tile


@triton.jit
def _unpack16(packed, USE_ASM: tl.constexpr):
    """Both nibbles of each byte as int8 values 16·w."""
    if USE_ASM:
        lo, hi = tl.inline_asm_elementwise(
            asm="{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $0, t, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }",
            constraints="=r,=r,r",
            args=[packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        lo = (packed << 4).to(tl.int8)
        hi = (packed & -16).to(tl.int8)
    return lo, hi


@triton.jit
def _tile_origin(M, N, BM: tl.constexpr, BN: tl.constexpr, SWIZZLE: tl.constexpr):
    """Program id → tile, in groups of SWIZZLE weight tiles so that neighbours share activations in cache."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    width = SWIZZLE * tiles_m
    first = (pid // width) * SWIZZLE
    height = tl.minimum(tiles_n - first, SWIZZLE)
    return (pid % width) // height, first + (pid % width) % height


@triton.jit(do_not_specialize=["M", "STEPS"])
def gemm_kernel(
    x_ptr,
    w_ptr,
    sx_ptr,
    sw_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K2,
    STEPS,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SWIZZLE: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """SCALE: out (M, N) floats. Otherwise out (slices, M, N) int32, a partial sum for each STEPS·BK bytes along K.

    Grid: (tiles, slices). STEPS is a run-time number, so that one compiled kernel serves every split.
    """
    pid_m, pid_n = _tile_origin(M, N, BM, BN, SWIZZLE)
    pid_k = tl.program_id(1)
    rn = pid_n * BN + tl.arange(0, BN)
    rm = pid_m * BM + tl.arange(0, BM)
    rk = tl.arange(0, BK)
    # Rows beyond the edge read a row that exists and are not stored: cheaper than masks on every load.
    rn_safe = rn % N
    rm_safe = rm % M
    # K2 is the argument, not K, so that its divisibility by 16 is known and loads are 16 bytes wide.
    k = pid_k * STEPS * BK
    w_ptrs = w_ptr + rn_safe[:, None].to(tl.int64) * K2 + (k + rk)[None, :]
    x_ptrs = x_ptr + rm_safe[None, :].to(tl.int64) * (K2 * 2) + (k + rk)[:, None]
    if EVEN_K:  # packed bytes, so a line is 128 of them
        for line in range(0, STEPS * BK, 128):
            prefetch(w_ptr + rn_safe.to(tl.int64) * K2 + k + line, OVERLAP)
    pdl_wait(OVERLAP)
    acc = tl.zeros((BN, BM), dtype=tl.int32)
    for step in range(0, STEPS):
        if EVEN_K:
            w = tl.load(w_ptrs)
            x_lo = tl.load(x_ptrs)
            x_hi = tl.load(x_ptrs + K2)
        else:
            inside = (k + step * BK + rk) < K2
            w = tl.load(w_ptrs, mask=inside[None, :], other=0)
            x_lo = tl.load(x_ptrs, mask=inside[:, None], other=0)
            x_hi = tl.load(x_ptrs + K2, mask=inside[:, None], other=0)
        lo, hi = _unpack16(w, USE_ASM)
        acc = tl.dot(lo, x_lo, acc, out_dtype=tl.int32)
        acc = tl.dot(hi, x_hi, acc, out_dtype=tl.int32)
        w_ptrs += BK
        x_ptrs += BK
    acc = acc >> 4
    inside = (rm[None, :] < M) & (rn[:, None] < N)
    place = rm[None, :].to(tl.int64) * N + rn[:, None]
    if SCALE:
        y = acc.to(tl.float32) * tl.load(sx_ptr + rm_safe)[None, :]
        y = y * tl.load(sw_ptr + rn_safe)[:, None]
        if HAS_BIAS:
            y = y + tl.load(bias_ptr + rn_safe).to(tl.float32)[:, None]
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out_ptr + pid_k.to(tl.int64) * M * N + place, acc, mask=inside)


@triton.jit(do_not_specialize=["M"])
def grouped_gemm_kernel(
    x_ptr,
    w_ptr,
    sx_ptr,
    sw_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K2,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HALF: tl.constexpr,
    SWIZZLE: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    USE_ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """K-groups of 2·HALF codes, each packed khalf by itself. SCALE: out (M, N); otherwise out (G, M, N) int32."""
    pid_m, pid_n = _tile_origin(M, N, BM, BN, SWIZZLE)
    rn = pid_n * BN + tl.arange(0, BN)
    rm = pid_m * BM + tl.arange(0, BM)
    rk = tl.arange(0, BK)
    rn_safe = rn % N
    rm_safe = rm % M
    groups = K2 // HALF
    w_ptrs = w_ptr + rn_safe[:, None].to(tl.int64) * K2 + rk[None, :]
    x_ptrs = x_ptr + rm_safe[None, :].to(tl.int64) * (K2 * 2) + rk[:, None]
    inside = (rm[None, :] < M) & (rn[:, None] < N)
    place = rm[None, :].to(tl.int64) * N + rn[:, None]
    y = tl.zeros((BN, BM), dtype=tl.float32)
    pdl_wait(OVERLAP)
    for g in range(0, groups):
        acc = tl.zeros((BN, BM), dtype=tl.int32)
        for k in tl.static_range(0, HALF, BK):
            lo, hi = _unpack16(tl.load(w_ptrs + g * HALF + k), USE_ASM)
            acc = tl.dot(lo, tl.load(x_ptrs + g * (2 * HALF) + k), acc, out_dtype=tl.int32)
            acc = tl.dot(hi, tl.load(x_ptrs + g * (2 * HALF) + HALF + k), acc, out_dtype=tl.int32)
        acc = acc >> 4
        if SCALE:
            y = y + acc.to(tl.float32) * tl.load(sw_ptr + rn_safe * groups + g)[:, None]
        else:
            tl.store(out_ptr + tl.cast(g, tl.int64) * M * N + place, acc, mask=inside)
    if SCALE:
        y = y * tl.load(sx_ptr + rm_safe)[None, :]
        if HAS_BIAS:
            y = y + tl.load(bias_ptr + rn_safe).to(tl.float32)[:, None]
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "SLICES"])
def scale_kernel(
    partial_ptr,
    sx_ptr,
    sw_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    SLICES,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Adds the integer partial sums of split-K and applies the epilogue. Grid: (M, N / BLOCK)."""
    pdl_wait(OVERLAP)
    m = tl.program_id(0)
    rn = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = rn < N
    place = m.to(tl.int64) * N + rn
    acc = tl.load(partial_ptr + place, mask=inside, other=0)
    for s in range(1, SLICES):
        acc += tl.load(partial_ptr + tl.cast(s, tl.int64) * M * N + place, mask=inside, other=0)
    y = acc.to(tl.float32) * tl.load(sx_ptr + m)
    y = y * tl.load(sw_ptr + rn, mask=inside, other=0.0)
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + rn, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


def gemm(
    codes_x: Tensor, packed: Tensor, s_x: Tensor, s_w: Tensor, bias: Tensor | None, out_dtype: torch.dtype, tile: Tile
) -> Tensor:
    """(M, N) in out_dtype. codes_x int8 (M, K) contiguous, packed int8 (N, K/2), s_x fp32 (M,), s_w fp32 (N,)."""
    if tile.split_k == 1:
        out = torch.empty((codes_x.shape[0], packed.shape[0]), dtype=out_dtype, device=codes_x.device)
        _launch_gemm(codes_x, packed, s_x, s_w, bias, out, tile)
        return out
    return scale(accumulate(codes_x, packed, tile), s_x, s_w, bias, out_dtype)


def scale(partial: Tensor, s_x: Tensor, s_w: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The epilogue in one launch: partial sums (S, M, N), int32 or fp32-held integers, to (M, N) in out_dtype."""
    slices, m, n = partial.shape
    out = torch.empty((m, n), dtype=out_dtype, device=partial.device)
    block = min(1024, triton.next_power_of_2(n))
    scale_kernel[(m, triton.cdiv(n, block))](
        partial,
        s_x,
        s_w,
        s_w if bias is None else bias,
        out,
        m,
        n,
        slices,
        HAS_BIAS=bias is not None,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
        **launch(partial.device, m),
    )
    return out


def accumulate(codes_x: Tensor, packed: Tensor, tile: Tile) -> Tensor:
    """The integers themselves, one partial sum per slice of K: int32 (split_k, M, N)."""
    shape = (tile.split_k, codes_x.shape[0], packed.shape[0])
    out = torch.empty(shape, dtype=torch.int32, device=codes_x.device)
    _launch_gemm(codes_x, packed, None, None, None, out, tile)
    return out


def _launch_gemm(
    codes_x: Tensor,
    packed: Tensor,
    s_x: Tensor | None,
    s_w: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile,
) -> None:
    (m, k), n = codes_x.shape, packed.shape[0]
    grid = (triton.cdiv(m, tile.tokens) * triton.cdiv(n, tile.outputs), tile.split_k)
    steps, scale = triton.cdiv(k // 2, tile.depth * tile.split_k), s_x is not None
    gemm_kernel[grid](
        codes_x,
        packed,
        s_x if scale else out,
        s_w if scale else out,
        out if bias is None else bias,
        out,
        m,
        n,
        k // 2,
        steps,
        BM=tile.tokens,
        BN=tile.outputs,
        BK=tile.depth,
        SWIZZLE=8,
        SCALE=scale,
        HAS_BIAS=bias is not None,
        EVEN_K=(k // 2) % (tile.depth * tile.split_k) == 0,
        USE_ASM=not INTERPRETED,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
        **launch(codes_x.device, m),
    )


def grouped_gemm(
    codes_x: Tensor,
    packed: Tensor,
    group_size: int,
    s_x: Tensor | None,
    s_w: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile,
) -> Tensor:
    """(M, N) with s_w (N, G); without scales the accumulators, int32 (G, M, N)."""
    (m, k), n = codes_x.shape, packed.shape[0]
    scale = s_x is not None
    shape = (m, n) if scale else (k // group_size, m, n)
    out = torch.empty(shape, dtype=out_dtype if scale else torch.int32, device=codes_x.device)
    half = group_size // 2
    grid = (triton.cdiv(m, tile.tokens) * triton.cdiv(n, tile.outputs),)
    grouped_gemm_kernel[grid](
        codes_x,
        packed,
        s_x if scale else out,
        s_w if scale else out,
        out if bias is None else bias,
        out,
        m,
        n,
        k // 2,
        BM=tile.tokens,
        BN=tile.outputs,
        BK=min(tile.depth, half),
        HALF=half,
        SWIZZLE=8,
        SCALE=scale,
        HAS_BIAS=bias is not None,
        USE_ASM=not INTERPRETED,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
        **launch(codes_x.device, m),
    )
    return out
