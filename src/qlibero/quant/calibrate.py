"""From a full-precision policy and demonstration observations to an artifact.

Offline and on demonstrations only: the code this grew from fitted its scales on the first *test* observation
and, for the expert, on pure noise. Here every flow step is seen, padded tokens are left out (they feed
statistics but no action), and an artifact says what it was fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlibero.activity import doing
from qlibero.errors import UserError, WorkFailed
from qlibero.kernels import load as load_kernel
from qlibero.kernels.contract import quantize_weights
from qlibero.policies.base import Observation, Policy
from qlibero.quant import methods
from qlibero.quant.activation_stats import Seen, group_seed, observe
from qlibero.quant.artifact import Artifact, LayerRecord, build, pack_nibbles
from qlibero.quant.layout import Choice, select
from qlibero.quant.linear import Weights, assemble
from qlibero.quant.measure import measure, outlier_ratio
from qlibero.quant.spec import QuantSpec
from qlibero.quant.transform import InputTransform, Transform

#: calibration observations on which the finished artifact's effect on actions is measured
SMOKE_OBSERVATIONS = 4
#: methods that look at weights only and can do without observations
DATA_FREE = ("rtn", "weight_pca", "hadamard")


def calibrate(
    policy: Policy,
    observations: Sequence[Observation],
    noise: np.ndarray,
    spec: QuantSpec,
    data: dict[str, Any],
) -> Artifact:
    """Fit, round and measure every selected linear of `policy`.

    noise: (n, H, D) float32, one per observation. data: provenance of the observations for the artifact, with
    `data_sha256`. Deterministic: the same inputs give the same artifact, byte for byte, on one machine.

    Raises:
        UserError: the spec does not fit the model, or a fitted method has no observations.
        WorkFailed: an executed linear was never reached.
    """
    if policy.model is None:
        raise UserError(f"policy {policy.name} runs in another process and cannot be quantized from here")
    if not observations and (spec.method not in DATA_FREE or spec.atm or spec.ohb):
        raise UserError(f"quant: {spec.method} is fitted on observations and there are none; give calibration.path")
    selection = select(policy.model, spec)
    seen = observe(policy, observations, noise, selection, spec.calibration_seed)
    layers: list[LayerRecord] = []
    tensors: dict[str, Tensor] = {}
    groups = selection.groups()
    for index, (group, choices) in enumerate(groups.items()):
        records, stored = _quantize_group(policy.model, group, choices, seen.get(group), spec)
        layers += records
        tensors |= stored
        doing("calibrating: input groups", index + 1, len(groups))
    order = {choice.name: i for i, choice in enumerate(selection.choices)}
    layers.sort(key=lambda record: order[record.name])
    identity = policy.provenance()
    artifact = build(
        spec=spec,
        checkpoint_sha256=identity["sha256"],
        calibration={
            **data,
            "observations": len(observations),
            "prompts": len({o.prompt for o in observations}),
            "tokens": {group: s.tokens for group, s in seen.items()},
            "kept_in_full_precision": list(selection.kept),
            "policy": {key: identity[key] for key in ("type", "dtype", "device", "flow_steps") if key in identity},
            "torch": torch.__version__,
        },
        layers=tuple(layers),
        corrections={},
        tensors=tensors,
    )
    if spec.atm or spec.ohb:
        from qlibero.quant.corrections import fit_corrections

        def requantize(name: str, rows: Tensor) -> dict[str, Tensor]:
            choice = next(choice for choice in selection.choices if choice.name == name)
            linear = copy(policy.model.get_submodule(name))
            linear._parameters = {
                "weight": nn.Parameter(linear.weight.detach() * rows[:, None].to(linear.weight)),
                "bias": None if linear.bias is None else nn.Parameter(linear.bias.detach() * rows.to(linear.bias)),
            }
            _, stored = quantize_linear(
                linear,
                choice,
                InputTransform(artifact.transform(choice.group), linear.in_features).to(linear.weight.device),
                spec,
            )
            return on_disk(stored, choice)

        artifact = fit_corrections(policy, artifact, observations, noise, requantize)
    return _with_action_error(policy, artifact, observations, noise)


@torch.no_grad()
def _with_action_error(
    policy: Policy, artifact: Artifact, observations: Sequence[Observation], noise: np.ndarray
) -> Artifact:
    """The artifact with what it does to the actions of a few calibration observations: the last check before
    any simulator runs, and proof that something *was* quantized."""
    if not observations:
        return artifact
    from qlibero.quant.apply import quantize_policy

    some = slice(0, SMOKE_OBSERVATIONS)
    exact = policy.infer(observations[some], noise[some]).actions.astype(np.float64)
    error = np.abs(quantize_policy(policy, artifact, "fake").infer(observations[some], noise[some]).actions - exact)
    if not np.isfinite(error).all():
        raise WorkFailed("the quantized policy's actions are not finite on calibration observations")
    if error.max() == 0.0:
        raise WorkFailed(
            "the quantized policy's actions equal the full-precision ones bit for bit: nothing was quantized"
        )
    measured = {
        "observations": len(exact),
        "mean_abs": float(f"{error.mean():.6g}"),
        "max_abs": float(f"{error.max():.6g}"),
        "mean_abs_action": float(f"{np.abs(exact).mean():.6g}"),
    }
    return build(
        artifact.spec,
        artifact.checkpoint_sha256,
        artifact.calibration | {"action_error": measured},
        artifact.layers,
        artifact.corrections,
        artifact.tensors,
    )


@torch.no_grad()
def _quantize_group(
    model: nn.Module, group: str, choices: list[Choice], seen: Seen | None, spec: QuantSpec
) -> tuple[list[LayerRecord], dict[str, Tensor]]:
    linears = {choice.name: model.get_submodule(choice.name) for choice in choices}
    transform = fit_transform([linear.weight.detach().float() for linear in linears.values()], group, seen, spec)
    tensors = {f"{group}.{factor}": value.cpu() for factor, value in transform.tensors().items()}
    transform_bytes = sum(t.nbytes for t in tensors.values())
    sample = seen.sample if seen is not None else None
    before = outlier_ratio(sample) if seen is not None else None
    after = outlier_ratio(transform.forward(sample)) if seen is not None else None
    any_linear = next(iter(linears.values()))
    shared = InputTransform(transform, any_linear.in_features).to(any_linear.weight.device)
    records = []
    for choice in choices:
        linear = linears[choice.name]
        quantized, stored = quantize_linear(linear, choice, shared, spec)
        stored = on_disk(stored, choice)
        tensors |= {f"{choice.name}.{key}": value for key, value in stored.items()}
        measures = measure(linear, quantized, sample) if seen is not None and choice.executed else None
        records.append(
            LayerRecord(
                name=choice.name,
                group=group,
                out_features=linear.out_features,
                in_features=linear.in_features,
                weight_bits=choice.weight_bits,
                activation_bits=choice.activation_bits,
                executed=choice.executed,
                sqnr_db=measures and measures.sqnr_db,
                max_error=measures and measures.max_error,
                outlier_before=before if choice.executed else None,
                outlier_after=after if choice.executed else None,
                codes_bytes=stored["codes"].nbytes,
                scales_bytes=stored["scales"].nbytes,
                transform_bytes=transform_bytes if not records else 0,
            )
        )
    return records, tensors


def on_disk(stored: dict[str, Tensor], choice: Choice) -> dict[str, Tensor]:
    """A linear's tensors as an artifact keeps them: 4-bit codes two a byte, scales in bfloat16 (exact, by contract)."""
    codes = pack_nibbles(stored["codes"]) if choice.weight_bits == 4 else stored["codes"]
    kept = stored | {"codes": codes, "scales": stored["scales"].bfloat16()}
    return {key: value.cpu().contiguous() for key, value in kept.items()}


