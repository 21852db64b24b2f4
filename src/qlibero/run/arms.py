"""The policies behind an experiment's arms: loaded once, calibrated, quantized, every kernel tried, warmed up.

What each arm really is goes into its meta.json: the checkpoint's and the artifact's hashes, what validation found for
every layer, live bytes of its weights, the latency of the warm-up calls that no statistic counts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from qlibero.activity import doing
from qlibero.config.arms import Arm, overrides_of
from qlibero.config.quantization import Quant
from qlibero.config.schema import Experiment
from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError
from qlibero.identity import file_sha256
from qlibero.kernels import NO_KERNEL, validation
from qlibero.kernels import load as load_kernel
from qlibero.kernels.shapes import Layer
from qlibero.machine.kind import machine_facts, machine_kind
from qlibero.policies import files_of
from qlibero.policies.base import (
    Observation,
    Policy,
    QuantizablePolicy,
    RearrangeablePolicy,
    blank_observation,
    quantizable,
)
from qlibero.quant.apply import gemm_shapes, memory
from qlibero.quant.artifact import Artifact
from qlibero.quant.policy_check import check_policy
from qlibero.quant.prepare import artifact_for, artifact_places, demonstrations, replaced_in_all
from qlibero.quant.recheck import Recheck
from qlibero.quant.shared_weights import QuantizedNetworks, full_policies, sharing
from qlibero.results.arm_meta import ArmMeta
from qlibero.run.noise import RECIPE, call_noise
from qlibero.sim.suites import get_suite, task_language, words_at

log = logging.getLogger(__name__)

WARMUP_CALLS = 3
UNREADABLE_SHOWN = 20  # tasks in an error


def load_arms(
    experiment: Experiment,
    arms: Sequence[Arm],
    before: Mapping[str, ArmMeta] | None = None,
    run_dir: Path | None = None,
    rechecks: dict[str, Recheck] | None = None,
) -> tuple[dict[str, Policy], dict[str, JsonObject]]:
    """Policy and meta.json content by arm name. Arms share every tensor that they do not quantize.

    `before` is the meta.json of arms that hold episodes already: `auto` keeps to the kernel it once chose by timing.
    `run_dir` is where the run lies, beside which artifacts are made if that can be written. `rechecks` is filled with
    what watches each arm's real kernel while it runs.

    Raises GuardRefusal when a kernel is refused or an artifact does not belong to the checkpoint.
    """
    torch.set_num_threads(1)  # simulators have the other cores, and a sum split over threads is another sum
    places = artifact_places(run_dir)
    doing("loading the policy")
    unquantized = full_policies(arms, lambda group: replaced_in_all(group, places))
    for line in _introductions(arms, unquantized):
        log.info(line)
    for arm in arms:
        if (
            horizon := unquantized[arm.name].provenance().get("action_horizon")
        ):  # a server says it with its first answer
            _require_replan(arm, horizon)
    for group in sharing(arms):
        require_readable(unquantized[group[0].name], experiment)
    policies: dict[str, Policy] = {}
    quantized = QuantizedNetworks()
    meta: dict[str, JsonObject] = {}
    for arm in arms:
        full = unquantized[arm.name]
        if arm.quant is None:
            # A/A: the same policy in another arrangement is what rounding alone does to success
            policy = _rearranged(full, arm.replicate) if arm.backend == "aa" else full
            found: JsonObject = {"label": _label(experiment, full, arm)}
        else:
            settled = _settled(arm, (before or {}).get(arm.name, ArmMeta()))
            policy, found, recheck = _quantized(experiment, settled, arm.quant, quantizable(full), places, quantized)
            if recheck is not None and rechecks is not None:
                rechecks[arm.name] = recheck
        doing(f"warming up {arm.name}")
        warmup_ms = warm_up(policy, experiment, arm)
        policies[arm.name] = policy
        meta[arm.name] = {
            "backend": arm.backend,
            "policy": policy.provenance(),
            "identity": identity_parts(arm, policy, found),
            **found,
            **probe(policy, min(experiment.suites)),  # whichever is listed first: their order binds nothing
            "kernels_hash": digest(found.get("kernels", {})),
            "warmup_ms": warmup_ms,
        }
    return policies, meta


def _rearranged(full: Policy, replicate: int) -> Policy:
    if not hasattr(full, "rearranged"):
        raise UserError(
            f"policy {full.name} cannot be computed in another arrangement: leave the arms of backend aa out"
        )
    return cast(RearrangeablePolicy, full).rearranged(replicate)


def _settled(arm: Arm, before: ArmMeta) -> Arm:
    """`auto` chooses by timing, which another day or machine may decide otherwise; what ran once runs again."""
    ran = set(before.executed) - set(NO_KERNEL)
    return replace(arm, backend=ran.pop()) if arm.backend == "auto" and len(ran) == 1 else arm


def identity_parts(arm: Arm, policy: Policy, found: Mapping[str, Any]) -> dict[str, str]:
    """Everything of the policy that decides an action, by content: its files, its settings as they were resolved, the
    artifact and the data it came from, a server's metadata, the noise, compiled code. No paths."""
    about = policy.provenance()
    parts = {"noise recipe": RECIPE}
    for path in files_of(arm.policy):
        name = f"policy file {path.name}"
        parts[name if name not in parts else f"{name} of {path.parent.name}"] = file_sha256(path)
    for key in ("profile", "dtype", "batch_size", "flow_steps", "action_horizon", "action_dim", "arrangement"):
        if key in about:
            parts[f"policy {key.replace('_', ' ')}"] = str(about[key])
    if about["type"] == "remote":
        parts["server's metadata"] = about["metadata_sha256"]
        if not about["server"]:  # it says nothing of its policy: its address is all there is
            parts["server"] = about["url"]
    if code := about.get("execution", {}).get("flow_code"):
        parts["compiled flow"] = code
    if arm.quant is not None:
        parts["artifact"] = found["artifact"]["sha256"]
        data = arm.quant.calibration and arm.quant.calibration.path
        if data and data.is_file():
            parts["calibration data"] = file_sha256(data)
    return parts


