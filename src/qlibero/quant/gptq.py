"""GPTQ (Frantar et al., arXiv 2210.17323): each column's rounding error is repaired by the columns still to be rounded.

With H = mean of x'·x'^T over calibration tokens the output error of one row is (ŵ - w)·H·(ŵ - w)^T. Columns are rounded
one after the other, the one with the loudest input first ("act-order"); what a column loses is taken back from those
that follow, by the Cholesky factor of H^-1. Scales, also those of K-groups, are fixed before, so nothing but codes
differs from rounding to nearest: no kernel, no contract and no artifact knows of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qlibero.errors import WorkFailed

BLOCK = 128  # columns whose repairs reach the rest of the matrix as one product
DAMPING = (0.01, 0.1, 1.0)
"""Shares of H's mean diagonal added to it; the next where the last left it indefinite."""

Nearest = Callable[[Tensor, int], Tensor]


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, nearest: Nearest, name: str) -> Tensor:
    """weight (N, K), hessian (K, K) of the same basis -> rounded weight (N, K) float64.

    nearest(values (N,) float64, channel): the representable values closest to a column's. Peak memory about five K × K
    float64 matrices.

    Raises WorkFailed, naming the layer `name`, when H is not finite or not positive definite.
    """
    w, h = weight.double(), hessian.double()
    if not bool(torch.isfinite(h).all()):
        raise WorkFailed(
            f"gptq: the second moments of {name}'s input are not finite, its activations overflow; "
            "exclude the layer (quant.exclude) or write quant.rounding: search"
        )
    dead = h.diagonal() <= 0
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    upper = _inverse_factor(h[order][:, order], dead[order], name)
    w = w[:, order]
    rounded, channels = torch.empty_like(w), order.tolist()
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        columns = w[:, start:stop].t().contiguous()  # a column a row: on a GPU the launches of this loop are the time
        errors, kept = torch.empty_like(columns), []
        together = zip(channels[start:stop], columns, errors, upper[start:stop, start:stop], strict=True)
        for i, (channel, column, error, factor) in enumerate(together):
            kept.append(nearest(column, channel))
            torch.sub(column, kept[i], out=error).div_(factor[i])
            columns[i + 1 :].sub_(torch.outer(factor[i + 1 :], error))
        rounded.index_copy_(1, order[start:stop], torch.stack(kept, 1))
        w[:, stop:] -= errors.t().contiguous() @ upper[start:stop, stop:]
    return rounded


def _inverse_factor(h: Tensor, dead: Tensor, name: str) -> Tensor:
    """Upper U with U^T·U = (H + damping)^-1. A channel that is never other than zero repairs nothing."""
    mean = h.diagonal().mean().clamp_min(1e-300)
    for share in DAMPING:
        damped = h + torch.diag((share * mean).expand(len(h)))
        damped.diagonal()[dead] = mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed) and bool(torch.isfinite(upper).all()):
            return upper
    raise WorkFailed(
        f"gptq: the second moments of {name}'s input are not positive definite, even with "
        f"{DAMPING[-1]:g} of their mean "
        "added to the diagonal; calibrate on more observations (quant.calibration.samples) or write "
        "quant.rounding: search"
    )
