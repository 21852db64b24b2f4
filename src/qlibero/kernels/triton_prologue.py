"""From a layer's input to its codes on CUDA: scale, block-rotate, permute, block-rotate, absmax, quantize.

The same transform as quant's torch code (see there for what the factors mean), fused because it comes before every
group of linears and each launch costs as much as a small product. One computation for *all* backends on CUDA, `fake`
included, so that codes are equal because they are the same. Three ways, by what there is to do:

* no rotation: one program per row, one launch. Bit for bit what `contract.quantize_activations` gives.
* few rows (an expert's 10 of 1024): one launch. A program computes one block of one row. Every rotated channel is
  needed by exactly one output block, so each program rotates just the channels that its permutation gathers, and
  nothing is computed twice. The program that finishes a row last quantizes it.
* many rows: three launches, each parallel over rows and blocks. The first rotation is stored transposed, so that the
  permutation reads whole runs of tokens; the second stores its result and the row maxima; the third rounds.

Rotations are fp32-grade. The stored blocks are bfloat16, so many rows run on tensor cores: a bfloat16
input as it is, an fp32 one as three bfloat16 pieces that add up to it exactly (8 of its 24 bits each). Products of
bfloat16 are exact in fp32; what remains is the order of the sums and that tensor cores cut aligned terms off where fp32
additions would round: some 2^-22 of a row's largest value, a 30,000th of an int8 step. Neither depends on anything but
the shapes, so codes repeat from run to run. For few rows, rotations are plain fp32 multiply-adds.

A non-finite row gets an infinite scale, hence non-finite outputs: it cannot pass unnoticed, and nobody waits for the
GPU to find out.
"""

# What triton.jit takes is no Python: its types are the compiler's
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlibero.kernels import tiled
from qlibero.kernels.contract import activation_limit
from qlibero.kernels.triton_pdl import INTERPRETED, launch, pdl_wait
from qlibero.kernels.triton_quantizer import codes_of, peak_of, scale_of, where_code

LITTLE = 1 << 15  # values: up to here one launch is the faster way at every K measured on an H100
TILE_ROWS = 64  # tokens of one program where rows are many

Written = tuple[Tensor, Tensor, int, int, float, float]  # codes, scales, K, groups of tokens, clip, limit

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


