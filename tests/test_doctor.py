"""Risk: a machine that cannot give the published numbers gives numbers, or the doctor sends its owner the wrong way."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlibero.cli import doctor
from qlibero.cli.doctor import Finding, diagnose
from qlibero.cli.doctor.software import PINS
from qlibero.machine import environment
from qlibero.machine.capacity import Capacity
from qlibero.machine.cuda_toolkit import Agreement, Toolkit
from qlibero.sim.physics_check import PhysicsFinding

GPU = {
    "index": "0",
    "uuid": "GPU-a",
    "name": "NVIDIA A40",
    "driver": "550.54.14",
    "memory_mib": "46068",
    "compute_capability": "8.6",
}
SECOND = GPU | {"index": "1", "uuid": "GPU-b"}
A40 = {"renderer": "NVIDIA A40/PCIe/SSE2"}
LLVMPIPE = {"renderer": "llvmpipe (LLVM 15.0.6, 256 bits)"}


def one(answer: Finding | list[Finding]) -> Finding:
    (finding,) = answer if isinstance(answer, list) else [answer]
    return finding


def test_a_broken_check_is_a_finding_and_hides_no_other() -> None:
    def breaks() -> Finding:
        raise RuntimeError("no such thing")

    first, second = diagnose([breaks, lambda: Finding("x", "ok", "fine")])
    assert (first.status, first.name) == ("fail", "breaks") and "no such thing" in first.found
    assert second.status == "ok"


@pytest.mark.parametrize(
    ("answer", "status", "found", "hint"),
    [
        (lambda: doctor.pins(PINS), "ok", "mujoco 3.2.3", ""),
        (lambda: doctor.pins(PINS | {"mujoco": "3.8.1"}), "fail", "3.8.1", "pip install mujoco==3.2.3"),
        (
            lambda: doctor.pins({k: v for k, v in PINS.items() if k != "bddl"}),
            "fail",
            "not installed",
            "pip install bddl==1.0.1",
        ),
        (
            lambda: doctor.legacy_variables({"OPENPI_DUQUANT_ABITS": "4"}),
            "warn",
            "will override quant",
            "unset OPENPI_DUQUANT_ABITS",
        ),
        (lambda: doctor.legacy_variables({"PATH": "/bin"}), "ok", "no OPENPI_DUQUANT_*", ""),
        (lambda: doctor.ffmpeg(path="/nowhere"), "warn", "no ffmpeg", "--set videos=0"),
        (lambda: doctor.memory(Capacity(2, 1.5, 1.0, "")), "fail", "1.0 of 1.5 GB are free", "--mem"),
        (lambda: doctor.memory(Capacity(2, 4.0, 1.5, "")), "warn", "1.5 of 4.0 GB are free now", "ps aux"),
        (lambda: doctor.memory(Capacity(16, 8.0, 8.0, "")), "warn", "4 simulators", "--mem"),
        (lambda: doctor.memory(Capacity(16, 64.0, 60.0, "")), "ok", "60.0 of 64.0 GB", ""),
        (lambda: doctor.cpus(Capacity(8, 9.0, 9.0, ""), 8), "ok", "8", ""),
        (
            lambda: doctor.cpus(Capacity(1, 9.0, 9.0, "cores by a cgroup quota"), 8),
            "warn",
            "1 of the 8 that are shown (cores by a cgroup quota)",
            "--cpus",
        ),
        (lambda: doctor.driver([], None), "ok", "policies run on the CPU", ""),
        (lambda: doctor.driver([], "13.0"), "warn", "torch is built for CUDA 13.0", "nvidia-smi"),
        (lambda: doctor.driver([GPU], None), "warn", "torch is a CPU build", "pip install"),
        (lambda: doctor.driver([GPU], "12.8"), "ok", "A40 45 GiB; driver 550.54.14", ""),
        (lambda: doctor.driver([GPU], "13.0"), "fail", "CUDA 13.0 needs 580", "update the driver to 580"),
        (lambda: doctor.rendering({"problem": "no EGL"}, []), "fail", "no EGL", "libegl1"),
        (lambda: doctor.rendering(LLVMPIPE, []), "ok", "llvmpipe", ""),
        (lambda: doctor.rendering(LLVMPIPE, [GPU]), "warn", "although there is a GPU", "NVIDIA_DRIVER_CAPABILITIES"),
        (lambda: doctor.rendering(A40, [GPU])[1:], "warn", "share the only GPU", "MUJOCO_GL=osmesa"),
        (
            lambda: doctor.rendering(A40, [GPU, SECOND])[1:],
            "warn",
            "although there are several",
            "MUJOCO_EGL_DEVICE_ID=1",
        ),
    ],
)
def test_each_state_of_the_machine_has_its_answer(
    answer: Any, status: str, found: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    finding = one(answer())
    assert finding.status == status and found in finding.found and hint in finding.hint
    assert bool(finding.hint) == (status != "ok"), "what is wrong has a hint, what is well has none"


def test_a_user_who_chose_another_egl_device_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "1")
    assert [f.status for f in doctor.rendering(A40, [GPU, SECOND])] == ["ok"]


def test_a_toolkit_that_disagrees_with_itself_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "toolkit", lambda: Toolkit(Path("/cuda"), (), "pip packages"))
    monkeypatch.setattr(
        environment,
        "agreement",
        lambda: Agreement((13, 0), (11, 8), None, "nvcc is 13.0 but cuda.h 11.8", "use one toolkit"),
    )
    assert doctor.toolkit() == Finding("CUDA toolkit", "fail", "nvcc is 13.0 but cuda.h 11.8", "use one toolkit")
    monkeypatch.setattr(environment, "agreement", lambda: Agreement((13, 0), (13, 0), None, None, None))
    assert doctor.toolkit().status == "ok" and "13.0" in doctor.toolkit().found


def test_another_version_than_pinned_is_named(tmp_path: Path) -> None:
    assert doctor.lock(tmp_path).status == "warn"
    (tmp_path / "requirements.txt").write_text("# locked\nmujoco==3.2.3\nnumpy==1.0.0\n")
    finding = doctor.lock(tmp_path)
    assert (
        finding.status == "warn"
        and "numpy" in finding.found
        and "pinned 1.0.0" in finding.found
        and "mujoco" not in finding.found
    )
    (tmp_path / "requirements.txt").write_text("mujoco==3.2.3\n")
    assert doctor.lock(tmp_path).status == "ok"


def test_the_disk_is_written_to_not_guessed(tmp_path: Path) -> None:
    assert doctor.disk(tmp_path / "not" / "yet" / "there").found.endswith(str(tmp_path))
    assert doctor.disk(Path("/proc")).status == "fail"


def test_shared_memory_is_tried() -> None:
    assert one(doctor.shared_memory()).status in ("ok", "warn")


def test_wandb_is_never_a_failure_and_no_key_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        answers = doctor.wandb({"WANDB_BASE_URL": url, "WANDB_API_KEY": "s" * 40})
        assert answers.status == "ok" and "answers" in answers.found and "sss" not in json.dumps(answers.to_json())
        assert "wandb login" in doctor.wandb({"WANDB_BASE_URL": url}).hint
    gone = doctor.wandb({"WANDB_BASE_URL": url}, timeout_s=1)
    assert gone.status == "ok" and "cannot be reached" in gone.found and "offline" in gone.found


def test_a_kernel_that_was_never_tried_is_not_well(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"backend": "baseline", "here": True},
        {"backend": "fake", "here": True, "validation": "reference", "runs_on": "cpu"},
        {"backend": "cpu_int4", "here": True, "validation": "unproven", "runs_on": "cpu"},
        {"backend": "w8a8", "here": True, "validation": "passed 3 shapes on x86", "runs_on": "cpu"},
    ]
    monkeypatch.setattr("qlibero.cli.catalogue.backends", lambda: rows)
    untried, passed = doctor.kernels()
    assert (untried.name, untried.status, untried.hint) == (
        "kernel cpu_int4",
        "warn",
        "qlibero kernels check --backend cpu_int4",
    )
    assert (passed.status, passed.hint) == ("ok", "")
    monkeypatch.setattr("qlibero.cli.catalogue.backends", lambda: rows[:2])
    assert one(doctor.kernels()).status == "warn"


def test_the_physics_check_becomes_findings() -> None:
    refused = SimpleNamespace(
        findings=(
            PhysicsFinding("refusal", "other physics", "setup"),
            PhysicsFinding("warning", "other CPU", "nothing"),
        ),
        renderer="r",
    )
    assert [f.status for f in doctor.physics(refused)] == ["fail", "warn"]
    assert one(doctor.physics(SimpleNamespace(findings=(), renderer="r"))).status == "ok"


def test_without_a_driver_that_renders_both_checks_say_so_and_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real EGL, real MuJoCo, no driver: neither a bug of ours nor a damaged installation."""
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", "/nonexistent")
    rendering, physics = diagnose([doctor.graphics.rendering, doctor.physics])
    assert (rendering.status, physics.status) == ("fail", "fail")
    assert "knows no device" in rendering.found and "renders without a screen" in physics.found
    for finding in (rendering, physics):
        assert "libegl1" in finding.hint and "Without root" in finding.hint and "--repair" not in finding.hint


def test_a_simulator_that_was_edited_or_shadowed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.simulator().status == "ok"
    monkeypatch.setattr("qlibero.sim.provenance.PACKAGES", {"pytest": ("robosuite",)})
    found = doctor.simulator()
    assert found.status == "fail" and "pytest is imported from" in found.found
    assert found.hint == "env -u PYTHONPATH qlibero doctor"


def test_this_machine_is_well_as_far_as_the_quick_checks_see() -> None:
    quick = [check for check in doctor.CHECKS if check not in (doctor.physics, doctor.kernels, doctor.wandb)]
    findings = diagnose(quick)
    assert not [f for f in findings if f.status == "fail"], findings
    assert len({f.name for f in findings}) == len(findings)
