"""A quantized policy from a full-precision one and an artifact; whatever is not quantized is shared, not copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlibero.errors import GuardRefusal, UserError
from qlibero.kernels import load as load_kernel
from qlibero.kernels.contract import GemmShape
from qlibero.policies.base import Policy
from qlibero.quant.artifact import Artifact, LayerRecord, require
from qlibero.quant.layout import select
from qlibero.quant.linear import QuantLinear, assemble
from qlibero.quant.surgery import exchange
from qlibero.quant.transform import InputTransform

def quantize_policy(
    policy: Policy, artifact: Artifact, backend: str | Mapping[str, str], only: frozenset[str] | None = None
) -> Policy:
    """`policy` with the artifact's linears on the given backend, one for all or one per linear name.

    `only` takes some of the linears and leaves the rest in full precision (to measure what one of them does).

    Tensors are read, packed and placed layer by layer; the policy's own linears may be on the meta device, so a
    full-size quantized policy never holds their full-precision weights.

    Raises:
        GuardRefusal: the artifact belongs to another checkpoint, or selects other linears than this model has.
        UserError: a backend cannot do a layer; the message says which and why.
    """
    if policy.model is None:
        raise UserError(f"policy {policy.name} runs in another process and cannot be quantized from here")
    require(artifact, None, policy.provenance()["sha256"])
    found = {choice.name for choice in select(policy.model, artifact.spec).choices}
    if found != {layer.name for layer in artifact.layers}:
        raise GuardRefusal(f"the artifact holds {len(artifact.layers)} linears, its settings select {len(found)} others in "
                           "this model: make it again with `qlibero quantize CONFIG`")
    device = next(p.device for p in policy.model.parameters() if p.device.type != "meta")
    transforms: dict[str, InputTransform] = {}
    modules: dict[str, nn.Module] = {}
    for layer in artifact.layers:
        if only is not None and layer.name not in only:
            continue
        kernel = backend if isinstance(backend, str) else backend[layer.name]
        if layer.group not in transforms:
            transforms[layer.group] = InputTransform(artifact.transform(layer.group), layer.in_features).to(device)
        linear = policy.model.get_submodule(layer.name)
        modules[layer.name] = _module(artifact, layer, linear, transforms[layer.group], kernel, device)
    if only is None:
        modules |= _corrected(policy.model, artifact)
    return policy.with_model(exchange(policy.model, modules))


def gemm_shapes(artifact: Artifact, device: str = "cpu", *, executed_only: bool = True) -> dict[str, GemmShape]:
    """What each linear asks of a kernel, by name: the court's list. Weight-only layers ask nothing."""
    return {
        layer.name: GemmShape(layer.out_features, layer.in_features, layer.weight_bits, layer.activation_bits,
                              artifact.spec.group_size, device)
        for layer in artifact.layers
        if layer.activation_bits < 16 and (layer.executed or not executed_only)
    }


def _module(
    artifact: Artifact, layer: LayerRecord, linear: nn.Linear, shared: InputTransform, backend: str, device: torch.device
) -> nn.Module:
    if (linear.out_features, linear.in_features) != (layer.out_features, layer.in_features):
        raise GuardRefusal(f"{layer.name} is {linear.out_features}×{linear.in_features} in this model and "
                           f"{layer.out_features}×{layer.in_features} in the artifact")
    kernel = load_kernel(backend)
    if layer.activation_bits < 16:
        shape = GemmShape(layer.out_features, layer.in_features, layer.weight_bits, layer.activation_bits,
                          artifact.spec.group_size, device.type)
        support = kernel.supports(shape)
        if not support.ok:
            raise UserError(f"backend {backend} cannot run {layer.name} ({shape}): {support.reason}")
    rotation = artifact.tensor(f"{layer.name}.output_rotation")
    return assemble(
        kernel, shared, artifact.codes(layer.name).to(device), artifact.scales(layer.name).to(device),
        weight_bits=layer.weight_bits, activation_bits=layer.activation_bits,
        activation_clip=artifact.spec.activation_clip, bias=None if linear.bias is None else linear.bias.detach(),
        output_rotation=None if rotation is None else rotation.to(device), dtype=linear.weight.dtype,
    )  # fmt: skip


def _corrected(model: nn.Module, artifact: Artifact) -> dict[str, nn.Module]:
    """Linears that the layout left in full precision but a calibrated correction scales: a copy with scaled rows.

    In quantized linears the factors are already in the stored weights.
    """
    scaled = {}
    quantized = {layer.name for layer in artifact.layers}
    for name, factors in artifact.corrections.items():
        if name in quantized:
            continue
        linear = model.get_submodule(name)
        rows = torch.tensor(factors, device=linear.weight.device).repeat_interleave(linear.out_features // len(factors))
        copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        copy.weight = _scaled(linear.weight, rows[:, None])
        if linear.bias is not None:
            copy.bias = _scaled(linear.bias, rows)
        scaled[name] = copy
    return scaled


def _scaled(parameter: Tensor, rows: Tensor) -> nn.Parameter:
    return nn.Parameter((parameter.detach().float() * rows).to(parameter.dtype), requires_grad=False)


@dataclass(frozen=True)
class Memory:
    """Bytes of a policy's quantized linears, from live storages. `bf16` is what the same linears take unquantized."""

    weights: int
    scales: int
    transforms: int
    bf16: int

    def summary(self) -> dict[str, Any]:
        """JSON-ready, with the two ratios that matter: weights with their scales alone, and with the online transforms."""
        return {
            "weight_bytes": self.weights, "scale_bytes": self.scales, "transform_bytes": self.transforms,
            "bf16_bytes": self.bf16, "ratio": round((self.weights + self.scales) / max(self.bf16, 1), 4),
            "ratio_with_transforms": round((self.weights + self.scales + self.transforms) / max(self.bf16, 1), 4),
        }  # fmt: skip


def memory(model: nn.Module) -> Memory:
    """Measure the quantized linears of `model`; shared transforms count once."""
    weights = scales = bf16 = 0
    transforms: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            weights += module.packed.nbytes
            scales += module.scales.untyped_storage().nbytes()
            transforms[id(module.transform)] = module.transform.nbytes
            bf16 += 2 * module.in_features * module.out_features
    return Memory(weights, scales, sum(transforms.values()), bf16)
