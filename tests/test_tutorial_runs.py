"""The tutorial's promise: from nothing to a checkpoint that acts, with one command on a CPU, and again to
continue."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from qlibero.policies.pi05.checkpoint import open_checkpoint, tensor_table
from qlibero.quant.observations import read_demonstrations

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tutorial")
    run(out, "20")
    return out


def run(out: Path, steps: str) -> str:
    environment = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([ROOT / "examples/libero/tutorial.sh", out, "2", steps], env=environment, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=900)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_it_ends_in_a_checkpoint_that_qlibero_reads(tutorial):
    checkpoint = open_checkpoint(tutorial / "checkpoint")
    assert tensor_table(checkpoint).problems == []
    calibration = read_demonstrations(tutorial / "checkpoint" / "calibration.npz")
    assert {o.prompt for o in calibration.observations} == {
        "pick up the salad dressing and place it in the basket"
    }


def test_the_same_command_continues(tutorial):
    made = {path: path.stat().st_mtime_ns for path in (tutorial / "frames").rglob("*.npz")}
    steps = [json.loads(line)["step"] for line in open(tutorial / "training" / "curves.jsonl")]
    run(tutorial, "24")
    assert {path: path.stat().st_mtime_ns for path in (tutorial / "frames").rglob("*.npz")} == made
    later = [json.loads(line)["step"] for line in open(tutorial / "training" / "curves.jsonl")]
    assert max(steps) == 20 and later[: len(steps)] == steps and max(later) == 24
