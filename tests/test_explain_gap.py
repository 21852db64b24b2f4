"""Risk: somebody looks for a lost point in the wrong place: a constant that differs is not named, one that is equal is,
the effect of a cap is guessed where it can be counted, or a protocol's file says what no source says."""

from __future__ import annotations

import json

import pytest
import yaml
from synthetic_run import make_run

from qlibero.cli.app import main
from qlibero.errors import UserError
from qlibero.results.explain_gap import OURS, explain_gap
from qlibero.results.ledger import write_meta
from qlibero.results.protocols import OF_TOOL, effects, protocols
from qlibero.sim import suites


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """30 episodes of libero_object, cap 280, under pure, MuJoCo 3.2.3; successes come between steps 40 and 80."""
    path = make_run(
        tmp_path_factory.mktemp("gap") / "run",
        arms={"baseline": 0.0},
        trajectories=False,
        settings={"protocol": "pure", "policy": {"replan_steps": 5, "flow_steps": 10}},
    )
    write_meta(path, "baseline", {"policy": {"profile": "openpi", "action_horizon": 10, "flow_steps": 10}})
    for ledger in (path / "baseline").glob("episodes-*.jsonl"):
        rows = [json.loads(line) for line in ledger.read_text().splitlines()]
        rows = [
            {k: v for k, v in row.items() if k != "checksum"} | {"max_steps": 280, "replan_steps": 5} for row in rows
        ]
        ledger.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def by_name(gap):
    return {d.constant: d for d in gap.differences}


def test_openpi_differs_in_its_random_stream_alone_among_what_is_settled_here(run):
    gap = explain_gap(run, "openpi")
    assert set(by_name(gap)) == {"random_stream", "episodes_per_task"}
    assert {"replan_steps", "max_steps", "mujoco", "resize", "seed", "settle_steps", "orientation"} <= set(gap.equal)


def test_replan_50_is_the_first_suspect_against_lerobot(run):
    gap = explain_gap(run, "lerobot")
    first, found = gap.differences[0], by_name(gap)
    assert (first.constant, first.here, first.there, first.points) == ("replan_steps", 5, 50, (10, 25))
    assert found["mujoco"].there == "3.8.1" and found["mujoco"].points == (3, 9) and found["mujoco"].likely == 2
    assert found["resolution"].points is None and "lerobot" in found["resolution"].source


def test_what_a_cap_does_is_counted_in_the_episodes(run, tmp_path):
    records = [json.loads(x) for p in (run / "baseline").glob("episodes-*") for x in p.read_text().splitlines()]
    late = sum(r["outcome"] == "success" and r["success_step"] > 60 for r in records)
    other = tmp_path / "libero_object_results.json"
    rows = [
        {"task_id": t, "episode_idx": i, "success": True, "steps": 40, "max_steps": 60}
        for t in range(3)
        for i in range(5)
    ]
    other.write_text(json.dumps({"task_suite": "libero_object", "seed": 7, "results": rows}))
    gap = explain_gap(run, other)
    cap = by_name(gap)["max_steps"]
    assert (cap.here, cap.there, cap.source) == (280, 60, other.name) and gap.other_rate == (15, 15)
    assert f"{late} of 30 episodes succeeded after that cap" in cap.known
    assert cap.points == pytest.approx((100 * late / 30, 100 * late / 30)) and late > 0


def test_two_runs_are_held_against_each_other(run, tmp_path):
    other = make_run(tmp_path / "other", arms={"baseline": 0.0}, trajectories=False, settings={"protocol": "openpi"})
    assert by_name(explain_gap(run, other))["random_stream"].there == "one seed a task and one reset an episode"


@pytest.mark.parametrize("other", ["openvla", "nosuch.json"])
def test_an_unknown_protocol_is_refused_with_those_there_are(run, other):
    with pytest.raises(UserError, match="neither a file, nor a run, nor a protocol: .* lerobot, openpi, openvla-oft"):
        explain_gap(run, other)
    with pytest.raises(UserError, match="--arm w4a8: .* has baseline"):
        explain_gap(run, "openpi", arm="w4a8")


def test_the_command_prints_them_and_says_them_in_json(run, capfd):
    assert main(["explain-gap", str(run), "vlaquantbench"]) == 0
    out, err = capfd.readouterr()
    document = json.loads(out.splitlines()[-1])
    assert document["differences"][0]["likely"] == 1 and "resolution" in err and "360" in err


@pytest.mark.parametrize("name", sorted(protocols()))
def test_a_protocol_names_a_source_for_every_constant_and_only_known_constants(name):
    constants = protocols()[name].constants
    assert set(constants) <= set(effects()) and all(
        c.source.strip() and c.value is not None for c in constants.values()
    )
    for suite, cap in constants["max_steps"].value.items():
        assert suites.SUITES[suite].max_steps <= cap <= suites.SUITES[suite].max_steps + 60
    assert set(OF_TOOL.values()) <= set(protocols())


def test_what_every_run_does_is_what_the_simulator_does():
    assert OURS["settle_steps"] == suites.SETTLE_STEPS
    caps = protocols()["openpi"].constants["max_steps"].value
    assert {s: suites.SUITES[s].max_steps for s in caps} == caps
    assert yaml.safe_load("{value: 3.2.3}")["value"] == "3.2.3"  # a version is no number
