"""Two int4 codes per byte, in the order the kernels want: "khalf".

byte[n, j] holds code[n, j] in its low nibble and code[n, j + K/2] in its high nibble, two's complement. Both nibbles of
a byte then meet *contiguous* slices of the activation row (k = j and k = j + K/2), so unpacking is elementwise: no
interleave, no change of layout, on a CPU as in a GPU's registers. And `byte << 4`, `byte & 0xF0` taken as int8 are
exactly 16·code: two operations for two codes, the 16 divided out exactly later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlibero.errors import UserError


def pack_khalf(codes: Tensor) -> Tensor:
    """int8 codes (N, K) in [-8, 7] → int8 bytes (N, K // 2). Raises UserError for odd K or codes outside the range."""
    k = codes.shape[1]
    if k % 2:
        raise UserError(f"cannot pack int4 codes two per byte: the layer's input width {k} is odd")
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise UserError(f"int4 codes must lie in [-8, 7], found [{int(codes.min())}, {int(codes.max())}]")
    return ((codes[:, : k // 2] & 15) | (codes[:, k // 2 :] << 4)).contiguous()


def unpack_khalf(packed: Tensor) -> Tensor:
    """The inverse: int8 bytes (N, K // 2) → int8 codes (N, K)."""
    return torch.cat([(packed << 4) >> 4, packed >> 4], dim=1)


def unpack_khalf_times_16(packed: Tensor, out: Tensor) -> None:
    """Writes 16·code into `out`, int8 (N, K): the cheap half of unpacking, for callers that divide by 16 elsewhere."""
    half = packed.shape[1]
    torch.bitwise_left_shift(packed, 4, out=out[:, :half])
    torch.bitwise_and(packed, -16, out=out[:, half:])
