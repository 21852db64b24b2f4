"""Risk: a simulator that runs, and gives other numbers: another MuJoCo, darkened floors, another renderer."""

from __future__ import annotations

import base64
import copy
import json

import numpy as np
import pytest

from qlibero.errors import GuardRefusal
from qlibero.machine.environment import simulator_environment
from qlibero.sim import physics_check
from qlibero.sim.pool import worker_environment


@pytest.fixture
def reference() -> dict:
    return json.loads(physics_check.REFERENCES.read_text())


@pytest.fixture
def here(reference) -> dict:
    return copy.deepcopy(reference)


def episode(seen: dict, suite: str) -> dict:
    return next(value for name, value in seen["episodes"].items() if name.startswith(suite))


def recolour(frame: dict, change) -> None:
    blocks = np.frombuffer(base64.b64decode(frame["blocks"]), np.uint8).astype(float)
    frame["blocks"] = base64.b64encode(np.clip(change(blocks), 0, 255).astype(np.uint8).tobytes()).decode()
    frame["sha256"] = "0" * 64


@pytest.mark.libero
def test_this_machine_is_not_refused():
    report = physics_check.check(worker_environment(simulator_environment())).enforce()
    assert report.verdict in ("valid", "warning") and report.versions["mujoco"] == "3.2.3"
    assert report.renderer


def test_equal_to_the_last_bit_is_valid(reference, here):
    assert physics_check.compare(here, reference).verdict == "valid"


def test_a_darkened_floor_is_refused(reference, here):
    recolour(episode(here, "libero_object")["frames"]["agentview"], lambda grey: grey * 0.8)
    report = physics_check.compare(here, reference)
    assert report.verdict == "refused"
    assert any("libero_object" in f.what and "darker" in f.what for f in report.findings)
    with pytest.raises(GuardRefusal, match="mujoco==3.2.3"):
        report.enforce()


@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_other_physics_are_refused(reference, here, change):
    episode(here, "libero_spatial")["settled"][5] += change
    report = physics_check.compare(here, reference)
    assert report.verdict == "refused" and any("other physics" in finding.what for finding in report.findings)


def test_another_renderer_is_a_warning_that_names_it(reference, here):
    here["renderer"] = "NVIDIA H100 80GB HBM3/PCIe/SSE2"
    for seen in here["episodes"].values():
        for frame in seen["frames"].values():
            recolour(frame, lambda grey: grey + 1)
    report = physics_check.compare(here, reference)
    assert report.verdict == "warning" and len(report.findings) == 1  # said once, not once a frame
    assert "NVIDIA H100" in report.findings[0].what and "llvmpipe" in report.findings[0].what


def test_another_cpu_is_a_warning(reference, here):
    episode(here, "libero_goal")["moved"][7] += 1e-13
    report = physics_check.compare(here, reference)
    assert report.verdict == "warning" and "CPU" in report.findings[0].what


def test_another_numpy_is_named_where_the_cpu_is_not_to_blame(reference, here):
    here["versions"] |= {"numpy": "9.9.9", "BLAS": "blis 4"}
    episode(here, "libero_goal")["moved"][7] += 1e-13
    (finding,) = physics_check.compare(here, reference).findings
    assert f"numpy 9.9.9 with blis 4, references were made with numpy {reference['versions']['numpy']}" in finding.what
    assert "CPU" not in finding.what


def test_a_mujoco_under_which_robosuite_raises_is_refused(reference, here):
    here["versions"]["mujoco"] = "3.4.0"
    del here["episodes"]
    here["error"] = "TypeError: mj_fullM(): incompatible function arguments"
    report = physics_check.compare(here, reference)
    assert report.verdict == "refused"
    assert [finding.level for finding in report.findings] == ["warning", "refusal"]
