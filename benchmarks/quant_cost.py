"""What quantization costs and saves per policy call on this CPU, beside the same policy in full precision.

    python benchmarks/quant_cost.py                              # every layout, the embedded policy's architecture
    python benchmarks/quant_cost.py --methods duquant rtn --layouts llm llm+expert --batch 1 4

Arms are asked in turn, call by call, so that whatever else the machine does hits all of them; times are
thread CPU time (wall time beside it), least of `--repeats` calls, one thread. Random weights: time does not
depend on their values.

Two ratios, because two things change. Full precision runs its flow steps as one compiled function; an arm
whose expert is quantized runs them in torch, layer by layer. `ratio` is what a user pays against full
precision as it runs; `same flow` is against full precision with the same kind of flow, which is what
quantizing costs. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np
import torch

from qlibero.config.quantization import Quant
from qlibero.policies.base import Observation
from qlibero.policies.pi05 import PLUGIN
from qlibero.policies.pi05.config import ConvConfig, GemmaConfig, Pi05Config
from qlibero.policies.pi05.model import Pi05Model, initialize
from qlibero.policies.pi05.normalize import from_openpi
from qlibero.policies.pi05.policy import Pi05Policy
from qlibero.policies.pi05.profiles import PROFILES
from qlibero.policies.pi05.tokenizer import WordTokenizer
from qlibero.quant.apply import memory, quantize_policy
from qlibero.quant.calibrate import calibrate
from qlibero.registry import MethodPlugin, built_in

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "examples" / "libero" / "embedded" / "config.json"
COMPACT_M = Pi05Config(
    llm=GemmaConfig(256, 6, 768, 8, 32),
    expert=GemmaConfig(192, 6, 512, 8, 32),
    vision=ConvConfig(),
    vocab_size=640,
    state_dim=8,
)
FULL, FULL_IN_TORCH = "full precision", "full precision, flow in torch"
PROMPT = "pick up the alphabet soup and place it in the basket"


def architecture() -> tuple[str, Pi05Config]:
    """The embedded policy's, or compact M's where that is not built yet."""
    if EMBEDDED.is_file():
        return "embedded", Pi05Config.from_dict(json.loads(EMBEDDED.read_text())["architecture"])
    return "compact M", COMPACT_M


def random_policy(config: Pi05Config, batch: int) -> Pi05Policy:
    """Random weights behind the real preprocessing, sampler and batching."""
    unit = from_openpi({"q01": [-1.0] * 8, "q99": [1.0] * 8}, "quantile", "unit")
    seven = from_openpi({"q01": [-1.0] * 7, "q99": [1.0] * 7}, "quantile", "unit")
    return Pi05Policy(
        "random",
        initialize(Pi05Model(config), 0),
        PROFILES["qlibero"],
        {"state": unit, "actions": seven},
        WordTokenizer(sorted(set(PROMPT.split()))),
        batch_size=batch,
        flow_steps=10,
        identity={"sha256": "0" * 64},
    )


def observations(count: int, seed: int) -> list[Observation]:
    rng = np.random.default_rng(seed)
    return [
        Observation(
            *rng.integers(0, 256, (2, 256, 256, 3), dtype=np.uint8),
            rng.standard_normal(8).astype(np.float32),
            PROMPT,
        )
        for _ in range(count)
    ]


def time_arms(arms: dict[str, Pi05Policy], batch: int, repeats: int) -> dict[str, dict]:
    """Least CPU ms and median wall ms of a call, and the phases of the fastest, per arm."""
    seen = observations(batch, 1)
    noise = {
        name: np.random.default_rng(2).standard_normal((batch, *p.noise_shape), dtype=np.float32)
        for name, p in arms.items()
    }
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    wall: dict[str, list[float]] = {name: [] for name in arms}
    for call in range(repeats + 2):
        for name, policy in arms.items():
            start, clock = time.thread_time(), time.perf_counter()
            policy.infer(seen, noise[name])
            if call >= 2:
                cpu[name].append((time.thread_time() - start) * 1e3)
                wall[name].append((time.perf_counter() - clock) * 1e3)
    return {
        name: {
            "flow": flow(policy),
            "cpu_ms": round(min(cpu[name]), 2),
            "wall_ms_p50": round(float(np.median(wall[name])), 2),
        }
        for name, policy in arms.items()
    }


def flow(policy: Pi05Policy) -> str:
    """How the flow steps run."""
    return "torch" if policy.sampler.cpu_flow is None else "compiled"


def without_compiled_flow(policy: Pi05Policy) -> Pi05Policy:
    """The same weights, flow steps in torch."""
    twin = policy.with_model(policy.model)
    twin.sampler.cpu_flow = None
    return twin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=built_in(MethodPlugin), default=["duquant", "rtn"])
    parser.add_argument("--layouts", nargs="+", choices=PLUGIN.layouts, default=list(PLUGIN.layouts))
    parser.add_argument("--backends", nargs="+", default=["fake", "cpu_int4"])
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    label, config = architecture()
    rows = []
    for batch in args.batch:
        full = random_policy(config, batch)
        arms, about = {FULL: full, FULL_IN_TORCH: without_compiled_flow(full)}, {}
        for layout in args.layouts:
            for method in args.methods:
                spec = Quant(method=method, layout=layout, activation_bits=args.activation_bits, rotation_steps=2)
                noise = np.random.default_rng(0).standard_normal((2, *full.noise_shape), dtype=np.float32)
                artifact = calibrate(full, observations(2, 0), noise, spec, {"data_sha256": "random"})
                for backend in args.backends:
                    name = f"{spec.label}, {backend}"
                    arms[name] = quantize_policy(full, artifact, backend)
                    about[name] = {
                        "backend": backend,
                        "method": method,
                        "layout": layout,
                        "memory": memory(arms[name].model, artifact).summary(),
                    }
        times = time_arms(arms, batch, args.repeats)
        bases = {times[name]["flow"]: times[name]["cpu_ms"] for name in (FULL, FULL_IN_TORCH)}
        print(
            f"\n{label}, batch {batch}, one thread of {platform.processor() or platform.machine()}, "
            f"torch {torch.__version__}"
        )
        print(
            f"{'arm':44} {'flow':>9} {'cpu ms':>8} {'wall p50':>9} {'ratio':>6} {'same flow':>10} "
            f"{'weights/bf16':>13} {'with transforms':>16}"
        )
        for name, measured in times.items():
            ratio = measured["cpu_ms"] / times[FULL]["cpu_ms"]
            same_flow = measured["cpu_ms"] / bases[measured["flow"]]
            saved = about.get(name, {}).get("memory", {})
            ratios = {"ratio": round(ratio, 3), "ratio_same_flow": round(same_flow, 3)}
            rows.append({"batch": batch, "arm": name, **about.get(name, {}), **measured, **ratios})
            print(
                f"{name:44} {measured['flow']:>9} {measured['cpu_ms']:8.1f} {measured['wall_ms_p50']:9.1f} "
                f"{ratio:6.2f} {same_flow:10.2f} "
                f"{saved.get('ratio', ''):>13} {saved.get('ratio_with_transforms', ''):>16}"
            )
    worst = {
        layout: {
            key: max(row[key] for row in rows if (row.get("backend"), row.get("layout")) == ("fake", layout))
            for key in ("ratio", "ratio_same_flow")
        }
        for layout in (args.layouts if "fake" in args.backends else ())
    }
    print(json.dumps({"architecture": label, "worst_fake_ratio": worst, "rows": rows}))


if __name__ == "__main__":
    main()
