"""What is in force in an arm, key by key: what a table of runs sorts and filters by.

An experiment says what its arms have in common and each arm what it changes, so neither alone says what an arm is: a
W4A4 arm's experiment says 8 bits. Here every arm has the same keys, with None for what does not apply to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlibero.results.runs import listed_arms

OF_QUANT = ("method", "layout", "number_format", "weight_bits", "activation_bits", "group_size", "rounding")
OF_POLICY = ("profile", "dtype", "device", "flow_steps", "batch_size", "action_horizon")
OF_EXPERIMENT = ("suite", "seed", "protocol", "inits", "max_steps", "episodes_per_task")


def effective_settings(experiment: Mapping[str, Any], arm: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Of one arm, from the experiment as resolved and the arm's meta.json. JSON types, None where it does not apply."""
    replicated = arm.rpartition("-")[0]
    entry: Mapping[str, Any] = next(
        (e for e in listed_arms(dict(experiment)) if e["name"] == (replicated if e.get("replicates") else arm)), {}
    )
    policy, quant = meta.get("policy") or {}, meta.get("quant") or {}
    base, own = experiment.get("policy") or {}, entry.get("policy") or {}
    asked = {**(base if own.get("type", base.get("type")) == base.get("type") else {}), **own}
    execution = meta.get("execution") or {}
    weights = policy.get("sha256")
    return {
        "arm": arm,
        "experiment": experiment.get("name"),
        "backend": meta.get("backend") or entry.get("backend"),
        **{key: quant.get(key) for key in OF_QUANT},
        "policy": policy.get("name"),
        "policy_type": policy.get("type") or asked.get("type"),
        "weights": str(weights)[:12] if weights else None,
        **{key: policy.get(key, asked.get(key)) for key in OF_POLICY},
        "replan_steps": asked.get("replan_steps"),
        "execution": execution.get("mode", "sync"),
        "latency_ms": execution.get("latency_ms"),
        "latency_steps": execution.get("latency_steps"),
        **{key: experiment.get(key) for key in OF_EXPERIMENT},
        "config_hash": meta.get("config_hash"),
    }


def kernel_rows(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each layer: the kernel that ran, what was asked for, the verdict with its reason, shape and noise."""
    noise = {layer["name"]: layer.get("sqnr_db") for layer in meta.get("layers") or ()}
    return [
        {
            "layer": name,
            **{key: str(said.get(key) or "") for key in ("kernel", "requested", "verdict", "reason", "shape")},
            "sqnr_db": noise.get(name),
        }
        for name, said in (meta.get("kernels") or {}).items()
    ]
