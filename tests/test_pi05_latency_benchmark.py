"""Risk: the full-size latency benchmark, which few machines can run, rots. Here it runs at reduced size on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "policy_latency.py"


def test_every_variant_runs_and_the_last_line_is_json():
    command = [sys.executable, BENCHMARK, "--device", "cpu", "--repeats", "2", "--backends", "fake,int_ref"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout.splitlines()[-1])
    rows = {(row["variant"], row["batch"]): row for row in document["rows"]}
    assert not [row for row in document["rows"] if not row["p50_ms"] > 0], "a variant failed"
    assert {"eager float32", "W4A8 llm fake", "W4A8 llm+expert_mlp fake", "W4A8 llm int_ref"} <= {v for v, _ in rows}
    alone = rows["W4A8 llm+expert_mlp fake, straight from its artifact", 1]
    beside = rows["W4A8 llm+expert_mlp fake", 1]
    assert alone["phases_ms"].keys() == beside["phases_ms"].keys()
    assert {"vision", "prefix", "flow"} <= set(rows["eager float32", 1]["phases_ms"])
    # the exact fake and the integer reference must lead to the very same actions
    said = [note for row in document["rows"] for note in row["notes"] if "int_ref" in note]
    assert len(said) == 2 and all(note.endswith("EQUAL") for note in said), said
