"""smooth_hadamard defined once: one signed Walsh-Hadamard transform of a smoothed input, to the last bit.

    y = H(x·s)      x·s one fp32 product a channel, then butterflies (a, b) -> (a + b, a - b) in fp32
                    with strides B/2, B/4 … 2, 1; nothing is normalized and nothing may be contracted or reordered

B is the largest power of two that divides the width K: pi0.5's widths are one block, 768 is three of 256. s (K,) holds
bfloat16 values and has everything else in it: the smoothing, the random signs, and 2^-ceil(log2(B)/2), which keeps y at
the size of x; the last two multiply exactly. What is missing to an orthogonal transform is in the weights, W' = W·T^-T
= W·diag(1/s)·H/B, computed in float64 from s as it is stored.

Torch on every device, numpy, the Triton kernel and the CUDA kernel all add the same pairs in the same order, so their
codes are equal bit for bit, not merely close. For a bfloat16 input x·s is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block(width: int) -> int:
    """The largest power of two that divides `width`: the size of one Walsh-Hadamard transform."""
    return width & -width


def walsh_hadamard(y: Tensor) -> Tensor:
    """y (..., K) times H, unnormalized, in y's dtype: the blocks' butterflies, widest stride first."""
    shape, stride = y.shape, block(y.shape[-1]) // 2
    while stride:
        a, b = y.reshape(*shape[:-1], -1, 2, stride).unbind(-2)
        y = torch.stack((a + b, a - b), -2)
        stride //= 2
    return y.reshape(shape)


def fold(s: Tensor, signs: Tensor) -> Tensor:
    """What is stored: channel factors s (K,) > 0 and signs (K,) of ±1 -> bfloat16 (K,), the power of two in it."""
    exponent = -(block(len(s)).bit_length() // 2)  # -ceil(log2(B) / 2)
    return (s.double() * signs.double() * 2.0**exponent).bfloat16()
