"""SmoothQuant (arXiv 2211.10438): move outliers from activations into weights, channel by channel.

s_j = |X_j|^α / max|W_j|^(1-α) with the channel's greatest |x| (`smoothing: max`, as published), its root mean square or
its mean, which a few massive tokens do not decide; x is divided by s and W multiplied. The division stays online as one
product per input (it can fold into the preceding norm for q/k/v and gate/up only; one rule for all four
inputs is simpler and costs one pass over a tensor that is in cache).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlibero.config.quantization import Quant
from qlibero.quant.methods import GroupData
from qlibero.quant.transform import Transform
from qlibero.registry import MethodPlugin

PLUGIN = MethodPlugin("smoothquant", "a factor per channel, from activations into weights", factors=("scale",), order=2)

#: channels quieter than this fraction of the loudest are treated as being that loud, so that 1/s stays finite
QUIET = 1e-5


def fit(data: GroupData, spec: Quant) -> Transform:
    """A channel scale 1/s."""
    return Transform(scale=(1.0 / smoothing(data, spec)).float())


def smoothing(data: GroupData, spec: Quant) -> Tensor:
    """s (K,) float64, normalised to geometric mean 1 (a common factor changes no code). The weight maximum is
    over every linear of the group, where the released DuQuant code looks at q_proj or up_proj alone."""
    if spec.smoothing == "none":
        return torch.ones_like(data.peak, dtype=torch.float64)
    x = {"max": data.peak, "rms": data.rms, "mean": data.mean}[spec.smoothing].double()
    w = torch.stack([weight.double().abs().amax(0) for weight in data.weights]).amax(0)
    x = x.clamp_min(max(float(x.max()) * QUIET, 1e-30))
    w = w.clamp_min(max(float(w.max()) * QUIET, 1e-30))
    log = spec.alpha * x.log() - (1 - spec.alpha) * w.log()
    return (log - log.mean()).exp()
