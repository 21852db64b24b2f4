"""From a layer's input to its codes on CUDA: scale, block-rotate, permute, block-rotate, absmax, quantize.

The same transform as quant's torch code (see there for what the factors mean), fused because it comes before every
group of linears and each launch costs as much as a small product. One computation for *all* backends on CUDA, `fake`
included, so that codes are equal because they are the same. Three ways, by what there is to do:

* no rotation: one program per row, one launch. Bit for bit what `contract.quantize_activations` gives.
* few tokens (an expert's 10): one launch. A program computes one block of one row. Every rotated channel is needed by
  exactly one output block, so each program rotates just the channels that its permutation gathers, and nothing is
  computed twice. The program that finishes a row last quantizes it.
* many tokens: a product per rotation, then the quantizer; three launches, each parallel over rows and blocks. The
  first product is stored transposed, so that the permutation reads whole runs of tokens.

Rotations are fp32 products without TF32. A non-finite row gets an infinite scale, hence non-finite outputs: it cannot
pass unnoticed, and nobody waits for the GPU to find out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlibero.kernels.contract import EPS, activation_limit

FEW_TOKENS = 64  # up to here a row is cheap enough to be done block by block, without sharing a block's rotation
ROWS = 32  # tokens of one program when there are many
DEPTH = 32  # channels of a rotation taken in at a time: whole blocks of 128 would not fit in registers
PRECISION = "ieee"  # fp32 multiply-adds; "tf32x3" would use tensor cores, to some 21 bits

_EPS = tl.constexpr(EPS)
_ROUND = tl.constexpr(12582912.0)  # 1.5·2^23: adding and subtracting it rounds |v| < 2^22 to integers, half to even


@triton.jit
def _peak(y, axis: tl.constexpr):
    """Largest magnitude along an axis; infinite when anything is not finite (tl.max would skip a NaN)."""
    size = tl.abs(y)
    return tl.max(tl.where(size < float("inf"), size, float("inf")), axis)


@triton.jit
def _scale(peak, clip, limit):
    return tl.div_rn(tl.maximum(peak * clip, _EPS), limit)


@triton.jit
def _codes(y, scale, limit):
    v = tl.minimum(tl.maximum(tl.div_rn(y, scale), -limit), limit)
    return ((v + _ROUND) - _ROUND).to(tl.int8)


@triton.jit
def plain_kernel(
    x_ptr, scale_ptr, order_ptr, codes_ptr, s_ptr, K, clip, limit,
    HAS_SCALE: tl.constexpr, HAS_ORDER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """No rotation. Grid: one program per row."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    inside = k < K
    source = k
    if HAS_ORDER:
        source = tl.load(order_ptr + k, mask=inside, other=0)
    y = tl.load(x_ptr + m * K + source, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        y = y * tl.load(scale_ptr + source, mask=inside, other=0.0)
    s = _scale(_peak(y, 0), clip, limit)
    tl.store(codes_ptr + m * K + k, _codes(y, s, limit), mask=inside)
    tl.store(s_ptr + m, s)


@triton.jit
def few_kernel(
    x_ptr, scale_ptr, first_ptr, order_ptr, second_ptr, y_ptr, peak_ptr, arrived_ptr, codes_ptr, s_ptr, K, clip, limit,
    HAS_SCALE: tl.constexpr, HAS_FIRST: tl.constexpr, FIRST_SHARED: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_SECOND: tl.constexpr, SECOND_SHARED: tl.constexpr, B: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, K / B). `peak` (float bits) and `arrived` are zero before, and left zero."""
    m = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    i = tl.arange(0, B)
    j = tl.arange(0, B)
    place = g * B + i
    source = place
    if HAS_ORDER:
        source = tl.load(order_ptr + place)
    if HAS_FIRST:
        channel = (source // B * B)[:, None] + j[None, :]  # the input block that each gathered channel is made of
        x = tl.load(x_ptr + m * K + channel).to(tl.float32)
        if HAS_SCALE:
            x = x * tl.load(scale_ptr + channel)
        row = source % B if FIRST_SHARED else place
        y = tl.sum(x * tl.load(first_ptr + row[:, None] * B + j[None, :]), axis=1)
    else:
        y = tl.load(x_ptr + m * K + source).to(tl.float32)
        if HAS_SCALE:
            y = y * tl.load(scale_ptr + source)
    if HAS_SECOND:
        block = 0 if SECOND_SHARED else g * B * B
        y = tl.sum(y[:, None] * tl.load(second_ptr + block + i[:, None] * B + j[None, :]), axis=0)
    tl.store(y_ptr + m * K + g * B + j, y)
    tl.atomic_max(peak_ptr + m, _peak(y, 0).to(tl.int32, bitcast=True))  # bits of non-negative floats order as integers
    tl.debug_barrier()  # the whole block is stored before its arrival is announced
    if tl.atomic_add(arrived_ptr + m, 1) == tl.num_programs(1) - 1:
        s = _scale(tl.atomic_xchg(peak_ptr + m, 0).to(tl.float32, bitcast=True), clip, limit)
        tl.atomic_xchg(arrived_ptr + m, 0)
        for start in range(0, K, CHUNK):
            k = start + tl.arange(0, CHUNK)
            done = tl.load(y_ptr + m * K + k, mask=k < K, other=0.0, cache_modifier=".cg")
            tl.store(codes_ptr + m * K + k, _codes(done, s, limit), mask=k < K)
        tl.store(s_ptr + m, s)


@triton.jit(do_not_specialize=["M"])
def first_kernel(
    x_ptr, scale_ptr, first_ptr, inverse_ptr, y_ptr, peak_ptr, M, K, STRIDE, WIDTH,
    HAS_SCALE: tl.constexpr, FIRST_SHARED: tl.constexpr, HAS_ORDER: tl.constexpr, BM: tl.constexpr, B: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """First rotation of many tokens, stored transposed: y (K, STRIDE). Also zeroes `peak` for the second.

    WIDTH is B again, as a run-time number: a loop of known length is unrolled whole, and blocks of 128 then spill.
    """
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    g = tl.program_id(1)
    i = tl.arange(0, B)
    if FIRST_SHARED:
        row = i
    elif HAS_ORDER:
        row = tl.load(inverse_ptr + g * B + i)
    else:
        row = g * B + i
    y = tl.zeros((BM, B), tl.float32)
    for start in range(0, WIDTH, DEPTH):
        j = start + tl.arange(0, DEPTH)
        channel = g * B + j
        x = tl.load(x_ptr + rm[:, None].to(tl.int64) * K + channel[None, :], mask=rm[:, None] < M, other=0.0).to(tl.float32)
        if HAS_SCALE:
            x = x * tl.load(scale_ptr + channel)[None, :]
        rotation = tl.load(first_ptr + row[None, :] * B + j[:, None]).to(tl.float32)  # (j, i)
        y = tl.dot(x, rotation, y, input_precision=PRECISION)
    tl.store(y_ptr + (g * B + i)[None, :].to(tl.int64) * STRIDE + rm[:, None], y, mask=rm[:, None] < M)
    if g == 0:
        tl.store(peak_ptr + rm, tl.zeros((BM,), tl.int32), mask=rm < M)


@triton.jit(do_not_specialize=["M"])
def second_kernel(
    z_ptr, scale_ptr, order_ptr, second_ptr, y_ptr, peak_ptr, M, K, STRIDE_M, STRIDE_K, WIDTH,
    HAS_SCALE: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_SECOND: tl.constexpr, SECOND_SHARED: tl.constexpr,
    BM: tl.constexpr, B: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gather, second rotation, row maxima. z[m, k] lies at m·STRIDE_M + k·STRIDE_K: the first's output, or the input."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    g = tl.program_id(1)
    j = tl.arange(0, B)
    y = tl.zeros((B, BM), tl.float32)
    for start in range(0, WIDTH, DEPTH):
        i = start + tl.arange(0, DEPTH)
        source = g * B + i
        if HAS_ORDER:
            source = tl.load(order_ptr + source)
        where = rm[None, :].to(tl.int64) * STRIDE_M + source[:, None].to(tl.int64) * STRIDE_K
        z = tl.load(z_ptr + where, mask=rm[None, :] < M, other=0.0).to(tl.float32)  # (i, m)
        if HAS_SCALE:
            z = z * tl.load(scale_ptr + source)[:, None]
        if HAS_SECOND:
            block = 0 if SECOND_SHARED else g * B * B
            rotation = tl.load(second_ptr + block + i[None, :] * B + j[:, None]).to(tl.float32)  # (j, i): y' = Rᵀ·z
            y = tl.dot(rotation, z, y, input_precision=PRECISION)
        else:
            y = z  # DEPTH is B then
    tl.store(y_ptr + rm[None, :].to(tl.int64) * K + (g * B + j)[:, None], y, mask=rm[None, :] < M)
    tl.atomic_max(peak_ptr + rm, _peak(y, 0).to(tl.int32, bitcast=True), mask=rm < M)


@triton.jit
def quantize_kernel(y_ptr, peak_ptr, codes_ptr, s_ptr, K, clip, limit, CHUNK: tl.constexpr):
    """Rounds transformed rows whose maxima are known. Grid: (rows, K / CHUNK)."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    s = _scale(tl.load(peak_ptr + m).to(tl.float32, bitcast=True), clip, limit)
    y = tl.load(y_ptr + m * K + k, mask=k < K, other=0.0)
    tl.store(codes_ptr + m * K + k, _codes(y, s, limit), mask=k < K)
    if tl.program_id(1) == 0:
        tl.store(s_ptr + m, s)


class Prologue:
    """One input's transform, laid out for these kernels on the device its factors are on.

    factors: any of `scale` (K,), `first` (G, B, B), `order` (K,), `second` (G, B, B), as quant's Transform has them:
    scale float32, blocks float32 or bfloat16, order integer; G may be 1 (one block shared by all). B must be a power of two of at least 16.
    """

    def __init__(self, factors: Mapping[str, Tensor], k: int):
        self.k = k
        self.scale, self.order = factors.get("scale"), factors.get("order")
        first, second = factors.get("first"), factors.get("second")
        blocks = [f.shape[-1] for f in (first, second) if f is not None]
        self.block = blocks[0] if blocks else None
        self.inverse = None
        if self.order is not None:
            self.order = self.order.to(torch.int32).contiguous()
            self.inverse = torch.argsort(self.order.long()).to(torch.int32)
        self.first_shared, self.second_shared = (f is not None and f.shape[0] == 1 and k > f.shape[-1] for f in (first, second))
        self.first = self.second = None
        if first is not None:  # row p: what makes the channel that ends at place p after the permutation
            rows = first.transpose(1, 2).reshape(-1, self.block)
            self.first = (rows if self.first_shared or self.order is None else rows[self.order.long()]).contiguous()
        if second is not None:
            self.second = second.contiguous()
        if self.block is not None:
            device = (first if first is not None else second).device
            self._peak = torch.zeros(FEW_TOKENS, dtype=torch.int32, device=device)
            self._arrived = torch.zeros(FEW_TOKENS, dtype=torch.int32, device=device)

    @staticmethod
    def unfit(factors: Mapping[str, Tensor]) -> str | None:
        """Why these factors need the torch code instead, or None."""
        sizes = {f.shape[-1] for name, f in factors.items() if name in ("first", "second")}
        if len(sizes) > 1:
            return f"the two rotations have different block sizes {sorted(sizes)}"
        for size in sizes:
            if size < 16 or size > 128 or size & (size - 1):
                return f"rotation blocks of {size} channels; the fused kernel takes 16, 32, 64 and 128"
        return None

    def __call__(self, x: Tensor, bits: int = 8, clip: float = 1.0) -> tuple[Tensor, Tensor]:
        """x (M, K) of any float dtype → codes int8 (M, K), scales fp32 (M,)."""
        x = x.contiguous()
        (m, k), limit = x.shape, float(activation_limit(bits))
        codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
        scales = torch.empty(m, dtype=torch.float32, device=x.device)
        if self.block is None:
            width = triton.next_power_of_2(k)
            plain_kernel[(m,)](
                x, _or(self.scale, x), _or(self.order, x), codes, scales, k, clip, limit,
                HAS_SCALE=self.scale is not None, HAS_ORDER=self.order is not None, WIDTH=width,
                num_warps=4 if width <= 4096 else 8,
            )  # fmt: skip
        elif m <= FEW_TOKENS:
            self._few(x, codes, scales, clip, limit)
        else:
            self._many(x, codes, scales, clip, limit)
        return codes, scales

    def _few(self, x: Tensor, codes: Tensor, scales: Tensor, clip: float, limit: float) -> None:
        m, k = x.shape
        y = torch.empty((m, k), dtype=torch.float32, device=x.device)
        few_kernel[(m, k // self.block)](
            x, _or(self.scale, x), _or(self.first, x), _or(self.order, x), _or(self.second, x), y, self._peak, self._arrived,
            codes, scales, k, clip, limit,
            HAS_SCALE=self.scale is not None, HAS_FIRST=self.first is not None, FIRST_SHARED=self.first_shared,
            HAS_ORDER=self.order is not None, HAS_SECOND=self.second is not None, SECOND_SHARED=self.second_shared,
            B=self.block, CHUNK=1024, num_warps=4 if self.block <= 64 else 8,
        )  # fmt: skip

    def _many(self, x: Tensor, codes: Tensor, scales: Tensor, clip: float, limit: float) -> None:
        m, k = x.shape
        grid = (triton.cdiv(m, ROWS), k // self.block)
        z, strides, scale = x, (k, 1), self.scale
        if self.first is not None:
            stride = triton.cdiv(m, 16) * 16
            peak = torch.empty(m, dtype=torch.int32, device=x.device)
            z, strides, scale = torch.empty((k, stride), dtype=torch.float32, device=x.device), (1, stride), None
            first_kernel[grid](
                x, _or(self.scale, x), self.first, _or(self.inverse, x), z, peak, m, k, stride, self.block,
                HAS_SCALE=self.scale is not None, FIRST_SHARED=self.first_shared, HAS_ORDER=self.order is not None,
                BM=ROWS, B=self.block, DEPTH=min(DEPTH, self.block), PRECISION=PRECISION, num_warps=4,
            )  # fmt: skip
        else:
            peak = torch.zeros(m, dtype=torch.int32, device=x.device)
        y = torch.empty((m, k), dtype=torch.float32, device=x.device)
        second_kernel[grid](
            z, _or(scale, x), _or(self.order, x), _or(self.second, x), y, peak, m, k, *strides, self.block,
            HAS_SCALE=scale is not None, HAS_ORDER=self.order is not None, HAS_SECOND=self.second is not None,
            SECOND_SHARED=self.second_shared, BM=ROWS, B=self.block,
            DEPTH=self.block if self.second is None else min(DEPTH, self.block), PRECISION=PRECISION, num_warps=4,
        )  # fmt: skip
        quantize_kernel[(m, triton.cdiv(k, 1024))](y, peak, codes, scales, k, clip, limit, CHUNK=1024, num_warps=4)


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    return placeholder if tensor is None else tensor
