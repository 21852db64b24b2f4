"""Risk: a sweep runs cells twice, misses some, or spends a night on cells that could never have worked."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import light_shard
import numpy as np
import pytest

from qlibero.activity import heard_by
from qlibero.config.config_hash import config_hash
from qlibero.config.launch import Launch
from qlibero.config.sweep import load_sweep
from qlibero.console import table
from qlibero.errors import GuardRefusal, UserError, WorkFailed
from qlibero.kernels import load, names
from qlibero.kernels.contract import GemmShape
from qlibero.launch import cells, engine, here, local, ray, slurm
from qlibero.launch import status as watch
from qlibero.launch.impossible import refuse_impossible
from qlibero.launch.plan import plan
from qlibero.launch.plan_tables import readable
from qlibero.launch.slurm_options import seconds
from qlibero.launch.status import follow, headline, status
from qlibero.launch.sweep import run_sweep
from qlibero.machine import environment
from qlibero.machine.capacity import Capacity
from qlibero.results.arm_equality import Arithmetic, SameArithmetic
from qlibero.results.declaration import read_declaration
from qlibero.results.ledger import Ledger
from qlibero.results.records import EpisodeRecord
from qlibero.run.experiment import _recorded_before, run_experiment
from qlibero.run.planned import episode_keys, missing_episodes, planned_keys
from qlibero.run.state import run_state
from qlibero.stats.proportions import minimum_detectable_difference, noninferiority_power, smallest_one_way_difference

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
GRID = """
extends: {policy}
suite: libero_goal
tasks: [0, 4]
episodes_per_task: 25
backends: [baseline, fake]
quant: {{method: rtn, layout: llm}}
grid:
  seed: [7, 8]
  quant.activation_bits: [8, 4]
exclude:
  - {{seed: 8, quant.activation_bits: 4}}
cells:
  w4a16: {{quant.activation_bits: 16}}
