"""How late an asynchronous arm's answers are: fixed before its first episode, in control steps, and kept.

A latency that is measured would be another one on every start, and with it every episode. So the first start of an arm
measures it and leaves it in <arm>/latency.json; every later one, and every other shard, takes it from there. Shards
that begin together wait for the one that measures, whatever machine that is on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlibero import files
from qlibero.config.arms import Arm
from qlibero.documents import JsonObject, read_json
from qlibero.episode_key import EpisodeKey
from qlibero.identity import Identity
from qlibero.policies.base import Policy
from qlibero.results.arm_meta import ArmMeta
from qlibero.results.meta import has_episodes, one_at_a_time, read_meta
from qlibero.results.quality import control_steps
from qlibero.results.speed import is_simulation
from qlibero.run.noise import call_noise

log = logging.getLogger(__name__)

FILE = "latency.json"
CALLS = 20


def fixed_execution(
    run_dir: Path, arm: Arm, policy: Policy, prompts: list[str], meta: Mapping[str, Any], config_hash: str
) -> JsonObject | None:
    """What the arm's meta.json says of its execution, {"mode", "latency_ms", "latency_steps", "measured"}; None for a
    synchronous arm. `meta` is what is known of the arm: identity and machine."""
    if arm.execution.mode == "sync":
        return None
    said = arm.execution.latency_ms
    if not isinstance(said, str):
        return {"mode": "async", "latency_ms": said, "latency_steps": control_steps(said), "measured": False}
    ms = _fixed_ms(run_dir, arm.name, policy, prompts, meta, config_hash)
    log.info(f"arm {arm.name}: answers after {ms:.1f} ms, {control_steps(ms)} control steps")
    return {"mode": "async", "latency_ms": ms, "latency_steps": control_steps(ms), "measured": True}


def _fixed_ms(
    run_dir: Path, arm: str, policy: Policy, prompts: list[str], meta: Mapping[str, Any], config_hash: str
) -> float:
    directory = run_dir / arm
    bound = read_meta(run_dir, arm).execution if has_episodes(directory) else None
    if bound is not None:
        return bound.latency_ms
    machine = next((about["kind"] for about in meta.get("probes", {}).values()), "")
    asked = {"config_hash": config_hash, "identity": Identity(meta["identity"]).digest}
    with one_at_a_time(directory):
        kept = _kept(directory, asked)
        if kept is None:
            kept = {**asked, "machine": machine, "ms": measured_ms(policy, prompts), "calls": CALLS}
            files.replace(directory / FILE, json.dumps(kept) + "\n")
            if is_simulation(ArmMeta.model_validate(meta)):
                log.warning(
                    f"arm {arm}: runs on a simulation of a kernel, so its measured latency of {kept['ms']:.0f} ms is "
                    "no kernel's; write execution: {latency_ms: …} for the latency that the kernel would have"
                )
    if kept["machine"] != machine:
        log.warning(
            f"arm {arm}: its latency was measured on another machine ({kept['machine']}, this is {machine}) and holds "
            f"for the whole run; as no episode is recorded yet, remove {directory / FILE} to measure it here"
        )
    return float(kept["ms"])


def measured_ms(policy: Policy, prompts: list[str]) -> float:
    """Median wall time of a call with one observation, milliseconds. The policy is warm."""
    observation = policy.warmup_observations(prompts)[0]
    times = []
    for call in range(CALLS):
        noise = call_noise(EpisodeKey("latency", 0, 0, 0), call, policy.noise_shape)
        started = time.perf_counter()
        policy.infer([observation], noise[None])
        times.append((time.perf_counter() - started) * 1e3)
    return round(float(np.median(times)), 2)


def _kept(directory: Path, asked: Mapping[str, str]) -> JsonObject | None:
    """What an earlier start of the same arm has measured."""
    try:
        found = read_json(directory / FILE)
    except FileNotFoundError:
        return None
    return found if isinstance(found, dict) and all(found.get(key) == value for key, value in asked.items()) else None