class Prologue:
    """One input's transform, laid out for these kernels on the device its factors are on.

    factors: any of `scale` (K,), `first` (G, B, B), `order` (K,), `second` (G, B, B), as quant's Transform has them:
    scale float32, blocks bfloat16, order integer; G may be 1 (one block shared by all). B must be a power of two of 16
    to 128.
    """

    def __init__(self, factors: Mapping[str, Tensor], k: int):
        self.k = k
        self.scale, self.order = factors.get("scale"), factors.get("order")
        first, second = factors.get("first"), factors.get("second")
        blocks = [f for f in (first, second) if f is not None]
        self.block: int | None = blocks[0].shape[-1] if blocks else None
        self.inverse = None
        if self.order is not None:
            self.order = self.order.to(torch.int32).contiguous()
            self.inverse = torch.argsort(self.order.long()).to(torch.int32)
        self.first_shared, self.second_shared = (
            f is not None and f.shape[0] == 1 and k > f.shape[-1] for f in (first, second)
        )
        self.first = self.second = None
        if first is not None:  # row p: what makes the channel that ends at place p after the permutation
            rows = first.transpose(1, 2).reshape(-1, first.shape[-1])
            self.first = (rows if self.first_shared or self.order is None else rows[self.order.long()]).contiguous()
        if second is not None:
            self.second = second.contiguous()
        if blocks:
            device = blocks[0].device
            self._peak, self._arrived = (torch.zeros(LITTLE // k, dtype=torch.int32, device=device) for _ in range(2))

    @staticmethod
    def unfit(factors: Mapping[str, Tensor]) -> str | None:
        """Why these factors need the torch code instead, or None."""
        blocks = [f for name, f in factors.items() if name in ("first", "second")]
        if any(f.dtype != torch.bfloat16 for f in blocks):
            return "rotation blocks that are not in bfloat16, as stored ones are"
        sizes = {f.shape[-1] for f in blocks}
        if len(sizes) > 1:
            return f"the two rotations have different block sizes {sorted(sizes)}"
        for size in sizes:
            if size < 16 or size > 128 or size & (size - 1):
                return f"rotation blocks of {size} channels; the fused kernel takes 16, 32, 64 and 128"
        return None

    def __call__(self, x: Tensor, bits: int = 8, clip: float = 1.0, *, in_tiles: bool = False) -> tuple[Tensor, Tensor]:
        """x (M, K) of any float dtype → codes int8 (M, K), or their image (`tiled.py`), and scales fp32 (M,)."""
        x = x.contiguous()
        (m, k), limit = x.shape, float(activation_limit(bits))
        codes = tiled.empty(m, k, x.device) if in_tiles else torch.empty((m, k), dtype=torch.int8, device=x.device)
        scales = torch.empty(m, dtype=torch.float32, device=x.device)
        to = (codes, scales, k, -(-m // tiled.TOKENS), clip, limit)
        options = {"TILED": in_tiles, **launch(x.device, m)}
        if self.block is None:
            width = triton.next_power_of_2(k)
            plain_kernel[(m,)](
                x,
                _or(self.scale, x),
                _or(self.order, x),
                *to,
                HAS_SCALE=self.scale is not None,
                HAS_ORDER=self.order is not None,
                WIDTH=width,
                num_warps=4 if width <= 4096 else 8,
                **options,
            )
        elif m * k <= LITTLE:
            self._little(x, self.block, to, options)
        else:
            self._much(x, self.block, to, options)
        return codes, scales

    def _little(self, x: Tensor, block: int, to: Written, options: dict[str, bool]) -> None:
        m, k = x.shape
        y = torch.empty((m, k), dtype=torch.float32, device=x.device)
        fused_small_m_kernel[(m, k // block)](
            x,
            _or(self.scale, x),
            _or(self.first, x),
            _or(self.order, x),
            _or(self.second, x),
            y,
            self._peak,
            self._arrived,
            *to,
            HAS_SCALE=self.scale is not None,
            HAS_FIRST=self.first is not None,
            FIRST_SHARED=self.first_shared,
            HAS_ORDER=self.order is not None,
            HAS_SECOND=self.second is not None,
            SECOND_SHARED=self.second_shared,
            B=block,
            CHUNK=min(triton.next_power_of_2(k), 4096),
            num_warps=4 if block <= 64 else 8,
            **options,
        )

    def _much(self, x: Tensor, block: int, to: Written, last: dict[str, bool]) -> None:
        (m, k), tiles = x.shape, triton.cdiv(x.shape[0], TILE_ROWS)
        grid, padded = (tiles, k // block), tiles * TILE_ROWS
        # No multiply-add may skip the rounding of a scaled input: its pieces must add up to what was rounded.
        # A block of 128 is taken in by quarters: whole, its pieces would not fit in Ampere's registers.
        options = dict(
            BM=TILE_ROWS,
            B=block,
            DEPTH=min(block, 4096 // block),
            num_warps=4 if block <= 64 else 8,
            enable_fp_fusion=False,
            **launch(x.device, m),
        )
        z, strides, scale = x, (k, 1), self.scale
        if self.first is not None:
            peak = torch.empty(padded, dtype=torch.int32, device=x.device)
            z, strides, scale = torch.empty((k, padded), dtype=torch.float32, device=x.device), (1, padded), None
            first_kernel[grid](
                x,
                _or(self.scale, x),
                self.first,
                _or(self.inverse, x),
                z,
                peak,
                m,
                k,
                padded,
                HAS_SCALE=self.scale is not None,
                FIRST_SHARED=self.first_shared,
                HAS_ORDER=self.order is not None,
                **options,
            )
        else:
            peak = torch.zeros(padded, dtype=torch.int32, device=x.device)
        if self.second is None:
            options["DEPTH"] = block
        y = torch.empty((m, k), dtype=torch.float32, device=x.device)
        second_kernel[grid](
            z,
            _or(scale, x),
            _or(self.order, x),
            _or(self.second, x),
            y,
            peak,
            m,
            k,
            *strides,
            HAS_SCALE=scale is not None,
            HAS_ORDER=self.order is not None,
            HAS_SECOND=self.second is not None,
            SECOND_SHARED=self.second_shared,
            WHOLE=z is not x,
            **options,
        )
        quantize_kernel[(m, triton.cdiv(k, 1024))](y, peak, *to, CHUNK=1024, num_warps=4, **last)


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    return placeholder if tensor is None else tensor
