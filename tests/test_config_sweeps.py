"""Risk: a sweep runs other cells than its file says, or the same file gives other cells tomorrow."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlibero.config.config_hash import config_hash
from qlibero.config.labels import FREE
from qlibero.config.load import ConfigError, load_experiment
from qlibero.config.schema import Experiment
from qlibero.config.sweep import Sweep, load_sweep
from qlibero.places import REPOSITORY
from qlibero.registry import MethodPlugin, built_in

CONFIGS = REPOSITORY / "configs"

BASE = """\
name: study
suite: libero_object
policy: {type: pi05, checkpoint: weights}
quant: {method: rtn, layout: llm}
backends: [baseline, fake]
"""


def load(directory: Path, text: str, *sets: str) -> Sweep:
    (directory / "base.yaml").write_text(BASE)
    (directory / "sweep.yaml").write_text("extends: base.yaml\n" + text)
    return load_sweep(directory / "sweep.yaml", sets, {}, check_files=False)


def complaint(directory: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(directory, text)
    return str(caught.value)


def test_every_combination_is_a_cell_in_the_files_order_with_a_lasting_id(tmp_path: Path) -> None:
    sweep = load(tmp_path, "grid:\n  suite: [libero_object, libero_goal]\n  quant.weight_bits: [4, 8]\n  seed: [7]\n")
    assert [cell.id for cell in sweep.cells] == [
        "suite-libero_object.weight_bits-4.seed-7",
        "suite-libero_object.weight_bits-8.seed-7",
        "suite-libero_goal.weight_bits-4.seed-7",
        "suite-libero_goal.weight_bits-8.seed-7",
    ]
    last = sweep.cells[-1]
    assert (last.experiment.suite, last.experiment.quant.weight_bits, last.experiment.seed) == ("libero_goal", 8, 7)
    assert last.experiment.name == f"study.{last.id}"
    assert last.axes == (("suite", "libero_goal"), ("quant.weight_bits", "8"), ("seed", "7"))


def test_exclude_takes_values_and_lists_and_cells_are_added_by_name(tmp_path: Path) -> None:
    text = """\
grid: {suite: [libero_object, libero_goal, libero_10], quant.weight_bits: [4, 8]}
exclude: [{suite: [libero_goal, libero_10], quant.weight_bits: 8}]
cells:
  w4a4: {quant.activation_bits: 4}
