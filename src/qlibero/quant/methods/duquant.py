"""DuQuant as published (arXiv 2406.01721, section 3): smooth, rotate, permute zigzag, rotate again.

    x' = x · S^-1 · R1 · P · R2          W' = W · S · R1 · P · R2

R1 and R2 are block-diagonal, *one rotation per block* as in the paper (the released code shares one by all).
The smoothing S^-1 is folded into the rows of R1, so it costs nothing online. Where paper and code differ the
paper is followed: the outlier is the channel with the greatest |x|, and the peak that greedy search lowers is
max |x|.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qlibero.config.quantization import Quant
from qlibero.quant.methods import GroupData
from qlibero.quant.methods.smoothquant import smoothing
from qlibero.quant.transform import Transform
from qlibero.registry import MethodPlugin

PLUGIN = MethodPlugin(
    "duquant",
    "smooth, rotate, permute, rotate again (arXiv 2406.01721)",
    factors=("first", "order", "second"),
    blocks=True,
    smooths_first=True,
    order=3,
)


def fit(data: GroupData, spec: Quant) -> Transform:
    """S folded into R1, P, R2. Fitted in float64 on `data.tokens`; deterministic for a given seed."""
    block = spec.block_size
    s = smoothing(data, spec)
    x = data.tokens.double() / s
    first = greedy_rotation(_split(x, block), spec.rotation_steps, spec.calibration_seed)
    x = _join(torch.bmm(_split(x, block), first))
    order = zigzag(x.abs().amax(0), block)
    x = x.index_select(1, order)
    second = greedy_rotation(_split(x, block), spec.rotation_steps, spec.calibration_seed)
    folded = first / s.view(-1, block, 1)
    return Transform(first=folded.float(), order=order.int(), second=second.float())


def greedy_rotation(x: Tensor, steps: int, seed: int) -> Tensor:
    """Rotations that lower each block's greatest |x|: (G, T, B) -> orthogonal (G, B, B) float64.

    Step n spreads the channel d that now holds the peak over the whole block: R = E_d·R~·Q·E_d with E_d the
    swap of 0 and d, R~ the base with a uniform first row and Q = blockdiag(1, random orthogonal). The prefix
    with the smallest remaining peak is kept, which may be the empty one: a block without outliers is left
    alone.
    """
    g, t, b = x.shape
    # The search runs in float32 and only what it found is made orthogonal to float64: nothing hangs on its
    # rounding. Data and accumulated rotation are multiplied by the same matrices, so they travel in one
    # tensor.
    state = torch.cat([x.float(), torch.eye(b, device=x.device).expand(g, b, b)], dim=1)
    peaks = state[:, :t].abs().amax(1)
    least = peaks.amax(1)
    best = state[:, t:].clone()
    rows = torch.arange(g, device=x.device)
    stale = 0
    for n in range(steps):
        outlier = peaks.argmax(1)
        swap = torch.arange(b, device=x.device).repeat(g, 1)
        swap[rows, outlier], swap[:, 0] = 0, outlier
        state = torch.bmm(state, _step(b, seed, n).to(x.device)[swap[:, :, None], swap[:, None, :]])
        peaks = state[:, :t].abs().amax(1)
        peak = peaks.amax(1)
        better = peak < least
        least = torch.where(better, peak, least)
        best[better] = state[better, t:]
        stale = 0 if bool(better.any()) else stale + 1
        if stale == PATIENCE:
            break
    left: Tensor
    right: Tensor
    left, _, right = torch.linalg.svd(best.double())
    return left @ right


#: the search ends early when no block of the input has improved for this many steps in a row
PATIENCE = 32


@cache
def _step(b: int, seed: int, n: int) -> Tensor:
    """R~·Q of the n-th greedy step, (B, B) float32: drawn once per run and shared by all inputs."""
    generator = torch.Generator().manual_seed((seed << 20) + n)
    mixing = torch.eye(b, dtype=torch.float64)
    q, r = torch.linalg.qr(torch.randn(b - 1, b - 1, dtype=torch.float64, generator=generator))
    mixing[1:, 1:] = q * torch.sign(torch.diagonal(r))
    return (uniform_first_row(b) @ mixing).float()


@cache
def uniform_first_row(b: int) -> Tensor:
    """The paper's base R~: B-1 Givens rotations whose product's first row is 1/sqrt(B) everywhere. (B, B) float64."""
    r = torch.eye(b, dtype=torch.float64)
    for i in range(b - 1):
        cos, sin = (1 / (i + 2)) ** 0.5, ((i + 1) / (i + 2)) ** 0.5
        givens = torch.eye(b, dtype=torch.float64)
        givens[i, i], givens[i, i + 1], givens[i + 1, i], givens[i + 1, i + 1] = cos, -sin, sin, cos
        r = givens @ r
    swap = torch.arange(b)
    swap[0], swap[-1] = b - 1, 0
    return r[swap][:, swap]


def zigzag(peak: Tensor, block: int) -> Tensor:
    """Deal channels to blocks in serpentine order of their peak, so that every block gets its share of outliers.

    peak (K,) -> order (K,) int64: channel order[i] goes to place i. Rank r·G + p goes to block p on even
    rounds r and to block G-1-p on odd ones.
    """
    k = len(peak)
    blocks = k // block
    ranked = torch.argsort(peak, descending=True, stable=True).view(block, blocks)
    ranked[1::2] = ranked[1::2].flip(1)
    return ranked.t().reshape(k).contiguous()


def _split(x: Tensor, block: int) -> Tensor:
    return x.view(len(x), -1, block).transpose(0, 1).contiguous()


def _join(x: Tensor) -> Tensor:
    return x.transpose(0, 1).reshape(x.shape[1], -1)
