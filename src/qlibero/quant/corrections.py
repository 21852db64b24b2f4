"""QuantVLA's two calibrated corrections: attention temperature matching and output head balancing.

Rounding flattens or sharpens attention and changes how loud an attention output is. Per head and per layer
the ratio of teacher (full precision) to student (quantized) is measured on calibration observations and
multiplied back:

    a = Std(L_T) / (Std(L_Q) + 1e-6), L = q·kᵀ/√d over live keys, on each query head
    b = RMS(Z_T) / (RMS(Z_Q) + 1e-6), Z = what o_proj returns, on each layer

a within 5 % of 1 is taken as 1 and clipped to [0.8, 1.25]; b within 3 %, clipped to exp(±0.30).

Both are factors on the rows of a linear (RoPE and the product with k are linear in q), so they cost nothing
online: they go into q_proj and o_proj, into the codes' scales where those are quantized, into a scaled copy
where they are not. Clips are those of QuantVLA's pi0.5 code. Where its code measured the ten action tokens
among themselves, all the keys that a query really sees are measured here. Independent repetitions found no
gain: hence off by default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from qlibero.errors import WorkFailed
from qlibero.policies.base import Observation, QuantizablePolicy
from qlibero.policies.surgery import swap_modules
from qlibero.quant.apply import quantize_policy
from qlibero.quant.artifact import Artifact, build

ATM_CLIP, ATM_BAND = (0.8, 1.25), 0.05
OHB_LOG_CLIP, OHB_LOG_BAND = 0.30, 0.03
SMALL = 1e-6

Requantize = Callable[[str, Tensor], dict[str, Tensor]]


@dataclass
class Heard:
    """Sums over calls: standard deviation of the logits per head, and RMS of the outputs, by layer stem."""

    std: dict[str, Tensor] = field(default_factory=dict)
    rms: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


class OutputRmsProbe(nn.Module):
    """An o_proj that reports the RMS of what it returns. It has no `prepare`, so it is always called as a whole."""

    def __init__(self, linear: nn.Module, stem: str, heard: Heard):
        super().__init__()
        self.linear, self.stem, self.heard = linear, stem, heard

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        self.heard.rms[self.stem] = self.heard.rms.get(self.stem, 0.0) + float(z.float().square().mean().sqrt())
        self.heard.calls[self.stem] = self.heard.calls.get(self.stem, 0) + 1
        return z


def fit_corrections(
    policy: QuantizablePolicy,
    artifact: Artifact,
    observations: Sequence[Observation],
    noise: np.ndarray,
    requantize: Requantize,
) -> Artifact:
    """The artifact with its corrections measured and put in; teacher and student see the same observations and noise.

    requantize(name, rows): tensors of a quantized linear whose output rows are multiplied by `rows` (N,).
    """
    teacher = _listen(policy, observations, noise)
    student = _listen(quantize_policy(policy, artifact, "fake"), observations, noise)
    if teacher.calls != student.calls or not teacher.calls:
        raise WorkFailed("corrections: teacher and student did not run the same attention layers")
    found: dict[str, list[float]] = {}
    for each in policy.attentions():
        if artifact.spec.atm:
            found[each.query] = temperatures(teacher.std[each.name], student.std[each.name])
        if artifact.spec.ohb:
            found[each.output] = [balance(teacher.rms[each.name], student.rms[each.name])]
    found = {name: factors for name, factors in found.items() if any(f != 1.0 for f in factors)}
    tensors = dict(artifact.tensors)
    for layer in artifact.layers:
        if layer.name in found:
            factors = torch.tensor(found[layer.name])
            stored = requantize(layer.name, factors.repeat_interleave(layer.out_features // len(factors)))
            tensors |= {f"{layer.name}.{key}": value for key, value in stored.items()}
    return build(artifact.spec, artifact.checkpoint_sha256, artifact.calibration, artifact.layers, found, tensors)


def temperatures(teacher: Tensor, student: Tensor) -> list[float]:
    """Factor per head from summed standard deviations (heads,)."""
    a = (teacher / (student + SMALL)).clamp(*ATM_CLIP)
    return [1.0 if abs(x - 1) <= ATM_BAND else round(x, 6) for x in a.tolist()]


def balance(teacher: float, student: float) -> float:
    """Factor of one layer from summed root mean squares."""
    log = float(np.clip(np.log(max(teacher, 1e-30) / (student + SMALL)), -OHB_LOG_CLIP, OHB_LOG_CLIP))
    return 1.0 if abs(log) < OHB_LOG_BAND else round(float(np.exp(log)), 6)


def _listen(policy: QuantizablePolicy, observations: Sequence[Observation], noise: np.ndarray) -> Heard:
    """Run the policy's plain model on every observation and hear every attention."""
    heard = Heard()
    speakers: dict[str, nn.Module] = {
        each.output: OutputRmsProbe(policy.model.get_submodule(each.output), each.name, heard)
        for each in policy.attentions()
    }
    twin = swap_modules(policy.model, speakers)
    for observation, z in zip(observations, noise, strict=True):
        policy.sample_eagerly(observation, z, twin, partial(_hear_logits, heard))
    return heard


def _hear_logits(heard: Heard, name: str, q: Tensor, k: Tensor) -> None:
    """q (1, T, heads, d), k (1, P, d), all of it live (`QuantizablePolicy.sample_eagerly`)."""
    logits = torch.einsum("thd,pd->htp", q[0].float(), k[0].float()) * q.shape[-1] ** -0.5
    heard.std[name] = heard.std.get(name, 0) + logits.flatten(1).std(1)
