"""Risk: tasks of one's own run other than they are written: another's scenes or words under their name, a goal nobody
can miss, records that go on under files that have changed, or a mistake that is told without its file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from qlibero import cli, registry
from qlibero.config.config_hash import config_hash
from qlibero.config.dump import dump_resolved
from qlibero.config.load import ConfigError, load_experiment
from qlibero.config.sweep import load_sweep
from qlibero.errors import UserError
from qlibero.policies import load_policy
from qlibero.registry import FolderSuite
from qlibero.results.ledger import read_ledger
from qlibero.run.arms import require_readable
from qlibero.run.planned import episode_keys
from qlibero.sim.suites import get_suite, task_language, words_at

EXAMPLE = Path(__file__).parents[1] / "examples/own_tasks/own_tasks.yaml"
REMOTE = "policy: {type: remote, url: 'ws://localhost:1'}\narms: [baseline]\n"


@pytest.fixture(autouse=True)
def nobody_elses_suites(monkeypatch):
    monkeypatch.setenv("QLIBERO_SUITES", "")


@pytest.fixture
def tasks(tmp_path):
    """The example's two tasks, and four and six initial states that are none."""
    shutil.copytree(EXAMPLE.parent / "tabletop", tmp_path / "mine")
    (tmp_path / "states").mkdir()
    for name, count in (("put_the_bowl_on_the_plate", 4), ("put_the_cream_cheese_in_the_bowl", 6)):
        np.savez(tmp_path / "states" / f"{name}.npz", states=np.zeros((count, 9)))
    return tmp_path


def experiment(place: Path, suite: str, more: str = ""):
    (place / "x.yaml").write_text(f"suite: {suite}\n{REMOTE}{more}\n")
    return load_experiment(place / "x.yaml")


def test_the_example_is_two_tasks_with_three_scenes_drawn_of_each(tmp_path):
    made = load_experiment(EXAMPLE)
    keys = [str(key) for key in episode_keys(made)]
    assert keys == [f"tabletop/{task}/fresh-{init}/7" for task in (0, 1) for init in (0, 1, 2)]
    assert [task_language("tabletop", task) for task in (0, 1)] == [
        "put the bowl on the plate",
        "put the cream cheese in the bowl",
    ]
    assert get_suite("tabletop").max_steps == 300
    (tmp_path / "again.yaml").write_text(dump_resolved(made))  # as a run directory keeps it
    assert [str(key) for key in episode_keys(load_experiment(tmp_path / "again.yaml"))] == keys


def test_states_that_are_there_are_counted_and_words_may_come_from_the_files_name(tasks):
    made = experiment(tasks, "{bddl: mine, init_states: states, max_steps: 50, instructions: file}")
    assert made.initial_states() == ("official", 4) and made.suites == ("mine",)
    (tasks / "mine/put_the_bowl_on_the_plate.bddl").rename(tasks / "mine/Go_away.bddl")
    (tasks / "states/put_the_bowl_on_the_plate.npz").rename(tasks / "states/Go_away.pruned_init.npz")
    experiment(tasks, "{bddl: mine, init_states: states, max_steps: 50, instructions: file}")
    assert task_language("mine", 0) == "go away"
    experiment(tasks, "{bddl: mine, init_states: states, max_steps: 50}")
    assert task_language("mine", 0) == "put the bowl on the plate"


@pytest.mark.parametrize("says, states", [("init_states: states", ("official", 4)), ("max_steps: 6", ("fresh", 2))])
def test_a_file_that_says_its_states_leaves_those_of_the_file_below(tasks, says, states):
    experiment(tasks, "{bddl: mine, fresh: 2, max_steps: 5}")
    (tasks / "above.yaml").write_text(f"extends: x.yaml\nsuite: {{bddl: mine, {says}}}\n")
    assert load_experiment(tasks / "above.yaml").initial_states() == states


def test_an_earlier_instruction_in_a_comment_is_not_what_is_told(tasks):
    """LIBERO leaves out what stands behind a semicolon."""
    file = tasks / "mine/put_the_bowl_on_the_plate.bddl"
    file.write_text(file.read_text().replace("(:language", "; (:language move the plate)\n  (:language ;hm\n"))
    experiment(tasks, "{bddl: mine, fresh: 1, max_steps: 5}")
    assert task_language("mine", 0) == "put the bowl on the plate" and words_at("mine", 0) == f"{file}:4"