def probe(policy: Policy, suite: str) -> JsonObject:
    """{"probe": 16 hex digits over the actions of a call on a fixed observation and noise, "probes": {that: machine}}.

    It differs where the arithmetic does, whatever the reason. A server that draws its own noise answers every call
    differently: its probe is empty, and its metadata alone stands for it.
    """
    about = policy.provenance()
    facts = machine_facts(about["device"]) if "device" in about else {}
    kind = {"kind": machine_kind(facts) if facts else "a policy server", "facts": facts}
    if not about.get("guarantees", {"noise": True})["noise"]:
        return {"probe": "", "probes": {"": kind}}
    seen = np.random.Generator(np.random.Philox(key=0x70726F6265))
    images = seen.integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    state = seen.standard_normal(8).astype(np.float32) * np.float32(0.1)
    noise = call_noise(EpisodeKey("probe", 0, 0, 0), 0, policy.noise_shape)
    # the first instruction of the suite that the policy's vocabulary knows: the same whatever tasks are run
    for task in range(get_suite(suite).tasks):
        observation = Observation(images[0], images[1], state, task_language(suite, task))
        try:
            actions = policy.infer([observation], noise[None]).actions
            break
        except UserError:
            continue
    else:
        raise UserError(f"policy {policy.name} knows no instruction of {suite}")
    found = hashlib.sha256(np.ascontiguousarray(actions, "<f4").tobytes()).hexdigest()[:16]
    return {"probe": found, "probes": {found: kind}}


def describe(policy: Policy) -> str:
    """One line: size, device, dtype."""
    about = policy.provenance()
    size = f"{about['parameters'] / 1e6:.1f} M parameters, " if "parameters" in about else ""
    return size + ", ".join(str(about[key]) for key in ("dtype", "device", "url") if about.get(key))


