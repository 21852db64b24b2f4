"""Activation codes in the layout that `cuda_w4a8` multiplies, written by the quantizers themselves.

    image[k // 128][m // 8][m % 8][(k // 16 % 8) ^ (m % 8)][k % 16] = code[m, k]        K a multiple of 128

Eight tokens by 128 channels are 1024 consecutive bytes, which is what a Hopper tensor core reads from shared memory
with the 128-byte swizzle, so any multiple of eight tokens arrives as one contiguous copy and nothing is rearranged on
the way. The last group's missing tokens hold anything: their outputs are never stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS, CHANNELS = 8, 128  # of one group; K must be a multiple of the second


def empty(m: int, k: int, device: torch.device) -> Tensor:
    """Room for the image of (m, k) codes: int8 (K/128, ceil(M/8), 8, 128)."""
    return torch.empty((k // CHANNELS, -(-m // TOKENS), TOKENS, CHANNELS), dtype=torch.int8, device=device)


def tile(codes: Tensor) -> Tensor:
    """int8 (M, K) -> its image, missing tokens zero."""
    m, k = codes.shape
    groups = -(-m // TOKENS)
    whole = torch.nn.functional.pad(codes, (0, 0, 0, groups * TOKENS - m))
    return _swizzle(whole.view(groups, TOKENS, k // CHANNELS, 8, 16).permute(2, 0, 1, 3, 4)).flatten(3)


def untile(image: Tensor, m: int) -> Tensor:
    """The image of m tokens -> int8 (M, K)."""
    blocks, groups = image.shape[:2]
    chunks = _swizzle(image.view(blocks, groups, TOKENS, 8, 16))
    return chunks.permute(1, 2, 0, 3, 4).reshape(groups * TOKENS, blocks * CHANNELS)[:m]


def _swizzle(chunks: Tensor) -> Tensor:
    """(…, 8 tokens, 8 chunks, 16): chunk c of token t changes places with chunk c ^ t, which is its own inverse."""
    t = torch.arange(8, device=chunks.device)
    return chunks.gather(-2, (t[:, None] ^ t[None, :])[..., None].expand(chunks.shape))
