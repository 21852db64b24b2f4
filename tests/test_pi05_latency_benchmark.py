"""Risk: a policy's full-size benchmarks, which few machines can run, rot. Here they run at reduced size on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BACKENDS = ("int_ref", "cpu_int4")
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "policy_latency.py"


def test_every_variant_runs_and_the_last_line_is_json():
    methods = {"llm": ("duquant", "smooth_hadamard"), "llm+expert_mlp": ("rtn",)}
    variants = [
        f"{layout}/{method}/{backend}" for layout in methods for method in methods[layout] for backend in BACKENDS
    ]
    command = [sys.executable, BENCHMARK, "--device", "cpu", "--repeats", "2", "--variants", ",".join(variants)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout.splitlines()[-1])
    usual = [row for row in document["rows"] if (row["text"], row["horizon"], row["steps"]) == (32, 10, 10)]
    rows = {(row["variant"], row["batch"]): row for row in usual}
    assert not [row for row in document["rows"] if not row["p50_ms"] > 0], "a variant failed"
    assert {"eager float32", "W4A8 llm smooth_hadamard fake", "W4A8 llm duquant int_ref"} <= {v for v, _ in rows}
    alone = rows["W4A8 llm+expert_mlp rtn cpu_int4, straight from its artifact", 1]
    beside = rows["W4A8 llm+expert_mlp rtn cpu_int4", 1]
    assert alone["phases_ms"].keys() == beside["phases_ms"].keys()
    assert {"vision", "prefix", "flow"} <= set(rows["eager float32", 1]["phases_ms"])
    # each variant at fewer flow steps, and at flash-vla's shape
    asked = [tuple(row[key] for key in ("cameras", "batch", "text", "horizon", "steps")) for row in document["rows"]]
    assert all(
        asked.count(shape) == len(variants) for shape in ((2, 1, 32, 10, 1), (2, 1, 32, 10, 2), (3, 1, 200, 50, 10))
    )
    # the exact fake and every other backend must lead to the very same actions
    said = [note for row in document["rows"] for note in row["notes"] if note.startswith("answers of")]
    assert len(said) == 6 and all(note.endswith("EQUAL") for note in said), said


def test_the_calibration_benchmark_says_its_seconds_and_what_it_rounded():
    command = [sys.executable, BENCHMARK.with_name("calibration_cost.py"), "--device", "cpu"]
    command += ["--samples", "3", "--layout", "expert"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout.splitlines()[-1])
    assert (document["settings"], document["layers"], document["held_out"]) == ("rtn W4A8 gptq expert", 21, 1)
    assert document["rounded"].get("gptq") and document["seconds"] > 0
    assert document["seconds_by_part"]["calibrating: input groups"] <= document["seconds"]