def test_thousands_of_tasks_are_known_to_the_processes_that_are_started(tmp_path):
    """Linux starts none with a variable of 128 KiB."""
    (tmp_path / "many").mkdir()
    for number in range(3000):
        (tmp_path / f"many/put_the_black_bowl_on_the_plate_and_turn_on_the_stove_{number:04}.bddl").touch()
    experiment(tmp_path, "{bddl: many, fresh: 1, max_steps: 5}")
    code = "from qlibero.registry import SuitePlugin, get; print(get(SuitePlugin, 'many').goals[2999])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == f"{tmp_path}/many/put_the_black_bowl_on_the_plate_and_turn_on_the_stove_2999.bddl"


def test_more_tasks_than_a_process_can_be_told_of_are_refused(monkeypatch):
    monkeypatch.setattr(registry, "MOST", 300)
    suite = FolderSuite("m", "mine", tasks=40, origin="/mine", goals=tuple(f"/mine/{i**9:x}.bddl" for i in range(40)))
    with pytest.raises(UserError, match=r"/mine: no simulator can be told of so many tasks \(40 here\); split"):
        suite.make_known()


def test_beside_liberos_own_and_in_a_sweep_it_has_its_name(tasks):
    both = experiment(tasks, "[libero_goal, {bddl: mine, init_states: states, max_steps: 50}]", "tasks: {mine: [1]}")
    assert both.suites == ("libero_goal", "mine") and both.initial_states() == ("official", 4)
    assert len(episode_keys(both)) == 44 and str(episode_keys(both)[-1]) == "mine/1/3/7"
    (tasks / "sweep.yaml").write_text(
        f"{REMOTE}suite: libero_goal\ngrid:\n  suite: [libero_goal, {{bddl: mine, fresh: 2, max_steps: 5}}]\n"
    )
    cells = load_sweep(tasks / "sweep.yaml").cells
    assert [(c.id, len(episode_keys(c.experiment))) for c in cells] == [("suite-libero_goal", 500), ("suite-mine", 4)]


def test_a_run_is_bound_to_what_decides_and_not_to_the_place(tasks):
    def bound_to(suite: str) -> str:
        made = experiment(tasks, suite)
        return config_hash(made, made.arms()[0])

    first = bound_to("{bddl: mine, fresh: 2, max_steps: 50}")
    (tasks / "elsewhere").mkdir()
    shutil.copytree(tasks / "mine", tasks / "elsewhere/mine")
    assert bound_to("{bddl: elsewhere/mine, fresh: 3, max_steps: 50}") == first
    for other in (
        "fresh: 2, max_steps: 51",
        "fresh: 2, max_steps: 50, name: yours",
        "fresh: 2, max_steps: 50, instructions: file",
    ):
        assert bound_to(f"{{bddl: mine, {other}}}") != first
    assert bound_to("{bddl: mine, init_states: states, max_steps: 50}") != first


