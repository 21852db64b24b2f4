"""Two codes of at most 4 bits a byte, as artifacts keep them."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 codes in [-8, 7], (N, K) with K even -> uint8 (N, K/2); the even channel in the low nibble."""
    nibbles = codes.to(torch.uint8) & 0xF
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    pairs = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(1)
    return ((pairs ^ 8).to(torch.int8)) - 8
