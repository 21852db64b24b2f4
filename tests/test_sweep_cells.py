"""Risk: a sweep runs cells twice, misses some, or spends a night on cells that could never have worked."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import light_shard
import numpy as np
import pytest

from qlibero.config.schema import Launch, config_hash
from qlibero.config.sweep import load_sweep
from qlibero.errors import GuardRefusal, UserError, WorkFailed
from qlibero.experiment import episode_keys
from qlibero.launch import cells, engine, local, ray, slurm
from qlibero.launch.plan import plan, refuse_impossible, seconds
from qlibero.launch.status import headline, status
from qlibero.launch.sweep import run_sweep
from qlibero.results.ledger import Ledger
from qlibero.results.records import EpisodeRecord
from qlibero.results.statistics import minimum_detectable_difference

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


def fill(cell: cells.Cell, keys, arms=("baseline", "fake"), minute: int = 0) -> None:
    """Episodes of 2 s of simulator and 1 s of policy, one a minute."""
    for arm in cell.experiment.arms():
        if arm.name in arms:
            with Ledger(cell.run_dir, arm.name, config_hash=config_hash(cell.experiment, arm)) as ledger:
                for i, key in enumerate(keys):
                    ledger.append(
                        EpisodeRecord(
                            suite=key.suite, task=key.task, init=key.init, seed=key.seed, arm=arm.name, outcome="failure",
                            steps=300, replans=2, fingerprint="f", action_digest="a", sim_ms=1500.0, render_ms=500.0,
                            policy_ms=[500.0, 500.0], finished_at=f"2026-11-23T10:{minute + i:02d}:00+00:00",
                        ), np.zeros((1, 10), np.float32),
                    )  # fmt: skip
    (cell.run_dir / "experiment.yaml").write_text(cells.dump_resolved(cell.experiment))


def test_shards_hold_every_episode_of_every_cell_once(tmp_path):
    manifest = cells.make_manifest(sweep_of(tmp_path), tmp_path / "out")
    assert [cell.id for cell in manifest.cells] == [
        "seed-7.activation_bits-8", "seed-7.activation_bits-4", "seed-8.activation_bits-8", "w4a16",
    ]  # fmt: skip
    assert manifest == cells.make_manifest(sweep_of(tmp_path), tmp_path / "out")
    for cell in manifest.cells:
        parts = [episode_keys(cell.experiment, (s.index, s.count)) for s in manifest.shards if s.cell == cell.id]
        assert len(parts) == 3 and sorted(sum(parts, [])) == sorted(episode_keys(cell.experiment))
    again = cells.read_manifest(cells.write_manifest(manifest) / "manifest.json")
    assert again == manifest


def test_only_shards_that_lack_something_are_submitted(tmp_path):
    manifest = cells.make_manifest(sweep_of(tmp_path), tmp_path / "out")
    assert manifest.missing() == tuple(range(12))
    first = manifest.cells[0]
    fill(first, episode_keys(first.experiment, (1, 3)))
    fill(first, episode_keys(first.experiment, (2, 3)), arms=("baseline",))
    assert manifest.missing() == (0, *range(2, 12))   # shard 2 lacks its other arm
    before = sorted((tmp_path / "out").rglob("*"))
    said: list[str] = []
    document = run_sweep(sweep_of(tmp_path), "slurm", tmp_path / "out", True, said.append)
    assert document["submitted"] == [0, *range(2, 12)] and "--array=0,2-11\n" in document["dry_run"]
    assert sorted((tmp_path / "out").rglob("*")) == before   # a dry run writes nothing


def test_impossible_cells_are_refused_before_anything_is_spent(tmp_path):
    def manifest(*sets: str) -> cells.Manifest:
        return cells.make_manifest(sweep_of(tmp_path, GRID, *sets), tmp_path / "none")

    refuse_impossible(manifest(), "local")
    with pytest.raises(UserError, match=r"4 of 4 cells cannot run on engine local:\n  seed-7.*\n?.*arm triton_w4a8: triton_w4a8 on cpu"):
        refuse_impossible(manifest("backends=[baseline, triton_w4a8]", "policy.device=cpu"), "local")
    with pytest.raises(UserError, match="2000 simulator workers need 5000 GB"):
        refuse_impossible(manifest("workers=2000"), "local")
    with pytest.raises(UserError, match="launch.slurm.time 2 is not longer than launch.slurm.signal_s 120"):
        refuse_impossible(manifest("launch.slurm.time='2'"), "slurm")
    with pytest.raises(UserError, match="5 GB, slurm has 4 GB"):
        refuse_impossible(manifest("workers=2", "launch.slurm.mem=4G"), "slurm")
    made = manifest()
    fill(made.cells[0], episode_keys(made.cells[0].experiment)[:1])
    with pytest.raises(GuardRefusal, match="holds episodes of another configuration"):
        manifest("max_steps=9")


def test_plan_says_what_it_costs_and_what_it_can_find(tmp_path, monkeypatch):
    monkeypatch.setattr("qlibero.launch.plan.RUNS", tmp_path / "no-other-runs")
    made = cells.make_manifest(sweep_of(tmp_path), tmp_path / "out")
    assert plan(made, print)["engines"] is None   # nothing like it has been run: no time is made up
    fill(made.cells[0], episode_keys(made.cells[0].experiment))
    found = plan(made, print)
    assert (found["episodes"], found["done"], found["without_cost"]) == (400, 100, 0)
    assert found["cells"][1]["seconds_each"] == {"baseline": 3.0, "fake": 3.0}   # another cell's cost: same policy and backend
    expected = minimum_detectable_difference(50, 0.05)
    assert found["cells"][1]["detectable_difference"] == (expected and pytest.approx(expected, abs=1e-4))
    assert found["cells"][1]["discordance"] == "5.0% assumed"
    # 300 episodes are missing: 2 s on 4 cores and 1 s of policy (one at a time on a CPU) = 1.5 s each, on 9 shards at once
    slurm_cost = found["engines"]["slurm"]
    assert slurm_cost["gpu_h"] == pytest.approx(300 * 1.5 * 2 / 3600, abs=1e-3)
    assert slurm_cost["wall_h"] == pytest.approx(34 * 1.5 / 3600, abs=1e-3)
    assert [seconds(t) for t in ("30", "01:00:00", "2-01", "1-00:00:30", "10:30")] == [1800, 3600, 176400, 86430, 630]


def test_status_counts_files_not_promises(tmp_path):
    manifest = cells.make_manifest(sweep_of(tmp_path), tmp_path / "out")
    cells.write_manifest(manifest)
    fill(manifest.cells[0], episode_keys(manifest.cells[0].experiment, (0, 3)))
    found = status(tmp_path / "out")
    assert (found["done"], found["episodes"], found["shards_done"], found["shards"]) == (32, 400, 1, 12)   # the first 16 of 50 scenes, two arms
    assert found["episodes_per_hour"] == pytest.approx(31 / 15 * 60, abs=0.1)   # two arms, one episode a minute each
    assert headline(found).startswith("32 of 400 episodes, 1 of 12 shards, 124 episodes/h, done about 20")
    with pytest.raises(UserError, match="neither a sweep"):
        status(tmp_path)


def test_merge_that_was_killed_is_done_by_the_next_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr("qlibero.launch.slurm._notes", lambda directory: [])
    made = sweep_of(tmp_path, GRID, "tracking=[]")
    manifest = cells.make_manifest(made, tmp_path / "out")
    cells.write_manifest(manifest)
    for cell in manifest.cells:
        fill(cell, episode_keys(cell.experiment))
    assert not cells.merged(manifest)
    (tmp_path / "out/sweep/result.json").write_text(json.dumps(cells.result(manifest) | {"mirrors": {"seed-7": {"wandb": "ended with status 1"}}}))
    assert not cells.merged(manifest)   # as good as killed for who waits for wandb's rows
    said: list[str] = []
    assert run_sweep(made, "local", tmp_path / "out", False, said.append)["complete"]
    assert cells.merged(manifest) and len(said) == 1 and "merge" in said[0]
    assert run_sweep(made, "local", tmp_path / "out", False, said.append)["submitted"] == [] and len(said) == 1


# ------------------------------------------------------------------------------------------------ the local engine
def submission(tmp_path: Path, monkeypatch, shards: int) -> engine.Submission:
    monkeypatch.setattr(engine, "program", lambda: [sys.executable, light_shard.__file__])
    (tmp_path / "logs").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    return engine.Submission("drill", tmp_path, tuple(range(shards)), Launch(processes=2))


def test_local_shard_that_is_killed_is_started_again_and_one_that_fails_is_named(tmp_path, monkeypatch):
    made = submission(tmp_path, monkeypatch, 2)
    commands = made.shard_command
    monkeypatch.setattr(engine.Submission, "shard_command", lambda self, i: commands(i) if i == 0 else ["sh", "-c", "echo 'qlibero: no such thing'; exit 2"])
    import threading

    def hurt() -> None:
        while not light_shard.rows(tmp_path, 0):
            time.sleep(0.05)
        os.kill(int((tmp_path / "pid-0").read_text()), signal.SIGKILL)

    threading.Thread(target=hurt, daemon=True).start()
    said: list[str] = []
    submitted = local.submit(made, said.append)
    assert submitted.finished and submitted.failed == (1,)
    assert light_shard.rows(tmp_path, 0) == list(range(light_shard.ROWS)) and (tmp_path / "merged").exists()
    assert "shard 0 was killed by SIGKILL: starting it again" in said
    assert any("shard 1 ended with status 2" in line and "no such thing" in line for line in said)


def test_killed_local_launcher_leaves_no_process(tmp_path, monkeypatch):
    made = submission(tmp_path, monkeypatch, 2)
    script = (
        "import sys; from pathlib import Path; from qlibero.config.schema import Launch\n"
        "from qlibero.launch import engine, local\n"
        f"engine.program = lambda: [sys.executable, {light_shard.__file__!r}]\n"
        "local.submit(engine.Submission('drill', Path(sys.argv[1]), (0, 1), Launch(processes=2)), print)"
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


def test_full_disk_is_named_though_no_log_can_say_so(tmp_path, monkeypatch):
    made = submission(tmp_path, monkeypatch, 1)
    monkeypatch.setattr(engine.Submission, "shard_command", lambda self, i: ["sh", "-c", "exit 1"])
    monkeypatch.setattr(local.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
    said: list[str] = []
    assert local.submit(made, said.append).failed == (0,)
    assert "is full" in said[0] and "same command again" in said[0]


def test_merge_on_a_full_disk_names_the_file_and_leaves_no_half_of_it(tmp_path, monkeypatch):
    made = sweep_of(tmp_path, GRID, "tracking=[]")
    manifest = cells.make_manifest(made, tmp_path / "out")
    cells.write_manifest(manifest)

    def full(self: Path, text: str) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(WorkFailed, match="result.json: the disk is full"):
        cells.merge(manifest, print)
    assert [path.name for path in (tmp_path / "out/sweep").glob("*result*")] == []
