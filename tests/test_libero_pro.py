"""Risk: a perturbed suite is not what its name says: the old words or goal, another suite's scenes under its name, a
scene that is not the base suite's where it is said to be, or a check that looked at nothing and calls it good."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qlibero import cli
from qlibero.config.load import load_experiment
from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError
from qlibero.sim import libero, libero_pro, suites
from qlibero.sim.contradictions import contradictions
from qlibero.sim.scene import Scene
from qlibero.sim.settling import settle

PRO = [name for name, suite in suites.SUITES.items() if suite.base]
WORDS = set(
    json.loads(Path(__file__).parents[1].joinpath("examples/libero/embedded/tokenizer.json").read_text())["words"]
)


def test_the_sixteen_suites_are_there_with_the_constants_of_their_base():
    assert len(PRO) == 16 and {suites.SUITES[name].inits for name in PRO} == {50}
    assert {s.base: s.max_steps for s in map(suites.get_suite, PRO)} == {
        "libero_spatial": 220,
        "libero_object": 280,
        "libero_goal": 300,
        "libero_10": 520,
    }
    for name in PRO:
        states = [suites.init_states(name, task).shape for task in range(10)]
        base = [suites.init_states(suites.SUITES[name].base, task).shape for task in range(10)]
        assert all(shape[0] == 50 for shape in states)
        assert states == base or name.endswith("_object")  # other models, other joints


@pytest.mark.parametrize("name", PRO)
def test_words_come_from_the_files_name_or_from_the_file_by_the_axis(name):
    """Read wrongly, lan changes nothing and task asks for the old goal; swap and object would speak untrained words."""
    suite = suites.SUITES[name]
    told = [suites.task_language(name, task) for task in range(10)]
    base = [suites.task_language(suite.base, task) for task in range(10)]
    if suite.axis in ("swap", "object"):
        assert told == base
    else:
        assert all(t != b for t, b in zip(told, base, strict=True))
        for task, text in enumerate(told):
            # the file read with another pattern than the tool's
            line = next(x for x in libero.task_files(name, task)["goal"].read_text().splitlines() if ":language" in x)
            assert text == line.split(":language")[1].strip().rstrip(")").strip().lower()


def test_which_instructions_the_embedded_policys_words_cover():
    """Counted by hand when the suites were first looked at."""
    unknown = {}
    for name in PRO:
        told = [re.findall("[a-z0-9]+", suites.task_language(name, task)) for task in range(10)]
        unknown[name] = sum(not set(words) <= WORDS for words in told)
    assert {name: count for name, count in unknown.items() if count} == {
        "libero_spatial_task": 10,
        "libero_spatial_lan": 10,
        "libero_object_lan": 9,
        "libero_goal_lan": 4,
        "libero_10_lan": 4,
        "libero_goal_task": 1,
        "libero_10_task": 1,
    }


def test_tasks_that_contradict_themselves_are_those_the_files_say():
    assert "left moka pot" in suites.task_language("libero_10_task", 8)
    assert "turn off the stove" == suites.task_language("libero_goal_task", 7)
    assert "moka_pot_1" in libero.task_files("libero_10_task", 8)["goal"].read_text().split("(:goal")[1]
    assert "between the plate" in suites.task_language("libero_spatial_swap", 0)
    assert "next to the plate" in suites.task_language("libero_spatial_swap", 8)
    found = {
        (name, task)
        for name, s in suites.SUITES.items()
        if not s.variants_of
        for task in range(s.tasks)
        if suites.flaws(name, task)
    }
    assert found == {
        ("libero_10_task", 8),
        ("libero_goal_task", 7),
        ("libero_spatial_swap", 0),
        ("libero_spatial_swap", 8),
    }


@pytest.mark.parametrize(
    "old, new, words, says",
    [
        ("", "", "put the left bowl on the plate", "says the left bowl; its goal is bowl_1, which starts on the right"),
        ("", "", "put the right bowl on the plate", ""),
        ("", "", "put the bowl on the left plate", ""),  # no side is said of where the plate starts
        ("", "", "put the bowl next to the plate on the plate", "more than 0.2 m from it"),
        ("0.3 0.3 0.31 0.31", "0.1 0.1 0.11 0.11", "put the bowl next to the plate on the plate", ""),
        ("(bowl_right (:target table)", "(Bowl_right (:target Table)", "put it next to the plate", "more than 0.2"),
        ("0.3 0.3 0.31 0.31", "+.1 -.1 .11 -.09", "put the bowl next to the plate on the plate", ""),
        ("", "", "put the bowl between the plate and the cup on the plate", "starts elsewhere"),
        ("", "", "put the bowl not between the plate and the cup on the plate", ""),
        ("0.3 0.3 0.31 0.31", "0.2 0.01 0.21 0.02", "put the bowl between the plate and the cup on the plate", ""),
        ("(On bowl_1 plate_1)))", "(Close drawer_1_top)))", "close the drawer", "(close drawer_1_top)"),
        ("(On bowl_1 plate_1)))\n(:init", "(Close drawer_1_top)))\n(:init (Open drawer_1_top)", "close the drawer", ""),
    ],
)
def test_words_that_contradict_a_file_are_found_in_other_files_too(tmp_path, old, new, words, says):
    text = """(define (problem X)
(:regions (bowl_right (:target table) (:ranges ((0.3 0.3 0.31 0.31))))
 (plate (:target table) (:ranges ((0 0 0.01 0.01))))
 (cup (:target table) (:ranges ((0.4 0 0.41 0.01)))))
(:fixtures table - table drawer_1 - drawer) (:objects bowl_1 - bowl plate_1 - plate cup_1 - cup)
(:goal (And (On bowl_1 plate_1)))
(:init (On bowl_1 table_bowl_right) (On plate_1 table_plate) (On cup_1 table_cup)))"""
    assert old in text
    (tmp_path / "x.bddl").write_text(text.replace(old, new, 1))
    found = contradictions(tmp_path / "x.bddl", words)
    assert len(found) == bool(says) and says in "".join(found)


def test_a_file_without_words_is_named(tmp_path):
    path = tmp_path / "x.bddl"
    path.write_text("(define (problem X)\n  (:language )\n)")
    with pytest.raises(ValueError, match=r"x.bddl: no \(:language"):
        libero_pro.language_in(path)
    path.write_text("(define (problem X)\n  (:language\n   Put  the PAN away)\n)")
    assert libero_pro.language_in(path) == "put the pan away"


def experiment(tmp_path, suite, **more):
    path = tmp_path / "x.yaml"
    lines = {"suite": suite, "backends": "[baseline]", "policy": "{type: remote, url: ws://localhost:1}", **more}
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return load_experiment(path, [])


def test_states_of_the_base_suite_are_asked_for_by_name_and_only_where_they_fit(tmp_path):
    assert experiment(tmp_path, "libero_goal_lan", inits="base").initial_states() == ("base", 50)
    for suite in ("libero_goal_swap", "libero_goal_object", "libero_goal"):
        with pytest.raises(UserError, match="x.yaml:.*inits.*has no scenes of another suite"):
            experiment(tmp_path, suite, inits="base")
    key = EpisodeKey("libero_goal_lan", 0, 3, 7, "base")
    assert str(key) == "libero_goal_lan/0/base-3/7" and EpisodeKey.parse(str(key)) == key
    assert key.initial_state == EpisodeKey("libero_goal_lan", 0, 3, 8, "base").initial_state


@pytest.mark.libero
def test_lan_and_task_from_the_states_of_their_base_are_its_scenes_to_the_last_bit():
    base, task = Scene("libero_goal", 1), Scene("libero_goal_task", 1)
    base.reset(3, 7)
    task.reset(3, 7, "base")
    assert task.fingerprint() == base.fingerprint() and task.language == "put the plate on the stove"
    task.reset(3, 7)
    assert task.fingerprint() != base.fingerprint()
    base.close(), task.close()


def test_lint_says_of_a_suite_what_contradicts_itself(capfd):
    assert cli.main(["lint", "libero_goal_task"]) == 1
    (said,) = json.loads(capfd.readouterr().out.splitlines()[-1])["complaints"]
    assert "turn_on_the_stove.bddl:3: libero_goal_task task 7 its goal is (turnoff flat_stove_1)" in said
    assert cli.main(["lint", "libero_goal_swap", "libero_goal"]) == 0
    assert cli.main(["lint", str(libero.task_files("libero_goal", 0)["goal"]), "--settle"]) == 2


@pytest.mark.libero
def test_initial_states_that_throw_their_target_away_are_found():
    """Seen when the suites were first scanned: the bowl of libero_spatial_task 2 flies up to a metre; in libero_goal 0,
    as in the other base tasks, everything comes to rest where it is."""
    found = list(settle("libero_spatial_task", 2))
    assert found and max(one.sideways for one in found) > 0.3 and any(one.lost for one in found)
    assert not any(one.solved for one in found) and {one.init for one in found} < set(range(50))
    assert list(settle("libero_goal", 0)) == []
