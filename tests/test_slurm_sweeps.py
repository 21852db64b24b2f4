"""Risk: a cluster sweep loses, doubles or changes episodes if tasks are killed, requeued, preempted or a node dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import light_shard
import pytest
import slurm_cluster
from slurm_cluster import kill, queue, wait_for

from qlibero.config.config_hash import config_hash
from qlibero.config.launch import Launch
from qlibero.config.load import load_experiment
from qlibero.launch import cells, engine, slurm
from qlibero.places import REPOSITORY
from qlibero.results.ledger import read_ledger

pytestmark = pytest.mark.libero

SMALL = """
extends: {untrained}
suite: libero_object
tasks: [0]
episodes_per_task: 2
max_steps: 10
workers: 1
videos: 0
backends: [baseline]
tracking: []
launch:
  shard_episodes: 1
  slurm: {{partition: gpu, gres: gpu:1, time: "00:30:00", cpus_per_task: 2, setup: ["export LAB=yes"]}}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    assert not slurm_cluster.missing_programs(), "no Slurm here: scripts/setup.sh --test installs it"
    with slurm_cluster.slurm(tmp_path_factory.mktemp("slurm")) as directory:
        yield directory


def light(tmp_path: Path, monkeypatch, name: str, shards: int, **options) -> engine.Submission:
    monkeypatch.setattr(engine, "program", lambda: [sys.executable, light_shard.__file__])
    directory = tmp_path / "sweep" / name
    (directory / "logs").mkdir(parents=True)
    manifest = {"schema": 1, "sweep": name, "cells": [], "shards": [["cell", i, shards] for i in range(shards)]}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    launch = Launch(slurm={"partition": "gpu", "cpus_per_task": 1, "time": "00:10:00", "gres": "gpu:1", **options})
    return engine.Submission(name, directory, tuple(range(shards)), launch)


def done(submission: engine.Submission, index: int) -> int:
    return len(light_shard.rows(submission.directory, index))


def assert_all_once(submission: engine.Submission) -> None:
    for index in submission.indices:
        assert light_shard.rows(submission.directory, index) == list(range(light_shard.ROWS)), index


def test_tasks_come_back_after_requeue_preemption_and_the_death_of_a_node(cluster, tmp_path, monkeypatch):
    submission = light(tmp_path, monkeypatch, "submission-001", 4)
    array, merge = slurm.submit(submission).jobs
    wait_for(lambda: all(done(submission, i) >= 2 for i in range(4)), 60)
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{array}_0"], check=True)  # the time limit is near
    urgent = [
        "sbatch",
        "--partition=urgent",
        "--nodelist=n1",
        "--cpus-per-task=3",
        "--gres=gpu:2",
        "--time=1",
        "--output=/dev/null",
        "--wrap=sleep 3",
    ]
    subprocess.run(urgent, check=True, capture_output=True)  # takes the place of what runs on n1
    wait_for(lambda: "start 1" in (submission.log(0)).read_text(), 60)

    kill(cluster / "slurmd.n2.pid", signal.SIGKILL)  # the node dies, with everything on it
    fallen = [
        pid
        for pid in processes()
        if f"{cluster}/slurm.conf" in environment(pid) and "SLURMD_NODENAME=n2\0" in environment(pid)
    ]
    steps = {parent(pid) for pid in fallen if "slurmstepd" in read(f"/proc/{parent(pid)}/comm")}
    assert len(fallen) >= 4 and len(steps) == 2
    for pid in (*steps, *fallen):  # the step first: it must not live to report how its task ended
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not queue(), 150)
    slurm_cluster.start_node("n2")
    assert_all_once(submission)
    assert (submission.directory / "merged").exists()
    logs = [submission.log(i).read_text() for i in range(4)]
    assert "requeued at" in logs[0]
    assert sum("start 1" in log for log in logs) >= 3  # requeued, preempted, and from the dead node
    gpus = {
        json.loads(line)["gpu"]
        for path in submission.directory.glob("rows-*")
        for line in path.read_text().splitlines()
    }
    assert gpus <= {"0", "1"}


