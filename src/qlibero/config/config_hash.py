"""Which settings a run directory is bound to: one hash over everything that decides an episode's result."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qlibero.config.arms import Arm
from qlibero.config.quantization import with_older_words
from qlibero.config.schema import Experiment
from qlibero.documents import JsonObject


def config_hash(experiment: Experiment, arm: Arm) -> str:
    """16 hex digits over every setting that decides the result of one of `arm`'s episodes, and nothing else.

    Left out: which episodes are run (tasks, how many, seeds but the first, stop), what is asked of them (margin,
    estimand, primary, compare_with), other arms, names, workers, retries, videos, tracking, launch. So more episodes or
    another arm continue a run directory, and another seed or alpha is refused. Paths, addresses and pinned hashes do
    not count: what lies there does, by content (`qlibero.identity`).
    """
    policy = arm.policy.model_dump()
    policy.pop("sha256", None)
    if policy.get("type") == "remote":
        policy = {key: policy[key] for key in ("type", "replan_steps")}
    decides = {
        "suite": suites[0] if len(suites := experiment.suites) == 1 else sorted(suites),
        "seed": experiment.seed,
        "protocol": experiment.protocol,
        "max_steps": experiment.max_steps,
        "policy": policy,
        "backend": arm.backend,
        "quant": arm.quant and _ordered(with_older_words(arm.quant.model_dump())),
        "on_failure": experiment.on_failure if arm.quant else None,
    }
    if experiment.inits != "official":  # official ones were there before the key was
        decides["inits"] = experiment.initial_states()[0]
    if own := experiment.own_suites():
        decides["own suites"] = {suite.called: [suite.max_steps, suite.instructions] for suite in own}
    if arm.execution.mode != "sync":  # the only one there was before the key
        decides["execution"] = arm.execution.model_dump()
    text = json.dumps(_without_paths(decides), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _ordered(quant: JsonObject) -> JsonObject:
    decides = {key: value for key, value in quant.items() if key != "artifact_dir"}
    return {**decides, "per_layer_bits": list(quant["per_layer_bits"].items())}  # later patterns win: order counts


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        # None as well: a path left out may mean the very file that another names
        return {key: _without_paths(item) for key, item in value.items() if not isinstance(item, Path | None)}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    return value