launch: {{shard_episodes: 20, processes: 2, slurm: {{gres: "gpu:h100:2", cpus_per_task: 4, time: "01:00:00"}}}}
"""


def sweep_of(tmp_path: Path, text: str = GRID, *sets: str):
    path = tmp_path / "grid.yaml"
    path.write_text(text.format(policy=REPOSITORY / "configs/policies/untrained.yaml"))
    return load_sweep(path, sets, environ={})


def outcome_of(key, arm: str, minute: int = 0, outcome: str = "failure", error: str | None = None) -> EpisodeRecord:
    return EpisodeRecord(
        suite=key.suite,
        task=key.task,
        init=key.init,
        seed=key.seed,
        arm=arm,
        outcome=outcome,
        error=error,
        success_step=300 if outcome == "success" else None,
        steps=300,
        replans=2,
        fingerprint="f",
        action_digest="a",
        sim_ms=1500.0,
        render_ms=500.0,
        policy_ms=[500.0, 500.0],
        finished_at=f"2026-11-23T10:{minute:02d}:00+00:00",
    )


def fill(cell: cells.Cell, keys, arms=("baseline", "fake"), succeeds=(), error: str | None = None) -> None:
    """Episodes of 2 s of simulator and 1 s of policy, one a minute: failures, except successes and errors asked for."""
    for arm in cell.experiment.arms():
        if arm.name in arms:
            with Ledger(cell.run_dir, arm.name, config_hash=config_hash(cell.experiment, arm)) as ledger:
                for i, key in enumerate(keys):
                    outcome = "error" if error else "success" if key in succeeds else "failure"
                    ledger.append(outcome_of(key, arm.name, i, outcome, error), np.zeros((1, 10), np.float32))
    (cell.run_dir / "experiment.yaml").write_text(cells.dump_resolved(cell.experiment))


def test_shards_hold_every_episode_of_every_cell_once(tmp_path):
    manifest = cells.make_manifest(sweep_of(tmp_path), tmp_path / "out")
    assert [cell.id for cell in manifest.cells] == [
        "seed-7.activation_bits-8",
        "seed-7.activation_bits-4",
        "seed-8.activation_bits-8",
        "w4a16",
    ]
    assert manifest == cells.make_manifest(sweep_of(tmp_path), tmp_path / "out")
    for cell in manifest.cells:
        parts = [episode_keys(cell.experiment, (s.index, s.count)) for s in manifest.shards if s.cell == cell.id]
        assert len(parts) == 3 and sorted(sum(parts, [])) == sorted(episode_keys(cell.experiment))
    again = cells.read_manifest(cells.write_manifest(manifest) / "manifest.json")
    assert again == manifest


def test_only_shards_that_lack_something_are_submitted(tmp_path, said):
    manifest = cells.make_manifest(sweep_of(tmp_path), tmp_path / "out")
    assert manifest.missing() == tuple(range(12))
    first = manifest.cells[0]
    fill(first, episode_keys(first.experiment, (1, 3)))
    fill(first, episode_keys(first.experiment, (2, 3)), arms=("baseline",))
    assert manifest.missing() == (0, *range(2, 12))  # shard 2 lacks its other arm
    before = sorted((tmp_path / "out").rglob("*"))
    document = run_sweep(sweep_of(tmp_path), "slurm", tmp_path / "out", True).to_json()
    assert document["submitted"] == {"count": 11, "shards": "0,2-11"} and "--array=0,2-11\n" in document["dry_run"]
    assert sorted((tmp_path / "out").rglob("*")) == before  # a dry run writes nothing


def test_impossible_cells_are_refused_before_anything_is_spent(tmp_path):
    def manifest(*sets: str) -> cells.Manifest:
        return cells.make_manifest(sweep_of(tmp_path, GRID, *sets), tmp_path / "none")

    refuse_impossible(manifest(), "local")
    with pytest.raises(
        UserError, match=r"4 of 4 cells cannot run on engine local:\n  seed-7.*\n?.*arm triton_w4a8: triton_w4a8 on cpu"
    ):
        refuse_impossible(manifest("backends=[baseline, triton_w4a8]", "policy.device=cpu"), "local")
    with pytest.raises(UserError, match="2,000 simulators need 3800 GB"):
        refuse_impossible(manifest("workers=2000"), "local")
    with pytest.raises(UserError, match="launch.slurm.time 2 is not longer than launch.slurm.signal_s 120"):
        refuse_impossible(manifest("launch.slurm.time='2'"), "slurm")
    with pytest.raises(UserError, match="5.7 GB, a shard on engine slurm has 4.3 GB; set workers or launch.slurm.mem"):
        refuse_impossible(manifest("workers=3", "launch.slurm.mem=4G"), "slurm")
    made = manifest()
    fill(made.cells[0], episode_keys(made.cells[0].experiment)[:1])
    with pytest.raises(GuardRefusal, match="holds episodes of another configuration"):
        manifest("max_steps=9")


def test_a_login_node_without_a_gpu_plans_for_nodes_that_have_one(tmp_path):
    """The kernels are validated on the node; here only what is true on every machine is refused."""
    plain = (
        GRID.replace("quant.activation_bits: [8, 4]", "quant.activation_bits: [8]").partition("exclude:")[0]
        + GRID.partition("w4a16: {{quant.activation_bits: 16}}\n")[2]
    )

    def problems(engine: str, *sets: str) -> str:
        try:
            refuse_impossible(cells.make_manifest(sweep_of(tmp_path, plain, *sets), tmp_path / "none"), engine)
        except UserError as refused:
            return str(refused)
        return ""

    for kernel in ("triton_w4a8", "humming", "bitblas", "w8a8", "fake"):
        assert problems("slurm", f"backends=[baseline, {kernel}]") == "", kernel
        assert problems("ray", f"backends=[baseline, {kernel}]", "launch.ray.gpus=1") == "", kernel
    assert "triton_w4a8 on cuda: packs weights of 2 or 3 or 4 bits, not 8" in problems(
        "slurm", "backends=[triton_w4a8]", "quant.weight_bits=8"
    )
    assert "humming on cuda: takes one weight scale per row" in problems(
        "slurm", "backends=[humming]", "quant.group_size=64"
    )
    assert "cpu_int4 on cuda: runs on cpu only" in problems("slurm", "backends=[cpu_int4]")
    assert "triton_w4a8 on cpu: runs on cuda only" in problems(
        "slurm", "backends=[triton_w4a8]", "launch.slurm.gres=null"
    )
    assert "triton_w4a8" in problems(
        "local", "backends=[triton_w4a8]", "policy.device=cuda"
    )  # this machine can be asked


def test_what_no_machine_can_do_this_one_cannot_either():
    shapes = [
        GemmShape(256, 256, bits, 8, group, device)
        for bits in (4, 8)
        for group in (None, 64)
        for device in ("cpu", "cuda")
    ]
    wrong = [
        (name, str(shape))
        for name in names()
        for shape in shapes
        if not load(name).fits(shape).ok and load(name).supports(shape).ok
    ]
    assert wrong == [] or os.environ.get("TRITON_INTERPRET") == "1"


def test_workers_auto_is_held_against_memory_in_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr("qlibero.launch.plan.RUNS", tmp_path / "no-other-runs")
    with pytest.raises(UserError, match="1 simulator needs 1.9 GB, a shard on engine slurm has 1.6 GB"):
        refuse_impossible(
            cells.make_manifest(sweep_of(tmp_path, GRID, "launch.slurm.mem=1500M"), tmp_path / "out"), "slurm"
        )
    made = cells.make_manifest(sweep_of(tmp_path, GRID, "launch.slurm.mem=4G"), tmp_path / "out")
    fill(made.cells[0], episode_keys(made.cells[0].experiment))
    # 4 cores, but memory for two simulators: 2 s on 2 and 1 s of policy
    slurm_cost = plan(made).to_json()["engines"]["slurm"]
    assert (
        slurm_cost["wall_h"] == pytest.approx(34 * 2.0 / 3600, abs=1e-3) and "up to 2 simulators" in slurm_cost["basis"]
    )


def test_plan_says_what_it_costs_and_what_it_can_find(tmp_path, monkeypatch):
    monkeypatch.setattr("qlibero.launch.plan.RUNS", tmp_path / "no-other-runs")
    made = cells.make_manifest(sweep_of(tmp_path), tmp_path / "out")
    assert plan(made).engines is None  # nothing like it has been run: no time is made up
    fill(made.cells[0], episode_keys(made.cells[0].experiment))
    found = plan(made).to_json()
    assert (found["episodes"], found["done"], found["without_cost"]) == (400, 100, 0)
    assert found["cells"][1]["seconds_each"] == {
        "baseline": 3.0,
        "fake": 3.0,
    }  # another cell's cost: same policy and backend
    cell = found["cells"][1]
    assert (
        cell["detectable_difference"] is None and cell["discordance"] == "5.0% assumed"
    )  # 50 pairs are too few, and it says
    assert (
        f"only if every flip goes one way and it reaches {100 * cell['one_way_difference']:.1f} pp"
        in cell["detectable"]
    )
    assert cell["one_way_difference"] == pytest.approx(smallest_one_way_difference(50), rel=1e-4)
    assert cell["noninferiority_power"] == pytest.approx(noninferiority_power(50, 0.05, 0.02), rel=1e-4)
    assert f"80 % takes {cell['pairs_for_noninferiority']:,} pairs" in cell["detectable"]
    # 300 episodes are missing: 2 s on 4 cores and 1 s of policy (one at a time on a CPU) = 1.5 s each, on 9 shards at
    # once
    slurm_cost = found["engines"]["slurm"]
    assert slurm_cost["gpu_h"] == pytest.approx(300 * 1.5 * 2 / 3600, abs=1e-3)
    assert slurm_cost["wall_h"] == pytest.approx(34 * 1.5 / 3600, abs=1e-3)
    assert [seconds(t) for t in ("30", "01:00:00", "2-01", "1-00:00:30", "10:30")] == [1800, 3600, 176400, 86430, 630]


@pytest.mark.parametrize("devices", ["[cpu, cuda]", "[cuda, cpu]"])
def test_a_plan_counts_each_cells_own_simulators(tmp_path, monkeypatch, devices):
    monkeypatch.setattr("qlibero.launch.plan.RUNS", tmp_path / "no-other-runs")
    axes = f"  policy.device: {devices}\ncells:\n  three: {{{{policy.device: cuda, workers: 3}}}}\n"
    text = GRID.partition("  seed:")[0] + axes + GRID[GRID.index("launch:") :]
    made = cells.make_manifest(sweep_of(tmp_path, text, "policy.batch_size=16", "backends=[baseline]"), tmp_path / "o")
    for cell in made.cells:
        fill(cell, episode_keys(cell.experiment)[:2])
    found = plan(made).to_json()["engines"]["slurm"]  # 4 cores, 2 GPUs; 48 episodes are missing in each of three cells
    on_cpu = 2 / 4 + 1 / 4  # seconds of an episode: 4 simulators step, and share the policy's calls
    on_gpu = 2 / 4 + 1 / 16  # four batches of 16, but no more than 4 a core
    with_three = 2 / 3 + 1 / 3
    assert found["gpu_h"] == pytest.approx(48 * (on_cpu + on_gpu + with_three) * 2 / 3600, abs=1e-3)
    assert "up to 16 simulators" in found["basis"]


def test_plan_finds_a_difference_where_there_are_pairs_enough(tmp_path, monkeypatch):
    monkeypatch.setattr("qlibero.launch.plan.RUNS", tmp_path / "no-other-runs")
    (cell,) = plan(
        cells.make_manifest(
            sweep_of(tmp_path, STOPPING, "stop=null", "tasks=all", "episodes_per_task=50"), tmp_path / "out"
        ),
    ).to_json()["cells"]
    assert cell["pairs"] == 500 and cell["detectable_difference"] == pytest.approx(
        minimum_detectable_difference(500, 0.05), rel=1e-4
    )


def test_no_arm_is_planned_below_the_noise_of_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr("qlibero.launch.plan.RUNS", tmp_path / "no-other-runs")
    made = cells.make_manifest(
        sweep_of(tmp_path, STOPPING, "stop=null", "backends=[baseline, aa, fake]"), tmp_path / "out"
    )
    (cell,), keys = made.cells, episode_keys(made.cells[0].experiment)
    fill(cell, keys, arms=("baseline", "fake"))
    fill(cell, keys, arms=("aa",), succeeds=keys[:10])
    assert plan(made).to_json()["cells"][0]["discordance"] == "20.0% observed in aa"


# ------------------------------------------------------------------------------------------------ sequential stopping
STOPPING = """
extends: {policy}
suite: libero_goal
tasks: [0, 4]
episodes_per_task: 25
backends: [baseline, fake]
quant: {{method: rtn, layout: llm}}
stop: {{margin: 0.3, alpha: 0.2}}
launch: {{shard_episodes: 20}}
"""


def test_asking_about_a_stopping_run_neither_fails_nor_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("qlibero.launch.plan.RUNS", tmp_path / "no-other-runs")
    made = cells.make_manifest(sweep_of(tmp_path, STOPPING, "stop.max_episodes=30"), tmp_path / "out")
    (cell,) = plan(made).to_json()["cells"]
    assert (cell["pairs"], cell["episodes"], cell["missing"], cell["done"], cell["shards"]) == (30, 60, 60, 0, 1)
    assert cell["margin"] == 0.3 and "With 2 looks (α 0.2 an arm) an equal arm" in cell["detectable"]
    assert cell["sequential"]["expected_pairs"] <= 30 and cell["sequential"]["pairs_for_noninferiority"] % 20 == 0
    made.cells[0].run_dir.mkdir(parents=True)
    document = run_sweep(sweep_of(tmp_path, STOPPING), "slurm", tmp_path / "out", True).to_json()
    assert (
        document["submitted"] == {"count": 1, "shards": "0"} and not document["complete"]
    )  # 50 pairs, one shard: the test needs them together
    assert list((tmp_path / "out").rglob("*")) == []
    with pytest.raises(UserError, match="cannot run on engine local:\n .*stop: needs the arm baseline"):
        refuse_impossible(
            cells.make_manifest(sweep_of(tmp_path, STOPPING, "backends=[fake]"), tmp_path / "out"), "local"
        )


def test_a_stopping_run_is_complete_when_decided_and_retries_its_errors_until_then(tmp_path):
    made = cells.make_manifest(sweep_of(tmp_path, STOPPING, "stop.method=evalues"), tmp_path / "out")
    (cell,) = made.cells
    keys, order = episode_keys(cell.experiment), planned_keys(cell.experiment)
    assert set(order) == set(keys) and list(order) != keys
    fill(cell, keys, arms=("baseline",), succeeds=keys)
    fill(cell, keys[:15], arms=("fake",), succeeds=keys)
    fill(cell, keys[15:], arms=("fake",), error="the simulator died")
    lacking = missing_episodes(cell.experiment, cell.run_dir)
    assert set(lacking) == {
        ("fake", key) for key in keys[15:]
    }  # all 50 pairs are spent, the question is open: tried again
    document = run_state(cell.experiment, cell.run_dir).to_json()
    assert not document["complete"] and document["stop"]["episodes_saved"] == 0
    assert document["stop"]["arms"]["fake"]["errors"] == 35

    decided = cells.make_manifest(sweep_of(tmp_path, STOPPING, "stop.method=evalues"), tmp_path / "decided").cells[0]
    fill(decided, order[:20])
    assert missing_episodes(decided.experiment, decided.run_dir) == []
    document = run_state(decided.experiment, decided.run_dir).to_json()
    assert document["complete"] and document["stop"]["arms"]["fake"]["verdict"] == "non-inferior"
    assert document["stop"]["episodes_saved"] == 100 - 40
    assert status(decided.run_dir).done == status(decided.run_dir).episodes == 40  # what was run, not what was spared
    capped = decided.experiment.model_copy(
        update={"stop": decided.experiment.stop.model_copy(update={"max_episodes": 3})}
    )
    document = run_state(capped, decided.run_dir).to_json()
    assert (
        document["complete"]
        and document["stop"]["arms"]["fake"]["verdict"] == "undecided"
        and document["stop"]["episodes_saved"] == 0
    )


@pytest.mark.parametrize("method", ["group_sequential", "evalues"])
def test_an_arm_ends_when_it_is_decided_and_the_control_holds_nothing_up(tmp_path, method):
    """w4a4 breaks every pair and is inferior at once, fake is not decided yet: only fake, its reference and the A/A arm
    go on; when fake is decided too nothing does, though the A/A arm has run little."""
    backends = "backends=[baseline, aa, fake, {name: w4a4, backend: fake, quant: {activation_bits: 4}}]"
    made = cells.make_manifest(
        sweep_of(tmp_path, STOPPING, f"stop.method={method}", "stop.margin=0.2", backends), tmp_path / "out"
    )
    (cell,) = made.cells
    order = planned_keys(cell.experiment)
    fill(cell, order[:20], arms=("baseline",), succeeds=order)
    fill(cell, order[:20], arms=("w4a4",), succeeds=())
    fill(cell, order[:20], arms=("fake",), succeeds=order[:16])
    found = run_state(cell.experiment, cell.run_dir).to_json()["stop"]["arms"]
    assert (found["w4a4"]["verdict"], found["fake"]["verdict"]) == ("inferior", None)
    assert {arm for arm, _ in missing_episodes(cell.experiment, cell.run_dir)} == {"baseline", "aa", "fake"}
    fill(cell, order[20:], arms=("baseline", "fake"), succeeds=order)
    assert missing_episodes(cell.experiment, cell.run_dir) == []
    document = run_state(cell.experiment, cell.run_dir).to_json()
    ended = {"group_sequential": "non-inferior", "evalues": "undecided"}  # of 50 pairs, all spent
    assert document["complete"] and document["stop"]["arms"]["fake"]["verdict"] == ended[method]


def test_a_stopping_run_declares_before_its_first_episode_also_when_calibrated(tmp_path, monkeypatch):
    monkeypatch.setattr("qlibero.launch.plan.RUNS", tmp_path / "no-other-runs")
    made = cells.make_manifest(sweep_of(tmp_path, STOPPING), tmp_path / "out")
    (cell,) = made.cells
    ran: list[list] = []

    def instead_of_simulators(experiment, run_dir, shard, missing, ledgers, *_):
        assert read_declaration(run_dir).order == planned_keys(cell.experiment)
        ran.append(missing)
        for arm, key in missing:
            ledgers[arm].append(outcome_of(key, arm))
        return []

    monkeypatch.setattr("qlibero.run.experiment._run", instead_of_simulators)
    assert plan(made, calibrate=True).engines is not None
    assert [sorted(pairs) for pairs in ran] == [
        [(arm, planned_keys(cell.experiment)[0]) for arm in ("baseline", "fake")]
    ]
    assert run_experiment(cell.experiment, cell.run_dir).complete and len(ran[1]) == 98
    assert read_declaration(cell.run_dir).max_pairs is None
    other = cell.experiment.model_copy(
        update={"margin": 0.1, "stop": cell.experiment.stop.model_copy(update={"margin": 0.1})}
    )
    with pytest.raises(GuardRefusal, match="declares another stopping rule"):
        run_experiment(other, cell.run_dir)


def test_the_plan_is_readable_on_a_terminal_of_100_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qlibero.console.PLAIN_WIDTH", 100)
    monkeypatch.setattr("qlibero.launch.plan.RUNS", tmp_path / "no-other-runs")
    made = cells.make_manifest(
        load_sweep(REPOSITORY / "configs/sweeps/methods_and_layouts.yaml", (), environ={}), tmp_path / "out"
    )
    document = plan(made)
    for title, rows in readable(document):
        table(rows, title)
    said = capsys.readouterr().err
    assert max(map(len, said.splitlines())) <= 100
    cell = "suite-libero_object.method-duquant.layout-llm+expert_mlp"
    assert all(
        f" {word} " in f" {' '.join(said.split())} "
        for word in (cell, "detectable", "libero_object", "0 of 1,500 episodes in the")
    )
    assert len(said.splitlines()) < 2 * len(document.cells)
    assert (
        " ".join(said.split()).count("a difference is found with 80 % power only if") == 1
    )  # one sentence, true of all cells


@pytest.mark.parametrize("first", ["[baseline, fake]", "[baseline]"])
def test_the_plan_says_of_which_cells_each_sentence_is_true(tmp_path, monkeypatch, first):
    monkeypatch.setattr("qlibero.launch.plan.RUNS", tmp_path / "no-other-runs")
    second = "[baseline]" if "fake" in first else "[baseline, fake]"
    grid = (
        STOPPING
        + f"cells:\n  one: {{{{backends: {first}, stop: null}}}}\n  two: {{{{backends: {second}, stop: null}}}}\n"
    )
    document = plan(cells.make_manifest(sweep_of(tmp_path, grid), tmp_path / "out"))
    said = {row[""]: row["detectable"] for row in dict(readable(document))["what their pairs can find"]}
    alone, pairs = ("two", "one") if "fake" in first else ("one", "two")
    assert said[alone].startswith("one arm alone") and said[pairs].startswith("With 50 pairs and 5.0 % flips (assumed)")


def test_status_counts_files_not_promises(tmp_path):
    manifest = cells.make_manifest(sweep_of(tmp_path), tmp_path / "out")
    cells.write_manifest(manifest)
    fill(manifest.cells[0], episode_keys(manifest.cells[0].experiment, (0, 3)))
    found = status(tmp_path / "out")
    assert (found.done, found.episodes, found.shards_done, found.shards) == (
        32,
        400,
        1,
        12,
    )  # the first 16 of 50 scenes, two arms
    assert found.episodes_per_hour == pytest.approx(31 / 15 * 60, abs=0.1)  # two arms, one episode a minute each
    assert headline(found) == "32 of 400 episodes, 1 of 12 shards, 124 episodes/h, nothing under way here"
    assert headline(replace(found, queue={"RUNNING": 2})).startswith(
        "32 of 400 episodes, 1 of 12 shards, 2 running, 124 episodes/h, done about 20"
    )
    with pytest.raises(UserError, match="neither a sweep"):
        status(tmp_path)


def test_status_knows_what_a_run_asks_for_that_one_process_goes_on_with(tmp_path):
    text = GRID.partition("grid:")[0]
    (cell,) = sweep_of(tmp_path, text, "episodes_per_task=2").cells
    spread = cells.spread_over(cell.experiment, tmp_path / "out", 2)
    cells.write_manifest(spread)  # as over two GPUs
    fill(spread.cells[0], episode_keys(cell.experiment))
    found = status(tmp_path / "out")
    assert found.complete and (found.done, found.shards_done, found.shards) == (8, 2, 2)
    (more,) = sweep_of(tmp_path, text, "episodes_per_task=3").cells
    alone = cells.spread_over(more.experiment, tmp_path / "out", 1).cells[0]
    fill(alone, episode_keys(more.experiment)[:1])
    found = status(tmp_path / "out")
    assert not found.complete and (found.done, found.episodes) == (8, 12)
    cells.write_manifest(cells.make_manifest(sweep_of(tmp_path, text, "episodes_per_task=4"), tmp_path / "out"))
    assert status(tmp_path / "out").episodes == 16  # submitted since, and not begun


def test_merge_that_was_killed_is_done_by_the_next_sweep(tmp_path, monkeypatch, said):
    monkeypatch.setattr("qlibero.launch.slurm._notes", lambda directory: [])
    made = sweep_of(tmp_path, GRID, "tracking=[]")
    manifest = cells.make_manifest(made, tmp_path / "out")
    cells.write_manifest(manifest)
    for cell in manifest.cells:
        fill(cell, episode_keys(cell.experiment))
    assert not cells.merged(manifest)
    (tmp_path / "out/sweep/result.json").write_text(
        json.dumps(cells.sweep_state(manifest).to_json() | {"mirrors": {"seed-7": {"wandb": "ended with status 1"}}})
    )
    assert not cells.merged(manifest)  # as good as killed for who waits for wandb's rows
    assert run_sweep(made, "local", tmp_path / "out", False).state.complete
    assert cells.merged(manifest) and len(said) == 1 and "merge" in said[0]
    assert run_sweep(made, "local", tmp_path / "out", False).submitted == () and len(said) == 1


def test_following_ends_when_nothing_is_under_way_and_not_before(tmp_path, monkeypatch):
    manifest = cells.make_manifest(sweep_of(tmp_path), tmp_path / "out")
    cells.write_manifest(manifest)
    fill(
        manifest.cells[0], episode_keys(manifest.cells[0].experiment, (0, 3))
    )  # 32 of 400, and nobody works on the rest
    clock = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    seen: list[watch.Status] = []
    assert not follow(tmp_path / "out", seen.append).complete and clock[0] == watch.QUIET_S + watch.FOLLOW_S
    assert headline(seen[-1]).endswith("nothing under way here")

    first = manifest.cells[0]
    arm = first.experiment.arms()[0]
    with Ledger(first.run_dir, arm.name, shard="working", config_hash=config_hash(first.experiment, arm)):
        begun = clock[0]

        def look(found: watch.Status) -> None:
            assert found.writing == 1
            if clock[0] - begun > 600:
                raise KeyboardInterrupt  # held open by a living process: it would go on

        with pytest.raises(KeyboardInterrupt):
            follow(tmp_path / "out", look)
    assert status(tmp_path / "out").writing == 0


def test_cells_that_ask_for_other_resources_are_refused_not_given_the_first_ones(tmp_path):
    other = GRID.replace(
        "w4a16: {{quant.activation_bits: 16}}", 'w4a16: {{quant.activation_bits: 16, launch.slurm.gres: "gpu:4"}}'
    )
    with pytest.raises(
        UserError, match="launch.slurm.gres is 'gpu:h100:2' in cell seed-7.activation_bits-8 and 'gpu:4' in cell w4a16"
    ):
        cells.make_manifest(sweep_of(tmp_path, other), tmp_path / "out")
    shards = GRID.replace(
        "w4a16: {{quant.activation_bits: 16}}", "w4a16: {{quant.activation_bits: 16, launch.shard_episodes: 50}}"
    )
    assert [cell.shards for cell in cells.make_manifest(sweep_of(tmp_path, shards), tmp_path / "out").cells] == [
        3,
        3,
        3,
        1,
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.clear(), "manifest schema 'None'"),
        (lambda m: m.update(schema=2), "manifest schema '2'"),
        (lambda m: m.pop("sweep"), "sweep: Field required"),
        (lambda m: m.update(sweep=7), "sweep: .*valid string, found 7"),
        (lambda m: m.update(directory="out"), "directory: .*found 'out'"),
        (lambda m: m.update(cells={"id": 1}), "cells: .*valid list, found a dict"),
        (lambda m: m.update(cells=[]), "cells: .*at least 1 item"),
        (lambda m: m["cells"].append(m["cells"][0]), "cells: ids must be names of directories, each once"),
        (lambda m: m["cells"][0].update(id="../elsewhere"), "cells.0.id: .*found '../elsewhere'"),
        (lambda m: m["cells"][1].update(id=".."), "cells: ids must be names of directories"),
        (lambda m: m["cells"][0].update(run_dir=None), "cells.0.run_dir: .*found None"),
        (lambda m: m["cells"][0].update(axes={"a": 1}), "cells.0.axes.a: .*valid string, found 1"),
        (lambda m: m["cells"][0].update(shadow=1), "cells.0.shadow: Extra inputs"),
        (lambda m: m.update(shards=[["nobody", 0, 1]]), "shards.0: shard 0 of 1 of 'nobody', which there is not"),
        (lambda m: m["shards"][1].__setitem__(1, 9), "shards.1: shard 9 of 3"),
        (lambda m: m["shards"][1].__setitem__(1, -1), "shards.1.1: .*found -1"),
        (lambda m: m["shards"][1].__setitem__(1, True), "shards.1.1: .*valid integer, found True"),
        (lambda m: m["shards"][1].__setitem__(2, "3"), "shards.1.2: .*valid integer, found '3'"),
        (lambda m: m["shards"][1].pop(), "shards.1.2: Field required"),
    ],
)
def test_a_manifest_is_typed_before_it_is_believed(tmp_path, change, said):
    path = cells.write_manifest(cells.make_manifest(sweep_of(tmp_path), tmp_path / "out")) / "manifest.json"
    assert cells.read_manifest(path).name == cells.latest_manifest(tmp_path / "out").name
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=f"manifest.json: {said}"):
        cells.read_manifest(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "NaN", "[" * 100_000, '{"schema": 1' + "0" * 5000 + "}"])
def test_a_manifest_that_is_none_is_the_users_error(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest.json: ") as problem:
        cells.read_manifest(tmp_path / "manifest.json")
    assert len(str(problem.value)) < 400 + len(str(tmp_path))


# ------------------------------------------------------------------------------------------------ the local engine
def submission(tmp_path: Path, monkeypatch, shards: int) -> engine.Submission:
    monkeypatch.setattr(engine, "program", lambda: [sys.executable, light_shard.__file__])
    (tmp_path / "logs").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    return engine.Submission("drill", tmp_path, tuple(range(shards)), Launch(processes=2))


def test_local_shard_that_is_killed_is_started_again_and_one_that_fails_is_named(tmp_path, monkeypatch, said):
    made = submission(tmp_path, monkeypatch, 2)
    commands = made.shard_command
    monkeypatch.setattr(
        engine.Submission,
        "shard_command",
        lambda self, i: commands(i) if i == 0 else ["sh", "-c", "echo 'qlibero: no such thing'; exit 2"],
    )
    import threading

    def hurt() -> None:
        while not light_shard.rows(tmp_path, 0):
            time.sleep(0.05)
        os.kill(int((tmp_path / "pid-0").read_text()), signal.SIGKILL)

    threading.Thread(target=hurt, daemon=True).start()
    submitted = local.submit(made)
    assert submitted.finished and submitted.failed == (1,)
    assert light_shard.rows(tmp_path, 0) == list(range(light_shard.ROWS)) and (tmp_path / "merged").exists()
    assert "shard 0 was killed by SIGKILL: starting it again" in said
    assert any("shard 1 ended with status 2" in line and "no such thing" in line for line in said)


@pytest.mark.parametrize(
    "log,said",
    [
        ("qlibero: refused:\n  layer a\n  layer b\n{}\nleft over\n", "refused:\n  layer a\n  layer b"),
        ("qlibero: CUDA toolkit: older\nloading the policy\n", "CUDA toolkit: older"),  # killed: no line of JSON
        ("qlibero: the first time\n{}\nqlibero: the second\n{}\n", "the second"),
        ("loading the policy\n", "see .*shard-0.log"),
    ],
)
def test_what_a_shard_said_last_is_its_whole_message(tmp_path, monkeypatch, log, said):
    made = submission(tmp_path, monkeypatch, 1)
    command = ["sh", "-c", 'printf "$1"; exit 3', "", log]
    monkeypatch.setattr(engine.Submission, "shard_command", lambda self, i: command)
    (failed,) = local.run_shards(made).values()
    assert failed.status == 3 and re.fullmatch(said, failed.said)


def test_a_merge_that_fails_is_not_a_sweep_that_is_done(tmp_path, monkeypatch, said):
    made = submission(tmp_path, monkeypatch, 1)
    monkeypatch.setenv("LIGHT_ROWS", "1")
    monkeypatch.setattr(engine.Submission, "merge_command", lambda self: ["sh", "-c", "exit 5"])
    assert local.submit(made).merge_status == 5
    assert said[-1] == "the merge after the shards ended with status 5; by hand: sh -c 'exit 5'"

    from qlibero import cli

    done = run_sweep(sweep_of(tmp_path), "slurm", tmp_path / "out", True)
    monkeypatch.setattr("qlibero.launch.sweep.run_sweep", lambda *_: replace(done, merge_status=5))
    (tmp_path / "grid.yaml").write_text(GRID.format(policy=REPOSITORY / "configs/policies/untrained.yaml"))
    assert cli.main(["sweep", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")]) == 1


def test_a_sweep_whose_kernels_were_wrong_is_refused_each_time(tmp_path, monkeypatch, said):
    """Its merge fails for it once, and is then as done as it can be."""
    from qlibero import cli

    done = run_sweep(sweep_of(tmp_path), "slurm", tmp_path / "out", True)
    unequal = Arithmetic((SameArithmetic("fake", "cpu_int4", 1, 2),), {})
    wrong = {name: replace(cell, arithmetic=unequal) for name, cell in done.state.cells.items()}
    (tmp_path / "grid.yaml").write_text(GRID.format(policy=REPOSITORY / "configs/policies/untrained.yaml"))
    for merge_status in (3, 0):
        again = replace(done, state=replace(done.state, cells=wrong), merge_status=merge_status, dry_run=None)
        monkeypatch.setattr("qlibero.launch.sweep.run_sweep", lambda *_, found=again: found)
        assert cli.main(["sweep", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")]) == 3


def test_shards_beside_each_other_share_the_cores(tmp_path, monkeypatch):
    made = submission(tmp_path, monkeypatch, 2)
    monkeypatch.setattr(local, "capacity", lambda: Capacity(8, 64.0, 64.0, ""))
    monkeypatch.setattr(engine.Submission, "shard_command", lambda self, i: ["sh", "-c", "echo cores $QLIBERO_CORES"])
    assert not local.submit(made).failed
    assert [made.log(i).read_text() for i in (0, 1)] == ["cores 4\n"] * 2


@pytest.mark.parametrize("visible,expected", [(None, "0123"), ("2,3", "23"), ("3", "3"), ("1,-1,2", "1"), ("", "")])
def test_each_process_has_a_gpu_of_its_own(tmp_path, monkeypatch, visible, expected):
    monkeypatch.setattr(environment, "find_gpus", lambda: [{"index": str(i), "uuid": f"GPU-{i}"} for i in range(4)])
    monkeypatch.setattr(local, "capacity", lambda: Capacity(8, 64.0, 64.0, ""))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    made = replace(submission(tmp_path, monkeypatch, 4), launch=Launch())
    shell = "echo $CUDA_VISIBLE_DEVICES/$QLIBERO_CORES; sleep 0.5"
    monkeypatch.setattr(engine.Submission, "shard_command", lambda self, i: ["sh", "-c", shell])
    assert not local.submit(made).failed
    found = {made.log(i).read_text().strip() for i in range(4)}
    alone = len(expected) < 2  # one process has every core, and sees what was visible before
    assert found == ({f"{visible or ''}/"} if alone else {f"{gpu}/{8 // len(expected)}" for gpu in expected})


@pytest.mark.parametrize("device,at_once", [("cuda", 2), ("cuda:1", 1), ("cpu", 2)])
def test_a_sweep_gives_no_other_gpu_to_a_policy_that_names_one(tmp_path, monkeypatch, device, at_once):
    monkeypatch.setattr(environment, "find_gpus", lambda: [{"index": str(i), "uuid": str(i)} for i in range(2)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("qlibero.launch.sweep.refuse_impossible", lambda *_: None)  # no GPU is really here
    sets = f"policy.device={device}", "launch.processes=auto"
    made = run_sweep(sweep_of(tmp_path, GRID, *sets), "local", tmp_path / "out", True)
    assert made.dry_run and made.dry_run.startswith(f"# {at_once} at a time")


@pytest.mark.parametrize(
    "gpus,sets,expected",
    [
        (2, ["policy.device=cuda"], 2),
        (2, ["policy.device=auto"], 2),
        (2, ["policy.device=cuda:1"], 1),
        (2, ["policy.device=cpu"], 1),
        (2, ["policy.device=cuda", "launch.processes=1"], 1),
        (0, ["policy.device=cpu", "launch.processes=3"], 3),
        (0, ["policy.device=auto"], 1),
        (4, ["policy.device=cuda", "stop={}"], 1),
        (4, ["policy.device=cuda", "tasks=[0]", "episodes_per_task=3"], 3),
        (4, ["policy.device=cuda", "tasks=[0]", "episodes_per_task=1"], 1),
    ],
)
def test_a_run_is_spread_over_the_gpus_that_its_policy_may_use(tmp_path, monkeypatch, gpus, sets, expected):
    monkeypatch.setattr(environment, "find_gpus", lambda: [{"index": str(i), "uuid": str(i)} for i in range(gpus)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    asked = []

    def alone(*_: object, **__: object) -> dict:
        asked.append(1)
        return {}

    def spread(made: engine.Submission, _: object) -> dict[int, local.Failed]:
        asked.append(made.launch.processes)
        shards = cells.read_manifest(made.manifest).shards
        assert [(s.index, s.count) for s in shards] == [(i, len(shards)) for i in range(len(made.indices))]
        return {0: local.Failed(3, "said by it")}

    monkeypatch.setattr(here, "run_experiment", alone)
    monkeypatch.setattr(here, "run_shards", spread)
    (cell,) = sweep_of(tmp_path, GRID.partition("grid:")[0], "tracking=[]", *sets).cells
    with suppress(GuardRefusal):
        here.run_here(cell.experiment, tmp_path / "out", print, print, print)
    assert asked == [expected]


@pytest.mark.parametrize("status,error", [(1, WorkFailed), (2, UserError), (3, GuardRefusal), (-9, WorkFailed)])
def test_what_stops_a_process_of_a_run_is_the_runs_own_error(tmp_path, monkeypatch, status, error):
    monkeypatch.setattr(here, "run_shards", lambda *_: {1: local.Failed(status, "said by it")})
    sets = "tracking=[]", "launch.processes=2", "policy.device=cpu"
    (cell,) = sweep_of(tmp_path, GRID.partition("grid:")[0], *sets).cells
    with pytest.raises(error, match="said by it"):
        here.run_here(cell.experiment, tmp_path / "out", print, print, print)


@pytest.mark.parametrize("done", [range(0), range(25), range(20, 45), range(1, 50, 2), range(46)])
def test_what_is_missing_is_spread_over_all_processes(tmp_path, monkeypatch, done):
    """Half a run by one process is a whole half: cut as before, it would leave half of the GPUs without work."""
    (cell,) = sweep_of(tmp_path, GRID.partition("grid:")[0], "tracking=[]", "launch.processes=4").cells
    run = cells.spread_over(cell.experiment, tmp_path / "out", 1).cells[0]
    keys = episode_keys(run.experiment)
    fill(run, [keys[place] for place in done])

    def spread(made: engine.Submission, _: object) -> dict[int, local.Failed]:
        manifest = cells.read_manifest(made.manifest)
        parts = [episode_keys(run.experiment, (s.index, s.count)) for s in manifest.shards]
        assert sum(parts, []) == keys
        lacking = [[key for key in part if keys.index(key) not in done] for part in parts]
        assert made.indices == tuple(i for i, part in enumerate(lacking) if part)
        assert len(made.indices) >= 4 and max(map(len, lacking)) <= max(1, 1.25 * (50 - len(done)) / 4)
        return {0: local.Failed(3, "enough")}

    monkeypatch.setattr(here, "run_shards", spread)
    with pytest.raises(GuardRefusal, match="enough"):
        here.run_here(run.experiment, run.run_dir, print, print, print)


def test_an_episode_in_error_does_not_hide_that_a_process_died(tmp_path, monkeypatch):
    (cell,) = sweep_of(tmp_path, GRID.partition("grid:")[0], "tracking=[]", "launch.processes=2").cells
    run = cells.spread_over(cell.experiment, tmp_path / "out", 2).cells[0]
    keys = episode_keys(run.experiment)

    def ended(some) -> None:
        fill(run, some, error="the simulator died")
        failed = {0: local.Failed(1, "some episodes ended in an error"), 1: local.Failed(1, "out of memory")}
        monkeypatch.setattr(here, "run_shards", lambda *_: failed)
        here.run_here(run.experiment, run.run_dir, print, print, lambda run_dir: None)

    with pytest.raises(WorkFailed, match="some episodes ended in an error\nout of memory"):
        ended(keys[:3])
    ended(keys)  # then each is an error, and the document says so


@pytest.mark.parametrize("videos,shard,expected", [("all", (1, 2), 50), ("all", (0, 1), 100), (2, (0, 2), 100)])
def test_of_all_videos_each_shard_replays_its_own(tmp_path, videos, shard, expected):
    (cell,) = sweep_of(tmp_path, GRID.partition("grid:")[0], f"videos={videos}").cells
    run = cells.spread_over(cell.experiment, tmp_path / "out", 2).cells[0]
    fill(run, episode_keys(run.experiment))
    found = _recorded_before(run.experiment, run.run_dir, shard)
    assert len(found) == expected
    assert expected == 100 or {record.key for record in found} == set(episode_keys(run.experiment, shard))


@pytest.mark.parametrize("first,second", [("000of001", 2), ("001of002", 3), ("001of002", 1)])
def test_a_second_start_with_another_number_of_processes_does_not_run_everything_twice(tmp_path, first, second):
    sets = "tracking=[]", f"launch.processes={second}"
    (cell,) = sweep_of(tmp_path, GRID.partition("grid:")[0], *sets).cells
    arm, out = cell.experiment.arms()[0], tmp_path / "out"
    with Ledger(out, arm.name, shard=first, config_hash=config_hash(cell.experiment, arm)):
        with pytest.raises(GuardRefusal, match=f"out is being written by process {os.getpid()} on .*; wait for it"):
            here.run_here(cell.experiment, out, print, print, print)
    assert not (out / "sweep").exists()


def test_episodes_of_several_processes_are_counted_on_and_announced_once(tmp_path, monkeypatch):
    (cell,) = sweep_of(tmp_path, GRID.partition("grid:")[0], "tracking=[]", "launch.processes=2").cells
    run = cells.spread_over(cell.experiment, tmp_path / "out", 2).cells[0]
    announced: list[str] = []
    seen: list[EpisodeRecord] = []

    def spread(_: engine.Submission, meanwhile) -> dict[int, local.Failed]:
        for key in episode_keys(run.experiment)[:2]:
            fill(run, [key], arms=("baseline",))
            meanwhile()
        return {0: local.Failed(3, "enough")}

    monkeypatch.setattr(here, "run_shards", spread)
    with heard_by(lambda what, *_: announced.append(what)), pytest.raises(GuardRefusal, match="enough"):
        here.run_here(run.experiment, run.run_dir, print, seen.append, print)
    assert [record.key for record in seen] == episode_keys(run.experiment)[:2]
    assert announced.count("episodes") == 1


def test_killed_local_launcher_leaves_no_process(tmp_path, monkeypatch):
    made = submission(tmp_path, monkeypatch, 2)
    script = (
        "import sys; from pathlib import Path; from qlibero.config.launch import Launch\n"
        "from qlibero.launch import engine, local\n"
        f"engine.program = lambda: [sys.executable, {light_shard.__file__!r}]\n"
        "local.submit(engine.Submission('drill', Path(sys.argv[1]), (0, 1), Launch(processes=2)))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    deadline = time.monotonic() + 60
    while not all(light_shard.rows(tmp_path, i) for i in made.indices) and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int((tmp_path / f"pid-{i}").read_text()) for i in made.indices]
    launcher.kill()
    launcher.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_dry_runs_of_all_engines_name_every_shard(tmp_path):
    made = engine.Submission("n", tmp_path, (0, 3), Launch(processes=2))
    for module in (local, ray):
        text = module.describe(made)
        assert text.count("run-shard --manifest") == 3 and "--index 3" in text and "--merge" in text
    assert "--array=0,3\n" in slurm.describe(made)


def test_full_disk_is_named_though_no_log_can_say_so(tmp_path, monkeypatch, said):
    made = submission(tmp_path, monkeypatch, 1)
    monkeypatch.setattr(engine.Submission, "shard_command", lambda self, i: ["sh", "-c", "exit 1"])
    monkeypatch.setattr(local.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
    assert local.submit(made).failed == (0,)
    assert "is full" in said[0] and "same command again" in said[0]


def test_merge_on_a_full_disk_names_the_file_and_leaves_no_half_of_it(tmp_path, monkeypatch):
    made = sweep_of(tmp_path, GRID, "tracking=[]")
    manifest = cells.make_manifest(made, tmp_path / "out")
    cells.write_manifest(manifest)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkFailed, match="result.json: the disk is full"):
        cells.merge(manifest)
    assert [path.name for path in (tmp_path / "out/sweep").glob("*result*")] == []


def test_the_thousandth_submission_is_the_last_one(tmp_path):
    """As text, 1000 comes before 999."""
    made = [cells.write_manifest(cells.make_manifest(sweep_of(tmp_path), tmp_path / "out"))]
    made[0].rename(made[0].with_name("submission-999"))
    again = cells.make_manifest(sweep_of(tmp_path, GRID, "launch.shard_episodes=5"), tmp_path / "out")
    assert cells.write_manifest(again).name == "submission-1000"
    assert cells.latest_manifest(tmp_path / "out").shards == again.shards
