"""Risk: several suites in one run get each other's tasks, caps, instructions or pairs, or are counted as one."""

from __future__ import annotations

import json

import pytest
import yaml

from qlibero import cli
from qlibero.config.config_hash import config_hash
from qlibero.config.dump import dump_resolved
from qlibero.config.load import ConfigError, load_experiment
from qlibero.results.ledger import read_ledger
from qlibero.results.meta import read_meta
from qlibero.results.runs import RunResults, read_run
from qlibero.run.arms import load_arms
from qlibero.run.planned import episode_keys


def experiment(tmp_path, suite: str, more: str = ""):
    path = tmp_path / "several.yaml"
    remote = "policy: {type: remote, url: 'ws://localhost:1'}"
    path.write_text(f"suite: {suite}\nepisodes_per_task: 2\narms: [baseline]\n{remote}\n{more}\n")
    return load_experiment(path)


def test_each_suite_has_its_own_episodes(tmp_path):
    both = experiment(tmp_path, "[libero_spatial, libero_long]", "tasks: [0, 9]")
    assert both.suites == ("libero_spatial", "libero_10")
    assert [str(key) for key in episode_keys(both)] == [
        f"{suite}/{task}/{init}/7" for suite in ("libero_spatial", "libero_10") for task in (0, 9) for init in (0, 1)
    ]
    assert len(episode_keys(experiment(tmp_path, "[libero_90, libero_goal]"))) == 2 * (90 + 10)


def test_tasks_may_be_said_suite_by_suite(tmp_path):
    made = experiment(tmp_path, "[libero_goal, libero_goal_lan]", "tasks: {libero_goal_lan: [4, 1]}")
    assert made.task_ids("libero_goal") == tuple(range(10)) and made.task_ids("libero_goal_lan") == (4, 1)
    assert [str(key) for key in episode_keys(made)][-4:] == [
        f"libero_goal_lan/{t}/{i}/7" for t in (4, 1) for i in (0, 1)
    ]
    path = tmp_path / "again.yaml"  # as a run directory keeps it
    path.write_text(dump_resolved(made))
    assert load_experiment(path).all_tasks() == made.all_tasks()
    assert config_hash(made, made.arms()[0]) == config_hash(
        experiment(tmp_path, "[libero_goal, libero_goal_lan]"), made.arms()[0]
    )


def test_a_list_of_one_is_that_suite_and_the_order_of_several_does_not_count(tmp_path):
    def bound_to(suite: str) -> str:
        made = experiment(tmp_path, suite)
        return config_hash(made, made.arms()[0])

    assert bound_to("[libero_goal]") == bound_to("libero_goal")
    assert bound_to("[libero_goal, libero_10]") == bound_to("[libero_long, libero_goal]") != bound_to("libero_goal")


@pytest.mark.parametrize(
    "more",
    [
        "tasks: [9, 0]",
        "tasks: [3]\nseeds: [8, 7]",
        "tasks: [4, 2]\ninits: {fresh: 3}",
        "tasks: {libero_goal: [1], libero_spatial: [9, 0]}",
    ],
)
def test_what_reads_a_run_knows_the_order_in_which_it_was_planned(tmp_path, more):
    made = experiment(tmp_path, "[libero_spatial, libero_goal]", more)
    (tmp_path / "experiment.yaml").write_text(dump_resolved(made))
    run = RunResults(tmp_path, {}, yaml.safe_load((tmp_path / "experiment.yaml").read_text()), {})
    assert list(run.planned_order or ()) == episode_keys(made) != sorted(episode_keys(made))
    own = RunResults(tmp_path, {}, {**run.experiment, "suite": {"bddl": "/tasks/mine"}, "tasks": [1]}, {})
    assert {key.suite for key in own.planned_order or ()} == {"mine"}


@pytest.mark.parametrize(
    "suite, more, says",
    [
        ("[]", "", "suite: lists no suite"),
        ("[libero_long, libero_10]", "", "suite: lists libero_10 twice"),
        ("[libero_goal, libero_spatail]", "", "1:22: suite.1: .*did you mean libero_spatial?"),
        ("[libero_goal, 7]", "", "suite.1: should be 'libero_spatial'"),
        ("[libero_90, libero_goal]", "tasks: [3, 11]", "tasks.1: libero_goal has tasks 0 to 9"),
        ("[libero_90, libero_goal]", "tasks: {libero_goal: [1, 11]}", "5:26: tasks.libero_goal.1: .*has tasks 0 to 9"),
        ("[libero_90, libero_goal]", "tasks: {libero_goal: []}", "tasks.libero_goal: no task is listed"),
        ("[libero_90, libero_goal]", "tasks: {libero_goals: [1]}", "tasks.libero_goals: is no suite of this"),
        ("[libero_90, libero_goal]", "tasks: {libero_goal: all}", "tasks.libero_goal: should be a list"),
        ("[libero_goal_lan, libero_goal]", "inits: base", "inits: libero_goal has no scenes of another suite"),
        ("[libero_goal, libero_object]", "stop: {}", "stop: a sequential test is over one suite"),
    ],
)
def test_what_cannot_be_meant_is_told_with_its_place(tmp_path, suite, more, says):
    with pytest.raises(ConfigError, match=says):
        experiment(tmp_path, suite, more)


def test_one_run_of_two_suites(tmp_path, tiny_experiment, capfd):
    """One task of each, under two arms: paired by scene, each suite with its words and its cap, a verdict for each."""
    settings = yaml.safe_load(tiny_experiment.read_text())
    place = tiny_experiment.parent
    words = json.loads((place / "tokenizer.json").read_text())["words"]
    words = sorted({*words, *"open the middle drawer of the cabinet".split()})
    for name, content in (
        ("config.json", (place / "config.json").read_text()),
        ("tokenizer.json", json.dumps({"type": "words", "words": words})),
    ):
        (tmp_path / name).write_text(content)
    settings |= {"suite": ["libero_object", "libero_goal"], "tasks": [0], "episodes_per_task": 1, "max_steps": 6}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(settings))
    out = tmp_path / "out"
    assert cli.main(["run", str(tmp_path / "two.yaml"), "--out", str(out)]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["complete"]
    keys = {"libero_object/0/0/7", "libero_goal/0/0/7"}
    for arm in ("baseline", "fake"):
        records = {str(record.key): record for record in read_ledger(out, arm)}
        assert records.keys() == keys and {record.steps for record in records.values()} == {6}
        assert len({record.fingerprint for record in records.values()}) == 2
    assert {str(key) for key in read_run(out).planned} == keys
    environment = json.loads((out / "environment.json").read_text())
    assert environment["instructions"] == {
        "libero_object": {"0": "pick up the alphabet soup and place it in the basket"},
        "libero_goal": {"0": "open the middle drawer of the cabinet"},
    }
    assert environment["passport"].keys() == {"libero_object", "libero_goal"}
    assert cli.main(["compare", str(out)]) == 0
    compared = json.loads(capfd.readouterr().out.splitlines()[-1])["arms"]["fake"]
    assert compared["pairs"] == 2 and compared["suites"].keys() == {"libero_object", "libero_goal"}
    other_order = load_experiment(tmp_path / "two.yaml", ["suite=[libero_goal, libero_object]"])
    _, meta = load_arms(other_order, other_order.arms()[:1])  # else the policy would "answer differently here"
    assert meta["baseline"]["probe"] == read_meta(out, "baseline").probe
