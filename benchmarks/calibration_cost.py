"""How long a full-size pi0.5 takes to calibrate on one GPU, and the most memory it takes.

    python benchmarks/calibration_cost.py                     # llm+expert W4A8, GPTQ, the default 96 observations
    python benchmarks/calibration_cost.py --method auto --layout llm

What `qlibero quantize` does once a checkpoint is loaded, by the same function: observe, fit, round, measure on
held-out observations, ask the quantized policy as `fake`, write the artifact and read it back. Random weights in
bfloat16 (their values decide no shape; what GPTQ keeps on them says nothing), the repository's demonstrations as
observations, ten flow steps. A CPU runs the reduced size of `policy_latency.py`. Progress is on stderr; the last line
of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np
import torch
from policy_latency import REDUCED, SHA256, SPOKEN, random_model

from qlibero.activity import heard_by
from qlibero.config.quantization import Quant
from qlibero.policies.pi05.config import PI05_FULL
from qlibero.policies.pi05.normalize import Statistics
from qlibero.policies.pi05.policy import Pi05Policy
from qlibero.policies.pi05.profiles import PROFILES
from qlibero.policies.pi05.tokenizer import WordTokenizer, split_words
from qlibero.quant.prepare import demonstrations, ensure_artifact

DEMONSTRATIONS = Path(__file__).parents[1] / "examples" / "libero" / "embedded" / "calibration.npz"


def random_policy(device: torch.device, prompts: list[str]) -> Pi05Policy:
    """Full size on a GPU, reduced on a CPU; its vocabulary is that of `prompts`."""
    cuda = device.type == "cuda"
    config = PI05_FULL if cuda else REDUCED
    return Pi05Policy(
        "random",
        random_model(config, device, torch.bfloat16 if cuda else torch.float32),
        PROFILES["openpi"],
        {name: Statistics("quantile", -np.ones(n), np.ones(n), 1e-6, 1e-6) for name, n in SPOKEN.items()},
        WordTokenizer(sorted({word for prompt in prompts for word in split_words(prompt)})),
        batch_size=8 if cuda else 1,
        flow_steps=config.flow_steps,
        identity={"sha256": SHA256},
    )


class Clock:
    """Seconds by what the program says it is doing."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.started = self._since = time.perf_counter()
        self._what = "before"
        self._told = 0.0

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        now = time.perf_counter()
        self.seconds[self._what] += now - self._since
        self._what, self._since = what, now
        if now - self._told > 5:
            self._told = now
            print(f"{now - self.started:6.1f} s  {done}/{total} {what}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--method", default="rtn", help="(default: %(default)s)")
    parser.add_argument("--rounding", default="gptq", help="(default: %(default)s)")
    parser.add_argument("--layout", default="llm+expert", help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=96, help="observations (default: %(default)s)")
    args = parser.parse_args()
    device, cuda = torch.device(args.device), args.device.startswith("cuda")
    torch.set_num_threads(1)  # as a run has it
    calibration = {"path": DEMONSTRATIONS, "samples": args.samples}
    spec = Quant(
        method=args.method,
        rounding=args.rounding,
        layout=args.layout,
        block_size=64 if cuda else 32,
        calibration=calibration,
    )
    seen = demonstrations(spec).observations
    policy = random_policy(device, [o.prompt for o in seen])
    loaded = 0
    if cuda:
        loaded = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    with TemporaryDirectory(prefix="calibration_cost") as folder, heard_by(clock):
        found = ensure_artifact(policy, spec, [Path(folder)])
        clock("after")
        size = found.path.stat().st_size
    about = found.artifact.calibration
    document = {
        "benchmark": "calibration_cost",
        "device": torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "settings": found.artifact.spec.label,
        "layers": len(found.artifact.layers),
        "rounded": Counter(layer.rounding for layer in found.artifact.layers),
        "observations": about["observations"],
        "held_out": about["held_out"],
        "seconds": round(found.seconds, 1),
        "seconds_by_part": {what: round(s, 1) for what, s in clock.seconds.items() if s >= 0.05},
        "loaded_gib": round(loaded / 2**30, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "peak_host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "artifact_mb": round(size / 1e6, 1),
        "action_error": about["action_error"],
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
