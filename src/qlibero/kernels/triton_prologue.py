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

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from qlibero.kernels import tiled
from qlibero.kernels.contract import activation_limit
from qlibero.kernels.triton_pdl import launch
from qlibero.kernels.triton_prologue_kernels import (
    first_kernel,
    fused_small_m_kernel,
    plain_kernel,
    quantize_kernel,
    second_kernel,
)

LITTLE = 1 << 15  # values: up to here one launch is the faster way at every K measured on an H100
TILE_ROWS = 64  # tokens of one program where rows are many

Written = tuple[Tensor, Tensor, int, int, float, float]  # codes, scales, K, groups of tokens, clip, limit


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