def digest(verdicts: JsonObject) -> str:
    """16 hex digits over which kernel runs each layer, not over why: reasons name times. "" for an unquantized arm."""
    ran = {layer: [said["kernel"], said["shape"]] for layer, said in verdicts.items()}
    return hashlib.sha256(json.dumps(ran, sort_keys=True).encode()).hexdigest()[:16] if ran else ""


def layers_of(policy: QuantizablePolicy, artifact: Artifact, prompts: Sequence[str]) -> list[Layer]:
    """What is validated: every executed layer with the numbers of tokens that calls with these prompts give it."""
    tokens, linears = policy.token_counts(prompts), policy.linears()
    shapes = gemm_shapes(artifact, policy.device.type)
    return [Layer(name, shape, tokens[linears[name].rows]) for name, shape in shapes.items()]


def layers_of_arms(experiment: Experiment) -> list[Layer]:
    """What a run of the experiment would validate, all quantized arms together.

    Calibrates where an artifact is not ready yet.
    """
    arms = [arm for arm in experiment.arms() if arm.quant is not None]
    full = {name: quantizable(policy) for name, policy in full_policies(arms, replaced_in_all).items()}
    layers = [
        layer
        for arm in arms
        if arm.quant is not None
        for layer in layers_of(full[arm.name], artifact_for(full[arm.name], arm.quant), prompts(experiment))
    ]
    found = [layer for layer in layers if not validation.without_kernel(layer.shape)]
    if not found:
        raise UserError(f"{experiment.name}: no arm has integer activations, so nothing is asked of a kernel")
    return list(dict.fromkeys(found))


def _quantized(
    experiment: Experiment,
    arm: Arm,
    quant: Quant,
    full: QuantizablePolicy,
    places: Sequence[Path],
    networks: QuantizedNetworks,
) -> tuple[Policy, JsonObject, Recheck | None]:
    artifact = artifact_for(full, quant, places)
    verdicts = validation.check(layers_of(full, artifact, prompts(experiment)), arm.backend, experiment.on_failure)
    executed = validation.enforce(verdicts)
    # layers that never run are not tried: they follow the arm's first choice
    default = next(iter(executed.values()))
    kernels = {layer.name: executed.get(layer.name, default) for layer in artifact.layers}
    policy = networks.policy(full, artifact, kernels)
    policy_check = recheck = None
    real = sorted(set(kernels.values()) - {"fake", *NO_KERNEL})
    exact = all(load_kernel(name).rounds_to is None for name in real)
    if real:
        twin = networks.on_fake(full, artifact)
        why = "no memory for the same policy on fake" if twin is None else "" if exact else "its kernel rounds"
        recheck = Recheck(policy, artifact, twin if exact else None, why)
        noise = call_noise(EpisodeKey("warmup", 0, 0, experiment.seed), 0, policy.noise_shape)
        policy_check = check_policy(full, policy, artifact, _seen(quant, prompts(experiment)[0]), noise, twin)
    fallbacks = sum(verdict.verdict != "pass" for verdict in verdicts)
    kinds = ", ".join(sorted(set(executed.values())))
    log.info(
        f"arm {arm.name}: {artifact.spec.label}, {count_text(len(artifact.layers), 'linear')} on {kinds}"
        + (f", {fallbacks} fell back" if fallbacks else "")
    )
    return (
        policy,
        {
            "label": _label(experiment, full, arm),
            "quant": artifact.spec.identity(),
            "artifact": {"sha256": artifact.sha256, "key": artifact.key, "path": str(artifact.path)},
            "kernels": {
                v.layer: {
                    "kernel": v.executed,
                    "requested": v.requested,
                    "verdict": v.verdict,
                    "reason": v.reason,
                    "shape": str(v.shape),
                }
                for v in verdicts
            },
            "exact": exact,
            "witness": policy_check.to_json() if policy_check else None,
            "layers": [{"name": layer.name, "sqnr_db": layer.sqnr_db} for layer in artifact.layers if layer.executed],
            "action_error": artifact.calibration.get("action_error"),
            "memory": memory(policy.model, artifact).summary(),
        },
        recheck,
    )


