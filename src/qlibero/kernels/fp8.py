"""FP8 W8A8 defined once: e4m3 codes, a scale a token and a scale a row. A contract of its own beside the integers'.

    s_x[m] = max(clip · max_k |X[m,k]|, EPS) / 448          s_w[n] = bf16(max(clip · max_k |W[n,k]|, EPS) / 448)
    q      = e4m3(clamp(X / s, -448, 448))                  nearest, ties to even, IEEE division
    acc    = Σ_k q_x q_w                                    exact
    y      = (float(acc) · s_x[m]) · s_w[n] + bias[n]       fp32, in this order, then the output dtype

A code is a multiple of 2^-9 with 4 significant bits and magnitude at most 448, a product a multiple of 2^-18 below
2^18: float64 holds any sum of fewer than 2^17 products exactly, in any order. That sum, rounded once to fp32, is the
definition; it runs anywhere.

Tensor cores do not keep it. Hopper aligns the products of one instruction (32 along K) and the running sum to the
largest of them and keeps about 13 bits below it (DeepSeek-V3 report, arXiv 2412.19437, section 3.5.2), so each of the
33 addends may lose 2^-13 of the largest. With S = Σ|q_x q_w| no addend exceeds S, hence

    |acc_hardware - acc| ≤ TOLERANCE · S · ceil(K / 32),     TOLERANCE = 33 · 2^-13

is what a kernel is held to, and its one-hot tokens, whose sums have one term, to equality. No backend of a run has it;
`benchmarks/fp8_linears.py` prints where `torch._scaled_mm` stands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlibero.kernels.contract import EPS

E4M3_MOST = 448.0


def e4m3(x: Tensor) -> Tensor:
    """The nearest e4m3 number, saturating at ±448, in x's dtype. NaN stays NaN."""
    return x.clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn).to(x.dtype)


def quantize_e4m3(x: Tensor, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """x (M, K) of any float dtype -> codes float8_e4m3fn (M, K) and scales fp32 (M,). A row that is not finite gets a
    scale that is not."""
    x = x.float()
    peak = (x.abs().amax(-1) * clip).clamp_min(EPS)
    scales = peak / torch.full_like(peak, E4M3_MOST)
    return (x / scales.unsqueeze(-1)).clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn), scales
