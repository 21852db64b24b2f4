"""A quantized policy from a full-precision one and an artifact; whatever is not quantized is shared, not copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.errors import GuardRefusal, UserError
from qlibero.kernels import DEQUANTIZED, SIMULATED
from qlibero.kernels import load as load_kernel
from qlibero.kernels.contract import GemmShape, live_bytes
from qlibero.policies.base import QuantizablePolicy
from qlibero.policies.structured import short
from qlibero.policies.surgery import linear_in, swap_modules
from qlibero.quant.artifact import Artifact, LayerRecord, require
from qlibero.quant.float_linear import FloatLinear, assemble_floats
from qlibero.quant.layout import scaled, select
from qlibero.quant.linear import QuantLinear, Weights, assemble
from qlibero.quant.transform import InputTransform


def quantize_policy(
    policy: QuantizablePolicy,
    artifact: Artifact,
    backend: str | Mapping[str, str],
    only: frozenset[str] | None = None,
) -> QuantizablePolicy:
    """`policy` with the artifact's linears on the given backend, one for all or one per linear name. Linears
    with 16-bit activations have no kernel: their backend is "dequantized" (or `fake`, which means the same).

    `only` takes some of the linears and leaves the rest in full precision (to measure what one of them does).

    Tensors are read, packed and placed layer by layer; the policy's own linears may be on the meta device, so
    a full-size quantized policy never holds their full-precision weights.

    Raises:
        GuardRefusal: the artifact belongs to another checkpoint, or selects other linears than this model
            has.
        UserError: a backend cannot do a layer; the message says which and why.
    """
    require(artifact, None, policy.provenance()["sha256"])
    found = {choice.name: choice for choice in select(policy, artifact.spec).choices}
    if found.keys() != {layer.name for layer in artifact.layers}:
        raise GuardRefusal(
            f"the artifact holds {count_text(len(artifact.layers), 'linear')}, its settings select others "
            f"({len(found)}) in "
            "this model: make it again with `qlibero quantize CONFIG`"
        )
    for layer in artifact.layers:
        for field in ("group", "weight_bits", "activation_bits", "executed"):
            have, want = getattr(layer, field), getattr(found[layer.name], field)
            if have != want:
                raise GuardRefusal(
                    f"the artifact says {field} {have} of {layer.name}, in this model it is {want}: make it again with "
                    "`qlibero quantize CONFIG`"
                )
    if artifact.corrections:
        _require_corrections(policy, artifact)
    device = next(p.device for p in policy.model.parameters() if p.device.type != "meta")
    modules: dict[str, nn.Module] = {}
    transforms: dict[str, InputTransform] = {}
    for together in products(artifact, only):
        first = together[0]
        if first.group not in transforms:
            transforms[first.group] = InputTransform(artifact.transform(first.group), first.in_features).to(device)
        names = {backend if isinstance(backend, str) else backend[layer.name] for layer in together}
        for name in sorted(names):  # one, unless validation let neighbours fall back differently
            some = [layer for layer in together if isinstance(backend, str) or backend[layer.name] == name]
            modules |= _modules(policy.model, artifact, some, transforms[first.group], name, device)
    for transform in transforms.values():
        transform.finalize()
    if only is None:
        modules |= _corrected(policy.model, artifact)
    return policy.with_model(swap_modules(policy.model, modules))


def products(artifact: Artifact, only: frozenset[str] | None = None) -> list[list[LayerRecord]]:
    """Layers that are multiplied together: same input, same bits, and both executed or both not."""
    found: dict[tuple[str, int, bool, str | None], list[LayerRecord]] = {}
    for layer in artifact.layers:
        if only is None or layer.name in only:
            alone = layer.name if artifact.spec.row_rotation else None
            found.setdefault((layer.group, layer.weight_bits, layer.executed, alone), []).append(layer)
    return list(found.values())


def gemm_shapes(artifact: Artifact, device: str = "cpu", *, executed_only: bool = True) -> dict[str, GemmShape]:
    """What each linear asks of its kernel, by name: what validation goes through. Linears that are multiplied together
    have the shape of their common product; weight-only ones (16-bit activations) are multiplied by themselves.
    """
    shapes: dict[str, GemmShape] = {}
    for together in products(artifact):
        if together[0].executed or not executed_only:
            for layers in _multiplied(together):
                shapes |= dict.fromkeys((x.name for x in layers), _shape(artifact, layers, device))
    return {layer.name: shapes[layer.name] for layer in artifact.layers if layer.name in shapes}


def _multiplied(together: list[LayerRecord]) -> list[list[LayerRecord]]:
    return [[layer] for layer in together] if together[0].activation_bits == 16 else [together]


def _shape(artifact: Artifact, layers: list[LayerRecord], device: str) -> GemmShape:
    first, n = layers[0], sum(layer.out_features for layer in layers)
    spec = artifact.spec
    bits = spec.kernel_bits(first.weight_bits), first.activation_bits
    return GemmShape(n, first.in_features, *bits, spec.group_size, device, spec.number_format)


def _modules(
    model: nn.Module,
    artifact: Artifact,
    layers: list[LayerRecord],
    shared: InputTransform,
    backend: str,
    device: torch.device,
) -> dict[str, nn.Module]:
    parts = []
    dtype = linear_in(model, layers[0].name).weight.dtype
    for layer in layers:
        linear = linear_in(model, layer.name)
        if (linear.out_features, linear.in_features) != (layer.out_features, layer.in_features):
            raise GuardRefusal(
                f"{layer.name} is {linear.out_features}×{linear.in_features} in this model and "
                f"{layer.out_features}×{layer.in_features} in the artifact"
            )
        rotation = artifact.tensor(f"{layer.name}.output_rotation")
        parts.append(
            Weights(
                artifact.codes(layer.name).to(device),
                artifact.scales(layer.name).to(device),
                None if linear.bias is None else linear.bias.detach(),
                None if rotation is None else rotation.to(device),
            )
        )
    first, spec = layers[0], artifact.spec
    if spec.number_format != "int" and first.activation_bits < 16:
        if backend not in (SIMULATED, "fake"):
            raise UserError(f"{first.name} is {spec.number_format}, for which there is no kernel {backend}; write fake")
        made = assemble_floats(shared, parts, spec.number_format, spec.activation_clip)
        return dict(zip((layer.name for layer in layers), made, strict=True))
    if first.activation_bits == 16:
        if backend not in (DEQUANTIZED, "fake"):
            raise UserError(f"{first.name} has 16-bit activations, for which there is no kernel {backend}; write fake")
        kernel = None
    else:
        kernel, shape = load_kernel(backend), _shape(artifact, layers, device.type)
        support = kernel.supports(shape)
        if not support.ok:
            raise UserError(f"backend {backend} cannot run {first.name} ({shape}): {support.reason}")
    made = assemble(
        kernel,
        shared,
        parts,
        weight_bits=spec.kernel_bits(first.weight_bits),
        activation_bits=first.activation_bits,
        activation_clip=artifact.spec.activation_clip,
        dtype=dtype,
    )
    return dict(zip((layer.name for layer in layers), made, strict=True))


def _require_corrections(policy: QuantizablePolicy, artifact: Artifact) -> None:
    """GuardRefusal for factors of a linear that the settings' corrections do not scale in this policy."""
    may = scaled(policy, artifact.spec)
    for name, values in artifact.corrections.items():
        by = may.get(name)
        low, high = (by.correction.low, by.correction.high) if by else (0.0, 0.0)
        if by is None or len(values) != by.factors or not all(low <= value <= high for value in values):
            what = f"{count_text(len(values), 'factor')} of {short(name)}"
            raise GuardRefusal(
                f"the artifact's corrections hold {what}, which its settings cannot make for this model: make it again "
                "with `qlibero quantize CONFIG`"
            )