@pytest.mark.parametrize(
    "suite, more, says",
    [
        ("{bddl: yours, fresh: 2, max_steps: 5}", "", "x.yaml:1:9: suite.bddl: no such file or directory: .*yours"),
        ("{bddl: states, fresh: 2, max_steps: 5}", "", "x.yaml:1:9: suite.bddl: no .bddl file in .*states"),
        ("{bddl: mine, max_steps: 5}", "", "suite: write init_states: DIR, or fresh: N"),
        ("{bddl: mine, init_states: states, fresh: 2, max_steps: 5}", "", "suite: write init_states: DIR, or fresh: N"),
        ("{bddl: mine, fresh: 2}", "", "suite.max_steps: is missing: policy steps after which"),
        ("{bddl: mine, fresh: 0, max_steps: 5}", "", "suite.fresh: should be greater than or equal to 1"),
        ("{bddl: mine, fresh: 2, max_step: 5}", "", "suite.max_step: unknown key.*did you mean max_steps"),
        (
            "{bddl: mine, fresh: 2, max_steps: 5, instructions: name}",
            "",
            "suite.instructions: should be 'bddl' or 'file'",
        ),
        ("{bddl: mine, fresh: 2, max_steps: 5, name: libero_goal}", "", "suite.name: libero_goal is a suite already"),
        (
            "{bddl: mine, init_states: mine, max_steps: 5}",
            "",
            "suite.init_states: .*put_the_bowl_on_the_plate.npz is missing",
        ),
        ("[{bddl: mine, fresh: 2, max_steps: 5}, {bddl: mine, fresh: 2, max_steps: 6}]", "", "suite: lists mine twice"),
        ("[libero_goal, {bddl: mine, fresh: 2}]", "", "suite.1.max_steps: is missing"),
        ("{bddl: mine, init_states: states, max_steps: 5}", "episodes_per_task: 5", "mine has 4 initial states a task"),
        ("{bddl: mine, fresh: 2, max_steps: 5}", "inits: fresh(3)", "inits: mine says fresh: 2"),
        ("{bddl: mine, name: a_task, init_states: states, max_steps: 5}", "inits: base", "a_task has no scenes of"),
        ("{bddl: mine, fresh: 2, max_steps: 5}", "tasks: [2]", "tasks.0: mine has tasks 0 to 1"),
        ("{bddl: mine, fresh: 2, max_steps: 5}", "protocol: openpi", "inits: fresh initial states are drawn"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tasks, suite, more, says):
    with pytest.raises(ConfigError, match=says):
        experiment(tasks, suite, more)


def test_it_has_its_name_wherever_a_run_is_shown(tasks):
    """Its settings in its name's place would be a path of somebody's machine, or no text at all."""
    from qlibero.results.arm_meta import ArmMeta
    from qlibero.results.dataset_card import dataset_card
    from qlibero.results.effective import effective_settings
    from qlibero.results.runs import RunResults, suites_of
    from qlibero.tracking.wandb_mirror import _tags

    for suite, names in (
        ("{bddl: mine, fresh: 2, max_steps: 50}", ["mine"]),
        ("[libero_goal, {bddl: mine, name: yours, init_states: states, max_steps: 50}]", ["libero_goal", "yours"]),
    ):
        kept = yaml.safe_load(dump_resolved(experiment(tasks, suite)))
        assert suites_of(kept) == names
        card = dataset_card("x.jsonl", [], {"runs": ["x"], "qlibero": "0"}, [RunResults(tasks, {}, kept, {})])
        assert f"Suite {', '.join(names)}, protocol pure" in card
        settings = effective_settings(kept, "baseline", ArmMeta())
        assert settings["suite"] == (names if len(names) > 1 else names[0])
        assert set(names) <= set(_tags(settings)) and str(tasks) not in json.dumps(settings)


@pytest.mark.parametrize(
    "states, says",
    [
        (b"no archive", "holds no initial states: .*numpy.savez"),
        ({"other": np.zeros((3, 9))}, "holds no initial states: 'states is not a file"),
        ({"states": np.zeros((3, 9), np.float32)}, "should be finite float64 .* these are float32"),
        ({"states": np.zeros(9)}, r"these are float64 \(9,\)"),
        ({"states": np.zeros((0, 9))}, r"these are float64 \(0, 9\)"),
        ({"states": np.full((3, 9), np.nan)}, "should be finite"),
        ({"states": np.array([{}])}, "holds no initial states: Object arrays"),
    ],
)
def test_a_file_that_holds_no_states_is_named(tasks, states, says):
    file = tasks / "states/put_the_cream_cheese_in_the_bowl.npz"
    file.write_bytes(states) if isinstance(states, bytes) else np.savez(file, **states)
    with pytest.raises(ConfigError, match=f"suite.init_states: .*put_the_cream_cheese_in_the_bowl.npz.*{says}"):
        experiment(tasks, "{bddl: mine, init_states: states, max_steps: 5}")


def own(place: Path, suite: str = "{bddl: mine, fresh: 1, max_steps: 6}") -> list[str]:
    (place / "own.yaml").write_text(
        f"extends: {EXAMPLE.parents[2]}/configs/policies/embedded.yaml\nsuite: {suite}\n"
        "arms: [baseline]\nvideos: 0\ntracking: []\nworkers: 1\n"
    )
    return ["run", str(place / "own.yaml"), "--out", str(place / "out")]


def test_files_are_looked_through_before_anything_is_started(tasks, capfd):
    file = tasks / "mine/put_the_bowl_on_the_plate.bddl"
    text = file.read_text()
    file.write_text(
        text.replace("(And (On akita_black_bowl_1 plate_1))", "(And )").replace("plate_1 - plate", "p - dish")
    )
    assert cli.main(own(tasks)) == 2 and not (tasks / "out").exists()
    said = capfd.readouterr().err
    assert f"{file}:12: LIBERO has no object or fixture called dish" in said
    assert f"{file}:21: the goal is empty" in said


@pytest.mark.parametrize("command", [["plan"], ["sweep", "--engine", "slurm", "--dry-run"], ["sweep"]])
def test_a_sweep_looks_through_them_before_it_queues_anything(tasks, capfd, command):
    file = tasks / "mine/put_the_bowl_on_the_plate.bddl"
    file.write_text(file.read_text().replace("plate_1 - plate", "p - dish"))
    name, *flags = command
    assert cli.main([name, *own(tasks)[1:], *flags]) == 2 and not (tasks / "out").exists()
    assert f"{file}:12: LIBERO has no object or fixture called dish" in capfd.readouterr().err


def test_words_that_the_policy_cannot_read_are_named_with_file_and_line(tasks):
    file = tasks / "mine/put_the_bowl_on_the_plate.bddl"
    file.write_text(file.read_text().replace("put the bowl on", "hurl the bowl at"))
    own(tasks)
    made = load_experiment(tasks / "own.yaml")
    policy = load_policy(made.policy)
    with pytest.raises(UserError) as refused:
        require_readable(policy, made)
    said = str(refused.value)
    assert f"mine task 0: {file}:3: the policy's vocabulary of 79 words does not know: hurl; " in said
    assert "write tasks: {mine: [1]}" in said and "mine task 1" not in said
    pro = load_experiment(EXAMPLE.parents[2] / "configs/experiments/pro.yaml")
    require_readable(policy, pro)  # its tasks are those that can be read, and all of those
    with pytest.raises(
        UserError, match=r"libero_goal_lan: \[1, 2, 4, 6, 8, 9\], libero_goal_task: \[0, 1, 2, 4, 5, 6, 7"
    ):
        require_readable(policy, pro.model_copy(update={"tasks": "all"}))


@pytest.mark.libero
def test_a_run_its_continuation_and_what_must_not_be_continued(tasks, capfd):
    assert cli.main(own(tasks)) == 0
    records = read_ledger(tasks / "out", "baseline")
    assert [str(record.key) for record in records] == ["mine/0/fresh-0/7", "mine/1/fresh-0/7"]
    assert {record.steps for record in records} == {6} and len({record.fingerprint for record in records}) == 2
    environment = json.loads((tasks / "out/environment.json").read_text())
    assert environment["instructions"] == {
        "mine": {"0": "put the bowl on the plate", "1": "put the cream cheese in the bowl"}
    }
    assert environment["passport"]["verdict"] == "warning"  # nothing to compare it with
    assert cli.main(own(tasks, "{bddl: mine, fresh: 2, max_steps: 6}")) == 0  # two more scenes of each
    assert [r.fingerprint for r in read_ledger(tasks / "out", "baseline") if r.key.init == 0] == [
        record.fingerprint for record in records
    ]
    capfd.readouterr()
    file = tasks / "mine/put_the_bowl_on_the_plate.bddl"
    file.write_text(file.read_text().replace("0.06 0.12", "0.07 0.12"))
    assert cli.main(own(tasks, "{bddl: mine, fresh: 3, max_steps: 6}")) == 3
    assert "task 0 of mine (goal, initial states, instruction)" in capfd.readouterr().err
    shutil.rmtree(tasks / "out")
    assert cli.main(own(tasks, "{bddl: mine, init_states: states, max_steps: 6}")) == 2  # those of the fixture
    said = capfd.readouterr().err
    assert "states of 9 numbers" in said and "these are initial states of another scene" in said
    assert "put_the_bowl_on_the_plate.npz" in said and "put_the_bowl_on_the_plate.bddl" in said
