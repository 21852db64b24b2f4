"""Risk: something breaks during a sweep and an episode is lost, doubled or changed. docs/clusters.md's drill, small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fault_drill  # noqa: E402

pytestmark = pytest.mark.libero


def test_a_local_sweep_that_is_hurt_ends_equal_to_one_that_is_not(tmp_path):
    """Without what needs root (a full disk), two minutes (a stopped worker), Slurm, or an artifact nobody else uses."""
    quota = {
        fault_drill.WORKER_KILLED: 2,
        fault_drill.POLICY_KILLED: 1,
        fault_drill.LAUNCHER_KILLED: 1,
        fault_drill.TORN: 2,
        fault_drill.SERVICE_KILLED: 1,
    }
    drill = fault_drill.Drill(tmp_path, quota, tasks=(0,), episodes=4, seeds=(7,))
    assert drill.run() and drill.injected == quota