def prompts(experiment: Experiment) -> list[str]:
    """The instructions of the experiment's tasks."""
    return list(dict.fromkeys(task_language(suite, task) for suite, task in experiment.all_tasks()))


def require_readable(policy: Policy, experiment: Experiment) -> None:
    """Raise UserError naming every task whose words the policy cannot read, with their file and line."""
    wrong: dict[str, dict[int, str]] = {}
    for suite, task in experiment.all_tasks():
        try:
            policy.warmup_observations([task_language(suite, task)])
        except UserError as problem:
            wrong.setdefault(suite, {})[task] = f"{words_at(suite, task)}: {problem}"
    if wrong:
        readable = {s: [t for t in experiment.task_ids(s) if t not in wrong.get(s, {})] for s in experiment.suites}
        lines = [f"{suite} task {task}: {said}" for suite, tasks in wrong.items() for task, said in tasks.items()]
        if len(lines) > UNREADABLE_SHOWN:
            lines[UNREADABLE_SHOWN:] = [f"and {len(lines) - UNREADABLE_SHOWN} more tasks"]
        kept = ", ".join(f"{suite}: {tasks}" for suite, tasks in readable.items() if tasks and suite in wrong)
        none = ", ".join(suite for suite, tasks in readable.items() if not tasks)
        hint = [
            f"write tasks: {{{kept}}}" if kept else "",
            f"leave out {none}, of which it can read none" if none else "",
        ]
        raise UserError("\n".join([*lines, "; ".join(filter(None, hint))]))


def _label(experiment: Experiment, full: Policy, arm: Arm) -> str:
    what = arm.quant.label if arm.quant is not None else full.provenance().get("dtype", "remote")
    return f"{arm.name} ({', '.join([str(what), *overrides_of(experiment, arm)])})"


def _introductions(arms: Sequence[Arm], unquantized: Mapping[str, Policy]) -> Iterator[str]:
    """A line for each set of weights, with its checkpoint's remarks."""
    groups = sharing(arms)
    for group in groups:
        full = unquantized[group[0].name]
        of = f", for {', '.join(arm.name for arm in group)}" if len(groups) > 1 else ""
        yield f"policy {full.name}: {describe(full)}{of}"
        remarks = (r for arm in group for r in unquantized[arm.name].provenance().get("remarks", ()))
        yield from (f"checkpoint: {remark}" for remark in dict.fromkeys(remarks))


def _seen(quant: Quant, prompt: str) -> Observation:
    """A demonstration's observation under one of this experiment's instructions; grey where the arm has no data."""
    found = demonstrations(quant).observations
    return replace(found[0], prompt=prompt) if found else blank_observation(prompt)


def warm_up(policy: Policy, experiment: Experiment, arm: Arm) -> list[float]:
    """Milliseconds of the first calls (kernels compile, memory is taken, graphs captured); no episode pays for them."""
    seen = policy.warmup_observations(prompts(experiment))
    times = []
    for call in range(WARMUP_CALLS):
        noise = call_noise(EpisodeKey("warmup", 0, 0, experiment.seed), call, policy.noise_shape)
        for observation in seen if call == 0 else seen[:1]:
            started = time.perf_counter()
            chunk = policy.infer([observation], noise[None])
            _require_replan(arm, chunk.actions.shape[1])
            times.append(round((time.perf_counter() - started) * 1e3, 2))
    return times


def _require_replan(arm: Arm, horizon: int) -> None:
    """Raise UserError where more actions of a chunk are to be executed than it has."""
    wanted = arm.policy.replan_steps
    if wanted > horizon:
        raise UserError(
            f"arm {arm.name}: policy.replan_steps is {wanted}, but a chunk of this policy has "
            f"{count_text(horizon, 'action')}: write at most {horizon}"
        )
