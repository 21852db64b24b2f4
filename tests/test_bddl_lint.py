"""Risk: a task of one's own is run though nobody can fail it, or stands nowhere: LIBERO says KeyError, or an assertion
without a word, or nothing at all. And the other way round: the tool complains about LIBERO's own files."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlibero.errors import UserError
from qlibero.sim import bddl, libero, suites

SOUND = """(define (problem LIBERO_Tabletop_Manipulation)
  (:domain robosuite)
  (:language put the bowl on the plate)
  (:regions
    (bowl_region (:target main_table) (:ranges ((-0.1 0.0 -0.08 0.02))))
    (plate_region (:target main_table) (:ranges ((0.1 0.0 0.12 0.02))))
  )
  (:fixtures main_table - table)
  (:objects
    akita_black_bowl_1 - akita_black_bowl
    plate_1 - plate
  )
  (:obj_of_interest akita_black_bowl_1 plate_1)
  (:init
    (On akita_black_bowl_1 main_table_bowl_region)
    (On plate_1 main_table_plate_region)
  )
  (:goal
    (And (On akita_black_bowl_1 plate_1))
  )
)
"""
WORDS = bddl.Vocabulary(
    frozenset({"akita_black_bowl", "plate"}) | bddl.WORKSPACES,
    frozenset({"libero_tabletop_manipulation"}),
    bddl.PREDICATES,
)


def complaints(tmp_path, text):
    path = tmp_path / "x.bddl"
    path.write_text(text)
    return [said.removeprefix(f"{path}:") for said in bddl.lint(path, WORDS)]


def test_a_sound_file_has_none(tmp_path):
    assert complaints(tmp_path, SOUND) == []
    assert (
        complaints(tmp_path, SOUND.replace("(And (On akita_black_bowl_1 plate_1))", "(On akita_black_bowl_1 plate_1)"))
        == []
    )


def test_names_are_what_libero_makes_of_them(tmp_path):
    """It reads a file in lower case."""
    mixed = SOUND.replace("(On plate_1 main_table_plate", "(On Plate_1 Main_Table_plate").replace(
        "(plate_r", "(Plate_R"
    )
    assert mixed.count("Plate_") == 2 and complaints(tmp_path, mixed) == []
    twice = SOUND.replace("    plate_1 - plate\n", "    plate_1 - plate\n    PLATE_1 - plate\n")
    assert [said.partition(": ")[2] for said in complaints(tmp_path, twice)] == ["PLATE_1 is declared twice (line 11)"]


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("(And (On akita_black_bowl_1 plate_1))", "(And )", "18: the goal is empty: every episode would succeed"),
        ("    (And (On akita_black_bowl_1 plate_1))\n", "", "18: the goal is empty"),
        ("put the bowl", "put the (black) bowl", "3: a parenthesis in the instruction"),
        ("(And (On akita", "(Or (On akita", "19: (Or …) in the goal: LIBERO judges (And …)"),
        (
            "(And (On akita_black_bowl_1 plate_1))",
            "(And (Not (On akita_black_bowl_1 plate_1)))",
            "19: goal: predicate Not",
        ),
        (
            "(And (On akita_black_bowl_1 plate_1))",
            "(And (Near akita_black_bowl_1 plate_1))",
            "19: goal: predicate Near is none",
        ),
        (
            "(And (On akita_black_bowl_1 plate_1))",
            "(And (On akita_black_bowl_1 plate_2))",
            "19: goal: plate_2 is no object",
        ),
        (
            "(And (On akita_black_bowl_1 plate_1))",
            "(And (On akita_black_bowl_1))",
            "19: goal: On takes 2 names, here are 1",
        ),
        (
            "main_table_plate_region)",
            "main_table_dish_region)",
            "16: init: main_table_dish_region is no object, fixture or",
        ),
        ("    (On plate_1 main_table_plate_region)\n", "", "11: object plate_1 has no line in (:init …)"),
        ("plate_1 - plate", "plate_1 - blue_plate", "11: LIBERO has no object or fixture called blue_plate"),
        ("plate_1 - plate\n", "plate_1\n", "11: plate_1 has no class"),
        (
            "plate_1 - plate\n",
            "plate_1 akita_black_bowl_1 - plate\n",
            "11: akita_black_bowl_1 is declared twice (line 10)",
        ),
        ("LIBERO_Tabletop_Manipulation", "LIBERO_Desk", "1: problem LIBERO_Desk is none of libero_tabletop"),
        ("put the bowl on the plate", "", "3: an instruction of 0 characters"),
        ("put the bowl on the plate", "put " * 60, "3: an instruction of 239 characters"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, old, new, says):
    assert old in SOUND
    found = complaints(tmp_path, SOUND.replace(old, new, 1))
    assert any(line.startswith(says) for line in found), found


@pytest.mark.parametrize(
    "text, says",
    [
        (SOUND[:-3], ":1: a parenthesis opens here that is never closed"),
        (SOUND + ")", ":22: a parenthesis closes that was never opened"),
        ("", ":1: not one"),
        ("(problem X)", ":1: not one"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_refused_with_its_line(tmp_path, text, says):
    with pytest.raises(UserError, match="x.bddl") as refused:
        complaints(tmp_path, text)
    assert says in str(refused.value)


def test_a_directory_without_a_task_is_refused(tmp_path):
    with pytest.raises(UserError, match="no .bddl file here"):
        bddl.lint_all([tmp_path], WORDS)


def test_none_of_liberos_own_290_tasks_has_a_complaint():
    folders = {libero.task_files(name, 0)["goal"].parent for name, s in suites.SUITES.items() if not s.variants_of}
    found = bddl.lint_all(sorted(folders), bddl.installed())
    assert len(found) == 290 and [said for of in found.values() for said in of] == []
    assert all(isinstance(name, str) and Path(name).suffix == ".bddl" for name in found)
