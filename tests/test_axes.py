"""Risk: a verdict by perturbation axis counts episodes of another axis, or hides that one of its suites weighs more."""

from __future__ import annotations

import json

import pytest
from synthetic_run import make_run

from qlibero.reporting.terminal import print_comparison
from qlibero.reporting.wandb_workspace import metrics_of
from qlibero.results.axes import axis_of
from qlibero.results.compare import compare_paths
from qlibero.results.ledger import read_arm
from qlibero.results.runs import read_run
from qlibero.tracking.rows import arm_summary, versus_baseline

SUITES = ("libero_goal", "libero_goal_swap", "libero_10_swap")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("axes")
    return [
        make_run(root / s, arms={"baseline": 0.0, "w4a4": 0.3}, suite=s, name=s, trajectories=False, seed=i)
        for i, s in enumerate(SUITES)
    ]


def test_every_axis_has_the_pairs_of_its_suites(runs, capsys):
    (found,) = compare_paths(runs).values()
    axes = found.arms["w4a4"].axes
    assert set(axes) == {"unperturbed", "position"}
    losses = 0
    for run in runs[1:]:
        arms = {
            name: {(r.suite, r.task, r.init): r.succeeded for r in a.records} for name, a in read_run(run).arms.items()
        }
        losses += sum(arms["w4a4"][key] - won for key, won in arms["baseline"].items())
    position = axes["position"].to_json()
    assert position["pairs"] == 60 and position["delta"] == pytest.approx(losses / 60, abs=1e-6)
    assert position["pairs_of_suite"] == {"libero_10_swap": 30, "libero_goal_swap": 30} and position["equal_weights"]
    print_comparison({"": found})
    assert "by position" in capsys.readouterr().err
    assert json.dumps(found.to_json())


def test_trackers_show_what_compare_says_of_an_axis_and_keep_suites_apart(runs, tmp_path):
    """One run of three suites, as a mirror of its two arms summarises it."""
    for arm in ("baseline", "w4a4"):
        (tmp_path / "all" / arm).mkdir(parents=True)
        lines = [line for run in runs for file in sorted((run / arm).glob("episodes-*")) for line in file.open()]
        (tmp_path / "all" / arm / "episodes-000of001-1.jsonl").write_text("".join(lines))
    (found,) = compare_paths([tmp_path / "all"]).values()
    seen = versus_baseline(tmp_path / "all", "w4a4")
    for axis, row in found.arms["w4a4"].axes.items():
        at = f"versus_baseline/axis/{axis}/"
        assert [seen[at + n] for n in ("pairs", "delta", "verdict")] == [
            row.table.pairs,
            row.delta,
            str(row.verdict.word),
        ]
        assert (seen[at + "low95"], seen[at + "high95"]) == row.interval
    summary = arm_summary(read_arm(tmp_path / "all", "w4a4"))
    records = read_run(tmp_path / "all").arms["w4a4"].records
    assert summary["axis/position/successes"] == sum(r.succeeded for r in records if r.suite.endswith("swap"))
    assert summary["axis/position/episodes"] == 60 and summary["axis/unperturbed/episodes"] == 30
    won = sum(r.succeeded for r in records if (r.suite, r.task) == ("libero_goal", 0))
    assert summary["task/libero_goal/0/successes"] == won and "task/0/successes" not in summary
    tasks, axes = metrics_of([read_run(tmp_path / "all")])
    assert "libero_10_swap/0" in tasks and axes == ["position", "unperturbed"]
    assert metrics_of([read_run(runs[0])]) == (["0", "1", "2"], [])


def test_one_axis_alone_is_no_axis(runs):
    (found,) = compare_paths(runs[1:]).values()
    assert found.arms["w4a4"].axes == {}


@pytest.mark.parametrize(
    "suite, axis",
    [
        ("libero_spatial_swap", "position"),
        ("libero_object_object", "object"),
        ("libero_10_lan", "instruction"),
        ("libero_goal_task", "task"),
        ("libero_object", "unperturbed"),
        ("libero_plus_10_camera", "camera"),
        ("libero_plus_goal_robot", "robot"),
        ("libero_plus_spatial_noise", "noise"),
        ("libero_plus_object_language", "instruction"),
        ("libero_plus_10_level", "level"),
        ("libero_plus_10_swap", "unperturbed"),
        ("libero_10_camera", "unperturbed"),
        ("libero_90", "unperturbed"),
        ("my_own_task", "unperturbed"),
    ],
)
def test_what_a_suites_name_says_it_perturbs(suite, axis):
    assert axis_of(suite) == axis