"""
    cells = {cell.id: cell.experiment for cell in load(tmp_path, text).cells}
    assert list(cells) == [
        "suite-libero_object.weight_bits-4",
        "suite-libero_object.weight_bits-8",
        "suite-libero_goal.weight_bits-4",
        "suite-libero_10.weight_bits-4",
        "w4a4",
    ]
    assert cells["w4a4"].quant.activation_bits == 4 and cells["w4a4"].suite == "libero_object"


def test_axes_of_arms_lists_and_files(tmp_path: Path) -> None:
    for name, width in (("a", 3), ("b", 5)):
        (tmp_path / f"{name}.yaml").write_text(f"policy: {{replan_steps: {width}, checkpoint: {name}}}\n")
    sweep = load(
        tmp_path,
        "grid:\n  extends: [a.yaml, b.yaml]\n  backends: [[baseline, fake], [baseline, {name: x, backend: int_ref}]]\n",
    )
    assert [cell.id for cell in sweep.cells] == [
        "extends-a.backends-baseline+fake",
        "extends-a.backends-baseline+x",
        "extends-b.backends-baseline+fake",
        "extends-b.backends-baseline+x",
    ]
    last = sweep.cells[-1].experiment
    assert (
        last.policy.replan_steps == 5
        and last.policy.checkpoint == tmp_path / "b"
        and last.arms()[1].backend == "int_ref"
    )


def test_set_applies_to_every_cell_and_an_experiment_is_a_sweep_of_one(tmp_path: Path) -> None:
    assert {
        cell.experiment.seed for cell in load(tmp_path, "grid: {quant.weight_bits: [4, 8]}\n", "seed=11").cells
    } == {11}
    (only,) = load(tmp_path, "seed: 3\n").cells
    assert (only.id, only.axes, only.experiment.seed) == ("study", (), 3)


def test_what_set_makes_another_experiment_gets_another_name_and_the_rest_does_not(tmp_path: Path) -> None:
    def name(*sets: str, **environ: str) -> str:
        (tmp_path / "base.yaml").write_text(BASE)
        return load_experiment(tmp_path / "base.yaml", sets, environ, check_files=False).name

    assert (
        name()
        == name("workers=2", "episodes_per_task=3", "tasks=[1]", "backends=[baseline]", "tracking.mode=online")
        == "study"
    )
    assert name("suite=libero_goal", "workers=2", "quant.weight_bits=8") == "study.suite-libero_goal.weight_bits-8"
    assert name("policy.checkpoint=../my/weights") == "study.checkpoint-weights"
    assert name("suite=libero_goal", "name=mine") == "mine"
    assert name(OPENPI_DUQUANT_ABITS="4", OPENPI_DUQUANT_LS="0.15") == "study.activation_bits-4"
    assert name("quant=null", "backends=[baseline]", OPENPI_DUQUANT_PACKDIR="/x") == "study.quant-null"
    assert load(tmp_path, "grid: {quant.weight_bits: [4, 8]}\n", "seed=11").name == "study.seed-11"
    assert (
        load(tmp_path, "grid: {quant.weight_bits: [4, 8]}\n", "seed=11", "name=mine").cells[0].experiment.name
        == "mine.weight_bits-4"
    )


def test_the_name_follows_exactly_what_the_hash_follows() -> None:
    """A key of the experiment either renames it or leaves the hash alone, never neither."""
    decides = {"suite", "inits", "seed", "seeds", "protocol", "max_steps", "policy", "quant", "execution", "on_failure"}
    keys = {field.alias or name for name, field in Experiment.model_fields.items()}
    assert keys - set(FREE) == decides


def test_long_ids_stay_short_and_distinct(tmp_path: Path) -> None:
    values = ", ".join(f"[baseline, {{name: {'x' * 90}{i}, backend: fake}}]" for i in range(2))
    ids = [cell.id for cell in load(tmp_path, f"grid: {{backends: [{values}]}}\n").cells]
    assert len(set(ids)) == 2 and all(len(id_) <= 80 for id_ in ids)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("grid: {suite: libero_goal}", "sweep.yaml:2:8: grid.suite: should be a list of values (got 'libero_goal')"),
        ("grid: {suite: []}", "should be a list of values"),
        ("grid: [suite]", "sweep.yaml:2:1: grid: should be `key: …` lines"),
        ("grid: {suite: [libero_goal, libero_gaol]}", "sweep.yaml:2:29: suite: should be"),
        ("grid: {suit: [libero_goal]}", "sweep.yaml:2:15: suit: unknown key; did you mean suite?"),
        ("grid: {quant.method.x: [1]}", "quant.method.x: quant.method is 'rtn', which has no keys of its own"),
        (
            "grid: {seed: [1, 2]}\nexclude: [{sed: 1}]",
            "sweep.yaml:3:12: exclude.0.sed: is no axis of grid (seed); did you mean seed?",
        ),
        ("grid: {seed: [1, 2]}\nexclude: [{seed: 3}]", "sweep.yaml:3:11: exclude.0: matches no cell"),
        ("grid: {seed: [1]}\nexclude: [{seed: 1}]", "no cell is left"),
        ("grid: {seed: [1, 1]}", "two cells are called seed-1"),
        ("cells: {a/b: {seed: 1}}", "a cell's name is letters, digits"),
        ("cells: {a: 1}", "cells.a: should be `key: value` lines"),
        ("cells: {}", "a sweep needs grid: or cells:"),
        ("grid: {extends: [nowhere.yaml]}", "cannot read"),
        (f"grid: {{seed: {list(range(200))}, retries: {list(range(200))}}}", "40,000 cells; the most is 10,000"),
    ],
)
def test_a_mistake_in_a_sweep_has_its_line(tmp_path: Path, text: str, says: str) -> None:
    assert says in complaint(tmp_path, text + "\n")


def test_a_mistake_common_to_all_cells_is_told_once(tmp_path: Path) -> None:
    assert complaint(tmp_path, "workers: many\ngrid: {seed: [1, 2, 3]}\n").count("\n") == 0


def test_a_directory_of_one_table_can_be_continued_with_another() -> None:
    tables = [
        load_experiment(CONFIGS / "experiments" / f"{name}.yaml", [])
        for name in ("compare_backends", "quantization_table", "methods")
    ]
    assert {(t.suite, t.episodes_per_task, t.tasks) for t in tables} == {("libero_spatial", 20, "all")}
    hashes: dict[str, str] = {}
    for table in tables:
        for arm in table.arms():  # one name, one configuration: what a run directory asks of the arms it holds
            assert hashes.setdefault(arm.name, config_hash(table, arm)) == config_hash(table, arm), arm.name
    assert {arm.name for arm in tables[0].arms()} < {arm.name for arm in tables[1].arms()}
    assert len(set(hashes.values())) == len(hashes)
    assert {arm.quant.method for arm in tables[2].arms() if arm.quant} == set(built_in(MethodPlugin))
