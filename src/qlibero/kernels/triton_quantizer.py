"""What every Triton kernel that ends in codes shares: a row's scale, its codes, and where they go; and gelu(gate)·up,
which may come before.

Imports triton at the top, as `triton_gemm.py` does.
"""

# What triton.jit takes is no Python: its types are the compiler's
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from qlibero.kernels.contract import EPS

_EPS = tl.constexpr(EPS)
_ROUND = tl.constexpr(12582912.0)  # 1.5·2^23: adding and subtracting it rounds |v| < 2^22 to integers, half to even


@triton.jit
def peak_of(y, axis: tl.constexpr):
    """Largest magnitude along an axis; infinite when anything is not finite (tl.max would skip a NaN)."""
    size = tl.abs(y)
    return tl.max(tl.where(size < float("inf"), size, float("inf")), axis)


@triton.jit
def scale_of(peak, clip, limit):
    """The contract's activation scale."""
    return tl.div_rn(tl.maximum(peak * clip, _EPS), limit)


@triton.jit
def codes_of(y, scale, limit):
    """The contract's activation codes."""
    v = tl.minimum(tl.maximum(tl.div_rn(y, scale), -limit), limit)
    return ((v + _ROUND) - _ROUND).to(tl.int8)


@triton.jit
def where_code(m, k, K, groups, TILED: tl.constexpr):
    """Where the code of token m and channel k lies: row by row, or as in `tiled.py` with `groups` of eight tokens."""
    if TILED:
        chunk = (k // 16 % 8) ^ (m % 8)
        return ((k // 128).to(tl.int64) * groups + m // 8) * 1024 + m % 8 * 128 + chunk * 16 + k % 16
    return m.to(tl.int64) * K + k


@triton.jit
def gelu_times(gate, up, dtype: tl.constexpr):
    """gelu_tanh(gate)·up, each step rounded to `dtype` where torch rounds it. Both float32.

    Tanh as CUDA's tanhf computes it for large arguments, 1 - 2/(exp(2|u|) + 1): its small error disappears in 1 + tanh,
    and the result is torch's for every bfloat16. A logistic form would differ where 1 + tanh cancels. What a compiler
    contracts in torch's is contracted here by name, so that no option of a launch decides.
    """
    x = gate.to(dtype).to(tl.float32)
    u = 0.7978845608028654 * tl.fma(x * x * x, 0.044715, x)
    size = tl.fma(1.0 / (tl.exp2(tl.abs(u) * 2.885390081777927) + 1.0), -2.0, 1.0)
    gelu = (0.5 * x * (1.0 + tl.where(u < 0, -size, size))).to(dtype).to(tl.float32)
    return (gelu * up.to(dtype).to(tl.float32)).to(dtype)
