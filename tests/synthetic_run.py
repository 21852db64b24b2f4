"""Run directories as the engine leaves them, made through the real ledger in a second. For tests of what reads them."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import yaml

from qlibero.results.ledger import Ledger, write_meta
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import read_run, video_path

ARMS = {"baseline": 0.0, "aa": 0.01, "w4a8": 0.05, "w4a4": 0.2}  # share of flipped episodes
HORIZON = 120


def make_run(
    directory: Path,
    arms: dict[str, float] = ARMS,
    suite: str = "libero_object",
    tasks: int = 3,
    inits: int = 10,
    name: str = "synthetic",
    trajectories: bool = True,
    labels: dict[str, str] | None = None,
    meta: bool = True,
    seed: int = 0,
    settings: dict | None = None,
) -> Path:
    """Every arm on the same episodes; flips, divergence, latency and one error are drawn from `seed`.

    `settings` go into its experiment.yaml.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "name": name,
        "suite": suite,
        "tasks": list(range(tasks)),
        "episodes_per_task": inits,
        "seed": 7,
        "backends": list(arms),
        **(settings or {}),
    }
    (directory / "experiment.yaml").write_text(yaml.safe_dump(config))
    (directory / "environment.json").write_text(
        json.dumps(
            {
                "versions": {"torch": "2.13.0", "mujoco": "3.2.3"},
                "git": {"commit": "abc", "modified": True},
                "instructions": {suite: {str(task): f"put object {task} away" for task in range(tasks)}},
            }
        )
    )
    for arm, flips in arms.items():
        flip = np.random.default_rng([seed, *arm.encode()])
        with Ledger(directory, arm, 0, f"hash of {arm}") as ledger:
            for task in range(tasks):
                for init in range(inits):
                    error = arm == "w4a8" and (task, init) == (1, 1)
                    record, rows = episode(suite, task, init, arm, flip.random() < flips, error, seed)
                    ledger.append(record, rows if trajectories and not error else None)
        if meta:
            write_meta(directory, arm, arm_meta(arm, (labels or {}).get(arm, arm)))
    return directory


def episode(suite: str, task: int, init: int, arm: str, flipped: bool, error: bool, seed: int):
    scene = np.random.default_rng([seed, task, init])
    success, quick = bool(scene.random() < 0.9) ^ flipped, int(scene.integers(40, 80))
    steps = quick if success else HORIZON
    rows = np.zeros((HORIZON, 10), np.float32)
    rows[:, :6] = scene.normal(0, 0.3, (HORIZON, 6))
    rows[:, 6] = np.where(np.arange(HORIZON) < 30, -1, 1)
    rows[:, 7:] = scene.normal(0, 0.004, (HORIZON, 3)).cumsum(0)
    if flipped or arm not in ("baseline", "aa"):
        rows[20:, :3] += 0.05
        rows[20:, 7] += 0.001 * np.arange(HORIZON - 20, dtype=np.float32)
    rows = rows[:steps]
    calls = -(-steps // 5)
    latency = ({"baseline": 1260.0, "aa": 2262.0}.get(arm, 920.0) * scene.lognormal(0, 0.08, calls)).tolist()
    record = EpisodeRecord(
        suite=suite,
        task=task,
        init=init,
        seed=7,
        arm=arm,
        outcome="error" if error else "success" if success else "failure",
        error="the simulator died" if error else None,
        steps=steps,
        replans=calls,
        success_step=steps if success and not error else None,
        fingerprint=hashlib.sha256(f"{task} {init}".encode()).hexdigest(),
        action_digest=hashlib.sha256(rows[:, :7].tobytes()).hexdigest(),
        policy_ms=latency,
        phases_ms={"vision": [x / 3 for x in latency], "flow": [x / 2 for x in latency]},
        sim_ms=29.0 * steps,
        render_ms=110.0 * calls,
    )
    return record, rows


def arm_meta(arm: str, label: str) -> dict:
    names = [f"paligemma.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj", "mlp.down_proj")]
    meta = {
        "label": label,
        "control": arm == "aa",
        "policy": {"type": "pi05", "sha256": "5f" * 32, "dtype": "float32"},
        "warmup_ms": [812.0, 25.1, 24.9],
    }
    if arm.startswith("w"):
        meta["kernels"] = {
            n: {
                "kernel": "cpu_int4" if i else "fake",
                "requested": "cpu_int4",
                "verdict": "pass" if i else "fall back to fake",
                "reason": "equal",
                "shape": "512x256 W4A8 cpu",
            }
            for i, n in enumerate(names)
        }
        meta["quant"] = {"weight_bits": 4}
        meta["layers"] = [{"name": n, "sqnr_db": 20.0 + i} for i, n in enumerate(names)]
        meta["memory"] = {
            "weight_bytes": 6_000_000,
            "scale_bytes": 50_000,
            "transform_bytes": 700_000,
            "bf16_bytes": 24_000_000,
        }
    return meta


def film(directory: Path, limit: int = 6) -> int:
    """Small real videos for flipped episodes of every arm."""
    run, made = read_run(directory), 0
    base = run.arms["baseline"].by_key()
    for name, arm in run.arms.items():
        for key, record in list(arm.by_key().items()) if name != "baseline" else []:
            if made < limit and {record.outcome, base[key].outcome} == {"success", "failure"}:
                for one in (record, base[key]):
                    path = video_path(directory, one)
                    path.parent.mkdir(exist_ok=True)
                    source = f"testsrc=size=128x64:rate=20:duration={one.steps / 20}"
                    command = [
                        "ffmpeg",
                        "-loglevel",
                        "error",
                        "-y",
                        "-f",
                        "lavfi",
                        "-i",
                        source,
                        "-c:v",
                        "libx264",
                        "-pix_fmt",
                        "yuv420p",
                        "-threads",
                        "1",
                    ]
                    subprocess.run([*command, str(path)], check=True)
                made += 1
    return made