def fit_transform(weights: list[Tensor], group: str, seen: Seen | None, spec: QuantSpec) -> Transform:
    """The method's transform; the identity for an input that no action depends on, since nothing was seen of it."""
    if seen is None and spec.method not in DATA_FREE:
        return Transform()
    width, device = weights[0].shape[1], weights[0].device
    peak = torch.zeros(width, device=device) if seen is None else seen.peak
    tokens = torch.zeros(0, width, device=device) if seen is None else torch.cat([seen.loud, seen.sample])
    data = methods.GroupData(tuple(weights), peak, tokens, group_seed(spec.calibration_seed, group))
    return methods.fit(data, spec)


def quantize_linear(
    linear: nn.Linear, choice: Choice, shared: InputTransform, spec: QuantSpec
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The linear as it will run, on the exact `fake` kernel, and its tensors: codes int8 (N, K), scales, and
    the output rotation if there is one."""
    weight = linear.weight.detach().float()
    rotation = methods.output_rotation(weight, spec)
    transformed = shared.factors().weights(weight)
    if rotation is not None:
        g, b, _ = rotation.shape
        transformed = torch.bmm(rotation.double(), transformed.view(g, b, -1)).reshape(weight.shape)
    codes, scales = quantize_weights(
        transformed.float(),
        choice.weight_bits,
        spec.group_size,
        search=spec.weight_search,
        clip=spec.weight_clip,
    )
    part = Weights(codes, scales, None if linear.bias is None else linear.bias.detach(), rotation)
    (module,) = assemble(
        None if choice.activation_bits == 16 else load_kernel("fake"),
        shared,
        [part],
        weight_bits=choice.weight_bits,
        dtype=torch.float32,
        activation_bits=choice.activation_bits,
        activation_clip=spec.activation_clip,
    )
    stored = {"codes": codes, "scales": scales}
    return module, stored if rotation is None else stored | {"output_rotation": rotation}
