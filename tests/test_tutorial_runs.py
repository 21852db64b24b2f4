"""The tutorial's promise: from nothing to a checkpoint that acts, with one command on a CPU, and again to continue."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlibero.policies.pi05.checkpoint import open_checkpoint
from qlibero.policies.pi05.tensor_table import tensor_table
from qlibero.quant.observations import read_demonstrations

pytestmark = pytest.mark.libero

ROOT = Path(__file__).parents[1]


EXAMPLES = ROOT / "examples/libero"
ENVIRONMENT = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory) -> Path:
    """The tutorial's output, on the smallest budget: two demonstrations, 20 training steps."""
    out = tmp_path_factory.mktemp("tutorial")
    run(EXAMPLES / "tutorial.sh", out, "2", "20")
    return out


def run(*command) -> None:
    done = subprocess.run(
        command, env=ENVIRONMENT, text=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_it_ends_in_a_checkpoint_that_qlibero_reads(tutorial):
    checkpoint = open_checkpoint(tutorial / "checkpoint")
    assert tensor_table(checkpoint).problems == []
    calibration = read_demonstrations(tutorial / "checkpoint" / "calibration.npz")
    assert {o.prompt for o in calibration.observations} == {"pick up the salad dressing and place it in the basket"}


def test_the_same_commands_continue(tutorial):
    made = {path: path.stat().st_mtime_ns for path in (tutorial / "frames").rglob("*.npz")}
    steps = [json.loads(line)["step"] for line in open(tutorial / "training" / "curves.jsonl")]
    demonstrations, frames = tutorial / "demonstrations", tutorial / "frames"
    task = ["--suite", "libero_object", "--tasks", "2"]
    run(sys.executable, EXAMPLES / "frames.py", *task, "--demonstrations", demonstrations, "--out", frames)
    assert {path: path.stat().st_mtime_ns for path in frames.rglob("*.npz")} == made
    size = ["--size", "tiny", "--batch", "16", "--capacity", "2000"]
    run(
        sys.executable,
        EXAMPLES / "train.py",
        "--frames",
        frames,
        "--out",
        tutorial / "training",
        *size,
        "--steps",
        "24",
    )
    later = [json.loads(line)["step"] for line in open(tutorial / "training" / "curves.jsonl")]
    assert max(steps) == 20 and later[: len(steps)] == steps and max(later) == 24
