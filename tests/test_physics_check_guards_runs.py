"""Risk: a run on a simulator with other physics gives numbers; or the guard against it costs every run its time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlibero import cli
from qlibero.errors import GuardRefusal
from qlibero.machine.environment import simulator_environment
from qlibero.registry import FolderSuite
from qlibero.results.ledger import read_ledger
from qlibero.sim import physics_check, physics_check_cache
from qlibero.sim.physics_check import PhysicsFinding, PhysicsReport
from qlibero.sim.pool import worker_environment

pytestmark = pytest.mark.libero

ONE_EPISODE = ("tasks=[0]", "episodes_per_task=1", "max_steps=5", "backends=[baseline]", "quant=null", "workers=1")
LLVMPIPE = {"renderer": "llvmpipe"}
ELSEWHERE = PhysicsReport(
    "warning",
    (PhysicsFinding("warning", "frames rendered by 'NVIDIA H100'", "nothing to mend"),),
    "NVIDIA H100",
    {"mujoco": "3.2.3"},
)


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def remembered(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/qlibero/physics").glob("*.json"))


def run(config: Path, out: Path, *sets: str) -> int:
    return cli.main(
        ["run", str(config), "--out", str(out), *(text for each in (*ONE_EPISODE, *sets) for text in ("--set", each))]
    )


def test_other_physics_are_refused_before_the_first_episode_and_never_remembered(
    tiny_experiment, tmp_path, monkeypatch, capfd
):
    other = json.loads(physics_check.REFERENCES.read_text())
    other["episodes"]["libero_object/0/0/7"]["moved"][20] += 1e-5  # as a MuJoCo with another solver leaves an object
    (tmp_path / "references.json").write_text(json.dumps(other))
    monkeypatch.setattr(physics_check, "REFERENCES", tmp_path / "references.json")
    assert run(tiny_experiment, tmp_path / "out") == 3
    said = capfd.readouterr()
    assert (
        "other physics, states off by up to 1.0e-05" in said.err
        and "mujoco==3.2.3" in json.loads(said.out)["error"]["message"]
    )
    assert read_ledger(tmp_path / "out", "baseline") == [] and remembered(tmp_path) == []


class NotAgain:
    """A look that has no business here."""

    def __init__(self, suites, environment):
        raise AssertionError("what passed is remembered")


def look_that_finds(report: PhysicsReport):
    class ReferenceRun:
        def __init__(self, suites, environment):
            assert list(suites) == ["libero_object"] and "CUDA_VISIBLE_DEVICES" not in environment
            self.ended = False

        def report(self) -> PhysicsReport:
            return report

        def close(self) -> None:
            self.ended = True

    return ReferenceRun


def test_another_renderer_is_shown_and_on_record_and_not_refused(tiny_experiment, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(physics_check_cache, "ReferenceRun", look_that_finds(ELSEWHERE))
    assert run(tiny_experiment, tmp_path / "out") == 0
    assert "physics check: physics as in the references; frames rendered by 'NVIDIA H100'" in " ".join(
        capfd.readouterr().err.split()
    )
    for file in ("environment.json", "baseline/meta.json"):
        found = json.loads((tmp_path / "out" / file).read_text())["passport"]
        assert found == {
            "verdict": "warning",
            "renderer": "NVIDIA H100",
            "findings": ["frames rendered by 'NVIDIA H100'"],
        }, file
    monkeypatch.setattr(physics_check_cache, "ReferenceRun", NotAgain)
    assert run(tiny_experiment, tmp_path / "out", "episodes_per_task=2") == 0  # the next run pays nothing


@pytest.mark.parametrize("change", ["renderer", "library", "source", "suite"])
def test_what_a_verdict_depends_on_makes_it_void_when_it_changes(tmp_path, monkeypatch, change):
    environment = worker_environment(simulator_environment())
    monkeypatch.setattr(physics_check_cache, "ReferenceRun", look_that_finds(ELSEWHERE))
    with physics_check_cache.PhysicsCheck("libero_object", environment, LLVMPIPE) as first:
        first.enforce()
    monkeypatch.setattr(physics_check_cache, "ReferenceRun", NotAgain)
    with physics_check_cache.PhysicsCheck("libero_object", environment, LLVMPIPE) as known:
        assert known.enforce() == ELSEWHERE
    suite, renderer = "libero_object", LLVMPIPE
    if change == "renderer":
        renderer = {"renderer": "NVIDIA H100"}
    elif change == "library":
        monkeypatch.setattr(physics_check_cache, "_library", lambda: [("libmujoco.so", 1, 2)])
    elif change == "source":
        monkeypatch.setattr(physics_check_cache, "__file__", str(tmp_path / "anything.py"))
    else:
        suite = "libero_goal"
    with (
        pytest.raises(AssertionError, match="remembered"),
        physics_check_cache.PhysicsCheck(suite, environment, renderer),
    ):
        pass


@pytest.mark.parametrize("suite, spoke", [("libero_plus_10_level", "libero_10"), ("mine", "libero_goal")])
def test_a_suite_without_a_reference_begins_another_and_is_not_called_checked(suite, spoke, monkeypatch):
    monkeypatch.setenv("QLIBERO_SUITES", "")
    FolderSuite("mine", "tasks of your own", tasks=1, max_steps=9, origin="/mine", goals=("/mine/x.bddl",)).make_known()
    begun, verdicts = [], [("refused", "refusal"), ("valid", "")]

    class Look:
        def __init__(self, suites, environment):
            begun.extend(suites)

        def report(self) -> PhysicsReport:
            verdict, level = verdicts.pop(0)
            return PhysicsReport(verdict, (PhysicsFinding(level, "other physics", ""),) if level else (), "", {})

        def close(self) -> None:
            pass

    monkeypatch.setattr(physics_check_cache, "ReferenceRun", Look)
    with (
        pytest.raises(GuardRefusal, match="other physics"),
        physics_check_cache.PhysicsCheck(suite, {}, LLVMPIPE) as refused,
    ):
        refused.enforce()
    for _ in range(2):  # what passed is remembered, and for the suite that spoke
        for name in (suite, spoke):
            with physics_check_cache.PhysicsCheck(name, {}, LLVMPIPE) as check:
                report = check.enforce()
            lacking = f"{suite} has no reference episode: that of {spoke} was begun"
            said = " ".join(finding.what for finding in report.findings)
            assert (report.verdict, lacking in said) == (("warning", True) if name == suite else ("valid", False))
    assert begun == [spoke, spoke]


def test_a_run_that_fails_while_it_looks_leaves_no_process():
    environment = worker_environment(simulator_environment())
    with (
        pytest.raises(ZeroDivisionError),
        physics_check_cache.PhysicsCheck("libero_object", environment, LLVMPIPE) as begun,
    ):
        process = begun._run._process
        assert process.poll() is None
        raise ZeroDivisionError
    assert process.poll() is not None


def test_a_simulator_that_cannot_run_says_why(monkeypatch):
    from qlibero.errors import WorkFailed

    monkeypatch.setattr(physics_check, "sys", type("sys", (), {"executable": "/bin/false"}))
    with pytest.raises(WorkFailed, match="the simulator does not run here: exit status 1"):
        physics_check.ReferenceRun(["libero_object"], {}).report()


def test_every_suite_has_a_reference():
    from qlibero.sim import libero_pro
    from qlibero.sim.suites import SUITES

    names = {name.partition("/")[0] for name in json.loads(physics_check.REFERENCES.read_text())["episodes"]}
    shipped = {name: suite for name, suite in SUITES.items() if not suite.variants_of}  # LIBERO-plus is not installed
    assert {suite for suite, *_ in physics_check.EPISODES} == set(shipped)
    assert set(physics_check.SUITES) | {plugin.name for plugin in libero_pro.PLUGINS} <= names
    assert names == physics_check.references() <= set(shipped)
    assert set(physics_check.SUITES) == {name for name, suite in shipped.items() if not suite.base}  # doctor's look
