"""`hadamard.py` and the quantizer behind it in one Triton launch, for every width and GPU: one program per token.

The input may be two, gate and up, of which gelu(gate)·up is what is transformed. Equal to torch bit for bit: additions
in the definition's order, and nothing contracted.

Imports triton at the top, as `triton_gemm.py` does.
"""

# What triton.jit takes is no Python: its types are the compiler's
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlibero.kernels import tiled
from qlibero.kernels.contract import activation_limit
from qlibero.kernels.hadamard import block
from qlibero.kernels.triton_pdl import launch, pdl_wait
from qlibero.kernels.triton_quantizer import codes_of, gelu_times, peak_of, scale_of, where_code


@triton.jit
def _butterflies(y, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    a, b = tl.split(tl.permute(tl.reshape(y, (WIDTH // (2 * STRIDE), 2, STRIDE)), (0, 2, 1)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (WIDTH,))


@triton.jit
def hadamard_kernel(
    x_ptr,
    up_ptr,
    s_ptr,
    codes_ptr,
    scales_ptr,
    K,
    groups,
    clip,
    limit,
    x_stride,
    up_stride,
    B: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    TILED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid: one program per token. WIDTH is K's blocks of B, their number rounded up to a power of two."""
    m = tl.program_id(0)
    k = tl.arange(0, WIDTH)
    inside = k < K
    s = tl.load(s_ptr + k, mask=inside, other=0.0).to(tl.float32)
    pdl_wait(OVERLAP)
    x = tl.load(x_ptr + m.to(tl.int64) * x_stride + k, mask=inside, other=0.0)
    if GATED:
        up = tl.load(up_ptr + m.to(tl.int64) * up_stride + k, mask=inside, other=0.0)
        x = gelu_times(x.to(tl.float32), up.to(tl.float32), x.dtype)
    y = x.to(tl.float32) * s
    for stage in tl.static_range(STAGES):
        y = _butterflies(y, B >> (stage + 1), WIDTH)
    scale = scale_of(peak_of(y, 0), clip, limit)
    tl.store(codes_ptr + where_code(m, k, K, groups, TILED), codes_of(y, scale, limit), mask=inside)
    tl.store(scales_ptr + m, scale)


def warps(width: int) -> int:
    """Warps of a program: some 32 values a thread, and shared memory for the exchanges only once."""
    return max(1, min(16, width // 1024))


def smooth_hadamard(
    x: Tensor, s: Tensor, bits: int, clip: float, *, up: Tensor | None = None, in_tiles: bool = False
) -> tuple[Tensor, Tensor]:
    """x (M, K), rows contiguous, and with `up` (M, K) gelu(x)·up in its stead; s bfloat16 (K,) → codes int8 (M, K), or
    their image (`tiled.py`), and scales fp32 (M,)."""
    m, k = x.shape
    codes = tiled.empty(m, k, x.device) if in_tiles else torch.empty((m, k), dtype=torch.int8, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    size = block(k)
    width = size * triton.next_power_of_2(k // size)
    hadamard_kernel[(m,)](
        x,
        x if up is None else up,
        s,
        codes,
        scales,
        k,
        -(-m // tiled.TOKENS),
        clip,
        float(activation_limit(bits)),
        x.stride(0),
        0 if up is None else up.stride(0),
        B=size,
        WIDTH=width,
        STAGES=size.bit_length() - 1,
        GATED=up is not None,
        TILED=in_tiles,
        num_warps=warps(width),
        enable_fp_fusion=False,
        **launch(x.device, m),
    )
    return codes, scales
