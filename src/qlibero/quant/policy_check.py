"""End to end: a quantized policy's kernels on its own activations, and what they do to its actions.

Validation tests kernels on codes it makes up. Here one demonstration's observation goes through the finished
policy; every linear's input is kept, and each layer must give, from that input, exactly what the integer
reference gives from its codes: proof that int8 activations are consumed where the policy really runs, not
merely where the kernel was tried. Then the same observation and noise are put to the policy and to the same
policy on `fake` *as a run asks them*, with its batches, compiled flow, fused ops and CUDA graphs; the largest
difference between the two action chunks is put on record. It is 0 for every kernel with an exact output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlibero.documents import JsonObject
from qlibero.errors import GuardRefusal
from qlibero.kernels.exactness import try_layer
from qlibero.policies.base import Observation, QuantizablePolicy
from qlibero.quant.apply import quantize_policy
from qlibero.quant.artifact import Artifact
from qlibero.quant.linear import QuantLinear
from qlibero.quant.transform import InputTransform

ROWS = 16  # tokens of a layer's input that are multiplied again as integers


@dataclass(frozen=True)
class PolicyCheck:
    """`action_difference`: largest |difference| of an action from the same policy on `fake`; None when there
    was no memory for that second policy."""

    layers_consuming_int8: int
    action_difference: float | None

    def to_json(self) -> JsonObject:
        return asdict(self)


def check_policy(
    full: QuantizablePolicy,
    quantized: QuantizablePolicy,
    artifact: Artifact,
    observation: Observation,
    noise: np.ndarray,
    twin: QuantizablePolicy | None = None,
) -> PolicyCheck:
    """full: the policy that `quantized` was made from. noise (H, D) float32. twin: the same policy on `fake`, made
    here (if there is room) when it is not given.

    Raises GuardRefusal naming the first layer whose output is not decided by its int8 activations, or when a
    kernel that claims to be exact changes an action.
    """
    inputs = listen(quantized, observation, noise)
    found = {record.name: quantized.model.get_submodule(record.name) for record in artifact.layers if record.executed}
    # weight-only ones have no kernel
    layers = {name: layer for name, layer in found.items() if isinstance(layer, QuantLinear)}
    for name, layer in layers.items():
        finding = try_layer(layer, inputs[id(layer.transform)][:ROWS], artifact.codes(name).to(quantized.device))
        if not finding.ok:
            raise GuardRefusal(f"kernel {layer.product.kernel.name} in {name}: {finding.reason}")
    difference = None
    if twin is None and room_for_twin(artifact, quantized.device):
        twin = quantize_policy(full, artifact, "fake")
    if twin is not None:
        actions = quantized.infer([observation], noise[None]).actions
        expected = twin.infer([observation], noise[None]).actions
        difference = float(np.abs(actions - expected).max())
        if difference and all(layer.product.kernel.rounds_to is None for layer in layers.values()):
            raise GuardRefusal(
                f"every layer's kernel is exact, yet actions differ from `fake` by up to {difference:.3g}"
            )
    return PolicyCheck(len(layers), difference)


def listen(policy: QuantizablePolicy, observation: Observation, noise: np.ndarray) -> dict[int, Tensor]:
    """The first input of every transform, by the transform's id. The plain network is asked, because replayed
    graphs call no method that could be listened to."""
    heard: dict[int, Tensor] = {}
    transforms = {id(m.transform): m.transform for m in policy.model.modules() if isinstance(m, QuantLinear)}

    def listening(key: int, transform: InputTransform) -> Callable[..., Any]:
        plain = transform.quantize

        def quantize(x: Tensor, *how: Any, **layout: Any) -> Any:
            heard.setdefault(key, x.clone())
            return plain(x, *how, **layout)

        return quantize

    for key, transform in transforms.items():
        vars(transform)["quantize"] = listening(key, transform)
    try:
        policy.sample_eagerly(observation, noise)
        return heard
    finally:
        for transform in transforms.values():
            del vars(transform)["quantize"]  # the method shows again


def room_for_twin(artifact: Artifact, device: torch.device) -> bool:
    """Whether the device can hold the artifact's codes once more, as `fake` keeps them."""
    if device.type != "cuda":
        return True
    codes = sum(layer.out_features * layer.in_features for layer in artifact.layers)
    return torch.cuda.mem_get_info(device)[0] > 3 * codes  # `fake` holds two bytes a code there
