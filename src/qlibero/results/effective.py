"""What is in force in an arm, key by key: what a table of runs sorts and filters by.

An experiment says what its arms have in common and each arm what it changes, so neither alone says what an arm is: a
W4A4 arm's experiment says 8 bits. Here every arm has the same keys, with None for what does not apply to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlibero.documents import JsonObject
from qlibero.results.arm_meta import ArmMeta, QuantMeta
from qlibero.results.runs import listed_arms, suites_of

OF_QUANT = ("method", "layout", "number_format", "weight_bits", "activation_bits", "group_size", "rounding")
OF_POLICY = ("profile", "dtype", "device", "flow_steps", "batch_size", "action_horizon")
OF_EXPERIMENT = ("seed", "protocol", "inits", "max_steps", "episodes_per_task")


def effective_settings(experiment: Mapping[str, Any], arm: str, meta: ArmMeta) -> JsonObject:
    """Of one arm, from the experiment as resolved and the arm's meta.json. JSON types, None where it does not apply."""
    replicated = arm.rpartition("-")[0]
    entry: Mapping[str, Any] = next(
        (e for e in listed_arms(dict(experiment)) if e["name"] == (replicated if e.get("replicates") else arm)), {}
    )
    policy, quant = meta.policy, meta.quant or QuantMeta()
    base, own = experiment.get("policy") or {}, entry.get("policy") or {}
    asked = {**(base if own.get("type", base.get("type")) == base.get("type") else {}), **own}
    execution = meta.execution
    return {
        "arm": arm,
        "experiment": experiment.get("name"),
        "backend": meta.backend or entry.get("backend"),
        **{key: getattr(quant, key) for key in OF_QUANT},
        "policy": policy.name,
        "policy_type": policy.type or asked.get("type"),
        "weights": policy.sha256[:12] if policy.sha256 else None,
        **{key: getattr(policy, key) if key in policy.model_fields_set else asked.get(key) for key in OF_POLICY},
        "replan_steps": asked.get("replan_steps"),
        "execution": execution.mode if execution else "sync",
        "latency_ms": execution and execution.latency_ms,
        "latency_steps": execution and execution.latency_steps,
        "suite": (suites[0] if len(suites) == 1 else suites) if (suites := suites_of(dict(experiment))) else None,
        **{key: experiment.get(key) for key in OF_EXPERIMENT},
        "config_hash": meta.config_hash,
    }


def kernel_rows(meta: ArmMeta) -> list[JsonObject]:
    """A row for each layer: the kernel that ran, what was asked for, the verdict with its reason, shape and noise."""
    noise = {layer.name: layer.sqnr_db for layer in meta.layers}
    return [
        {
            "layer": name,
            "kernel": said.kernel or "",
            "requested": said.requested or "",
            "verdict": said.verdict,
            "reason": said.reason,
            "shape": said.shape,
            "sqnr_db": noise.get(name),
        }
        for name, said in meta.kernels.items()
    ]