def test_shard_that_is_longer_than_the_time_limit_comes_back(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(light_shard, "ROWS", 110)
    monkeypatch.setenv("LIGHT_ROWS", "110")  # 33 s and more; Slurm warns after about 27 s of its minute
    submission = light(tmp_path, monkeypatch, "submission-001", 1, time="1", signal_s=30)
    slurm.submit(submission)
    wait_for(lambda: not queue(), 150)
    assert_all_once(submission)
    log = submission.log(0).read_text()
    assert "requeued at" in log and "start 1" in log


def test_sweep_again_submits_only_what_is_missing_and_not_under_way(cluster, tmp_path, monkeypatch):
    wait_for(
        lambda: subprocess.check_output(["sinfo", "-h", "-o", "%t"], text=True).split() in (["idle"], ["idle", "idle"]),
        60,
    )
    submission = light(tmp_path, monkeypatch, "submission-001", 3)
    slurm.submit(submission)
    wait_for(lambda: all(done(submission, i) >= 1 for i in range(3)), 60)
    live = slurm.live_shards(tmp_path)
    assert live == {cells.Shard("cell", i, 3): "RUNNING" for i in range(3)}
    os.kill(int((submission.directory / "pid-1").read_text()), signal.SIGKILL)
    wait_for(lambda: cells.Shard("cell", 1, 3) not in slurm.live_shards(tmp_path), 30)
    assert done(submission, 1) < light_shard.ROWS  # a task that failed is not run again by itself …
    wait_for(lambda: not queue(), 60)
    assert slurm.live_shards(tmp_path) == {}
    again = engine.Submission("again", submission.directory, (1,), submission.launch)
    slurm.submit(again)  # … but by the next submission, which continues it
    wait_for(lambda: not queue(), 60)
    assert_all_once(submission)


def test_real_sweep_on_slurm_equals_the_local_run(cluster, tmp_path):
    repository = Path(__file__).parents[1]
    config = tmp_path / "small.yaml"
    config.write_text(SMALL.format(untrained=repository / "configs/policies/untrained.yaml"))
    out = tmp_path / "out"
    first = qlibero("sweep", config, "--out", out, "--engine", "slurm")
    assert first["submitted"] == {"count": 2, "shards": "0-1"} and len(first["jobs"]) == 2 and not first["finished"]
    second = qlibero("sweep", config, "--out", out, "--engine", "slurm")
    assert second["submitted"]["count"] == 0 and second["under_way"] == 2
    assert sum(qlibero("status", out)["queue"].values()) == 2
    wait_for(lambda: not queue(), 400)
    log = "".join(path.read_text() for path in sorted((out / "sweep" / "submission-001" / "logs").iterdir()))
    found = qlibero("status", out)
    assert found["complete"] and found["done"] == found["episodes"] == 2 and found["queue"] == {}, log
    assert json.loads((out / "sweep" / "result.json").read_text())["complete"], log
    # one file per shard; the attempt in its name counts over both, which may have begun together
    files = [path.name.split("-")[1] for path in (out / "baseline").glob("episodes-*.jsonl")]
    assert sorted(files) == ["000of002", "001of002"], log
    third = qlibero("sweep", config, "--out", out, "--engine", "slurm")
    assert third["complete"] and third["submitted"]["count"] == 0

    qlibero("run", config, "--out", tmp_path / "local")
    assert content(out) == content(tmp_path / "local")


def content(run_dir: Path) -> list[tuple]:
    return [(r.key, r.outcome, r.steps, r.fingerprint, r.action_digest) for r in read_ledger(run_dir, "baseline")]


def qlibero(*arguments) -> dict:
    command = [sys.executable, "-m", "qlibero.cli", *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


def processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def parent(pid: int) -> int:
    return int(read(f"/proc/{pid}/stat").rpartition(")")[2].split()[1])


def environment(pid: int) -> str:
    return read(f"/proc/{pid}/environ")


def read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def test_a_configuration_has_one_hash_inside_and_outside_a_container():
    """A sweep's experiments name the checkout's absolute paths; the container's own checkout lies elsewhere."""
    experiment = load_experiment(REPOSITORY / "configs/experiments/llm_w4a8_fake.yaml", environ={})
    text = experiment.model_dump_json().replace(str(REPOSITORY), "/qlibero")
    inside = type(experiment).model_validate_json(text)
    assert "/qlibero/" in text and inside != experiment
    assert config_hash(inside, inside.arms()[1]) == config_hash(experiment, experiment.arms()[1])


def test_scripts_say_what_was_asked_for(tmp_path):
    launch = Launch(
        slurm={
            "partition": "h100",
            "account": "vla",
            "qos": "long",
            "gres": "gpu:1",
            "time": "1-00:00:00",
            "cpus_per_task": 12,
            "mem": "48G",
            "array_limit": 5,
            "signal_s": 90,
            "setup": ["module load cuda", "source venv/bin/activate"],
            "container": "apptainer exec --nv q.sif",
            "extra": ["--constraint=h100"],
        }
    )
    submission = engine.Submission("nightly", tmp_path / "s p", (0, 1, 2, 5), launch)
    (part,) = slurm.arrays(submission)
    script = slurm.array_script(submission, part)
    for line in (
        "--job-name=nightly",
        "--array=0-2,5%5",
        "--partition=h100",
        "--account=vla",
        "--qos=long",
        "--gres=gpu:1",
        "--time=1-00:00:00",
        "--cpus-per-task=12",
        "--mem=48G",
        "--signal=B:USR1@90",
        "--requeue",
        "--open-mode=append",
        "--constraint=h100",
    ):
        assert f"#SBATCH {line}\n" in script
    assert "{ module load cuda\n} ||" in script and "{ source venv/bin/activate\n} ||" in script
    command = f"apptainer exec --nv q.sif qlibero run-shard --manifest '{tmp_path}/s p/manifest.json' --index"
    assert command in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    merge = slurm.merge_script(submission)
    assert "--dependency=afterany:" in slurm.describe(submission) and "--partition=h100\n" in merge
    assert not [option for option in ("--gres", "--constraint", "--mem", "--cpus") if option in merge]
