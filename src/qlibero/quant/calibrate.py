"""From a full-precision policy and demonstration observations to an artifact.

Offline and on demonstrations only: the code this grew from fitted its scales on the first *test* observation
and, for the expert, on pure noise. Here every flow step is seen, padded tokens are left out (they feed
statistics but no action), and an artifact says what it was fitted on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from qlibero.config.quantization import Quant
from qlibero.documents import JsonObject
from qlibero.errors import UserError, WorkFailed
from qlibero.policies.base import Observation, QuantizablePolicy
from qlibero.quant.action_error import action_error
from qlibero.quant.artifact import Artifact, build
from qlibero.quant.fitting import Fitting
from qlibero.quant.held_out import held_out
from qlibero.quant.inputs import inputs_of
from qlibero.quant.layout import select


@contextmanager
def one_thread() -> Iterator[None]:
    """A sum that is split over threads is another sum, and so another artifact."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def calibrate(
    policy: QuantizablePolicy,
    observations: Sequence[Observation],
    noise: np.ndarray,
    spec: Quant,
    data: JsonObject,
) -> Artifact:
    """Fit, round and measure every selected linear of `policy`.

    noise: (n, H, D) float32, one per observation. data: provenance of the observations for the artifact, with
    `data_sha256`. Deterministic: the same inputs give the same artifact, byte for byte, on one machine.

    Raises:
        UserError: the spec does not fit the model, or a fitted method has no observations.
        WorkFailed: an executed linear was never reached.
    """
    if not observations and spec.needs_data:
        what = f"method {spec.method}" if not spec.transform.data_free else "a correction"
        what = "rounding: gptq" if spec.rounding == "gptq" else what
        raise UserError(f"quant: {what} is fitted on observations and there are none; give calibration.path")
    selection = select(policy, spec)
    fitting = Fitting(policy, observations, noise, spec, selection)
    fitting.run()
    layers = fitting.layers
    order = {choice.name: i for i, choice in enumerate(selection.choices)}
    layers.sort(key=lambda record: order[record.name])
    identity = policy.provenance()
    artifact = build(
        spec=spec,
        checkpoint_sha256=identity["sha256"],
        calibration={
            **data,
            "observations": len(observations),
            "held_out": sum(held_out(len(observations))),
            "prompts": len({o.prompt for o in observations}),
            **fitting.account.to_json(spec.method),
            "kept_in_full_precision": list(selection.kept),
            "inputs": inputs_of(policy, spec),
            "torch": torch.__version__,
        },
        layers=tuple(layers),
        corrections={},
        tensors=fitting.tensors,
    )
    if spec.corrections:
        from qlibero.quant.corrections import fit_corrections

        artifact = fit_corrections(policy, artifact, observations, noise, fitting.again)
    return _with_action_error(policy, artifact, observations, noise)


@torch.no_grad()
def _with_action_error(
    policy: QuantizablePolicy, artifact: Artifact, observations: Sequence[Observation], noise: np.ndarray
) -> Artifact:
    """The artifact with what it does to the actions of held-out observations: the last check before any simulator runs,
    and proof that something *was* quantized."""
    if not observations:
        return artifact
    from qlibero.quant.apply import quantize_policy

    held = [i for i, out in enumerate(held_out(len(observations))) if out] or [0]
    some = [observations[i] for i in held]
    exact = policy.infer(some, noise[held]).actions.astype(np.float64)
    found = quantize_policy(policy, artifact, "fake").infer(some, noise[held]).actions.astype(np.float64)
    if not np.isfinite(found).all():
        raise WorkFailed("the quantized policy's actions are not finite on calibration observations")
    if np.array_equal(found, exact):
        raise WorkFailed(
            "the quantized policy's actions equal the full-precision ones bit for bit: nothing was quantized"
        )
    measured = action_error(exact, found).to_json()
    return build(
        artifact.spec,
        artifact.checkpoint_sha256,
        artifact.calibration | {"action_error": measured},
        artifact.layers,
        artifact.corrections,
        artifact.in_memory(),
    )