def _corrected(model: nn.Module, artifact: Artifact) -> dict[str, nn.Module]:
    """Linears that the layout left in full precision but a calibrated correction scales: a copy with scaled rows.

    In quantized linears the factors are already in the stored weights.
    """
    scaled: dict[str, nn.Module] = {}
    quantized = {layer.name for layer in artifact.layers}
    for name, factors in artifact.corrections.items():
        if name in quantized:
            continue
        linear = linear_in(model, name)
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

    def summary(self) -> JsonObject:
        """JSON-ready, with two ratios: for weights with their scales alone, and with the online transforms."""
        kept, whole = self.weights + self.scales, max(self.bf16, 1)
        return {
            "weight_bytes": self.weights,
            "scale_bytes": self.scales,
            "transform_bytes": self.transforms,
            "bf16_bytes": self.bf16,
            "ratio": round(kept / whole, 4),
            "ratio_with_transforms": round((kept + self.transforms) / whole, 4),
        }


def memory(model: nn.Module, artifact: Artifact) -> Memory:
    """Measure the artifact's linears in `model`; what several share counts once. A weight-only linear counts
    as what it is, a full weight of the model's dtype."""
    found = [model.get_submodule(layer.name) for layer in artifact.layers]
    quantized = [module for module in found if isinstance(module, QuantLinear)]
    plain = [module for module in found if isinstance(module, FloatLinear | nn.Linear)]
    products = {id(m.product): m.product for m in quantized}.values()
    online = [module for module in found if isinstance(module, QuantLinear | FloatLinear)]
    transforms = {id(m.transform): m.transform for m in online}.values()
    rotations = [m.output_rotation for m in quantized if m.output_rotation is not None]
    return Memory(
        weights=sum(product.packed.nbytes for product in products) + sum(m.weight.nbytes for m in plain),
        scales=sum(product.scales.untyped_storage().nbytes() for product in products),
        transforms=sum(transform.nbytes for transform in transforms) + live_bytes(rotations),
        bf16=sum(2 * layer.in_features * layer.out_features for layer in artifact.layers),
    )
