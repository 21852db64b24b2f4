"""Calibrated corrections: what rounding did to an attention is measured and multiplied back.

Teacher (full precision) and student (quantized, on `fake`) see the same observations and noise. What a correction says
of the two, a factor for each query head or one for the attention's output, goes into rows of a linear (RoPE and the
product with k are linear in q), so it costs nothing online: into the codes' scales where the linear is quantized, into
a scaled copy where it is not. `quant.corrections` names them; each is a plug-in beside this file or from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from qlibero.errors import WorkFailed
from qlibero.policies.base import Observation, QuantizablePolicy
from qlibero.policies.surgery import swap_modules
from qlibero.quant.apply import quantize_policy
from qlibero.quant.artifact import Artifact, build
from qlibero.quant.layout import scaled

Requantize = Callable[[str, Tensor], dict[str, Tensor]]


@dataclass
class AttentionSeen:
    """Sums over the calls of one attention."""

    logit_std: Tensor | float = 0.0
    """(heads,) standard deviation of q·kᵀ/√d over queries and live keys."""
    output_rms: float = 0.0
    """Root mean square of what the output projection returns."""
    calls: int = 0


class OutputRmsProbe(nn.Module):
    """An output projection that reports the RMS of what it returns. It has no `prepare`, so it is always called as a
    whole."""

    def __init__(self, linear: nn.Module, seen: AttentionSeen):
        super().__init__()
        self.linear, self.seen = linear, seen

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.linear(x)
        self.seen.output_rms += float(z.float().square().mean().sqrt())
        self.seen.calls += 1
        return z


def fit_corrections(
    policy: QuantizablePolicy,
    artifact: Artifact,
    observations: Sequence[Observation],
    noise: np.ndarray,
    requantize: Requantize,
) -> Artifact:
    """The artifact with its corrections measured and put in.

    requantize(name, rows): tensors of a quantized linear whose output rows are multiplied by `rows` (N,).
    """
    teacher = _observe(policy, observations, noise)
    student = _observe(quantize_policy(policy, artifact, "fake"), observations, noise)
    calls = [{name: one.calls for name, one in seen.items()} for seen in (teacher, student)]
    if calls[0] != calls[1] or not any(calls[0].values()):
        raise WorkFailed("corrections: teacher and student did not run the same attention layers")
    found: dict[str, list[float]] = {}
    for linear, by in scaled(policy, artifact.spec).items():
        attention = by.attention.name
        if teacher[attention].calls:
            found[linear] = by.correction.load().factors(teacher[attention], student[attention])
    found = {name: factors for name, factors in found.items() if any(f != 1.0 for f in factors)}
    tensors = dict(artifact.in_memory())
    for layer in artifact.layers:
        if layer.name in found:
            factors = torch.tensor(found[layer.name])
            stored = requantize(layer.name, factors.repeat_interleave(layer.out_features // len(factors)))
            tensors |= {f"{layer.name}.{key}": value for key, value in stored.items()}
    return build(artifact.spec, artifact.checkpoint_sha256, artifact.calibration, artifact.layers, found, tensors)


def _observe(
    policy: QuantizablePolicy, observations: Sequence[Observation], noise: np.ndarray
) -> dict[str, AttentionSeen]:
    """Run the policy's plain model on every observation; what each attention did, by its name."""
    seen = {each.name: AttentionSeen() for each in policy.attentions()}
    probes: dict[str, nn.Module] = {
        each.output: OutputRmsProbe(policy.model.get_submodule(each.output), seen[each.name])
        for each in policy.attentions()
    }
    twin = swap_modules(policy.model, probes)
    for observation, z in zip(observations, noise, strict=True):
        policy.sample_eagerly(observation, z, twin, partial(_add_logits, seen))
    return seen


def _add_logits(seen: dict[str, AttentionSeen], name: str, q: Tensor, k: Tensor) -> None:
    """q (1, T, heads, d), k (1, P, d) or (1, P, groups, d), all of it live (`QuantizablePolicy.sample_eagerly`)."""
    one, other = q[0].float(), k[0].float()
    if other.dim() == 2:
        logits = torch.einsum("thd,pd->htp", one, other)
    else:
        logits = torch.einsum("thd,phd->htp", one, other.repeat_interleave(one.shape[1] // other.shape[1], 1))
    logits = logits * q.shape[-1] ** -0.5
    seen[name].logit_std = seen[name].logit_std + logits.flatten(1).std(1)
