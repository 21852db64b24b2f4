"""The same experiment must leave the same records however it ran: workers, order, shards, crashes (contracts 1, 2, 5).

Real LIBERO, real processes, equality of fingerprints, action digests and outcomes. The policy is untrained: what it
does is of no interest here, only that it does the same thing every time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qlibero.results.ledger import read_ledger, read_trajectory

pytestmark = pytest.mark.libero

ARMS = ("baseline", "fake")


def qlibero(*arguments: object, **popen) -> subprocess.Popen:
    command = [sys.executable, "-m", "qlibero.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)


def run(config: Path, out: Path, *sets: str) -> dict:
    process = qlibero("run", config, "--out", out, *(x for s in sets for x in ("--set", s)))
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1])


def records(run_dir: Path) -> dict:
    """What must be equal between runs, by arm and key."""
    return {
        (arm, record.key): (record.fingerprint, record.action_digest, record.outcome, record.steps)
        for arm in ARMS
        for record in read_ledger(run_dir, arm)
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_experiment: Path) -> Path:
    out = tmp_path_factory.mktemp("one_worker")
    assert run(tiny_experiment, out, "workers=1", "videos=0")["complete"]
    return out


@pytest.fixture(scope="module")
def reference(undisturbed: Path) -> dict:
    found = records(undisturbed)
    assert len(found) == 12 and len({value[1] for value in found.values()}) > 1
    every = [record for arm in ARMS for record in read_ledger(undisturbed, arm)]
    assert all(
        record.batch_sizes == [1] * record.replans and record.wall_s * 1e3 > sum(record.policy_ms) for record in every
    )
    return found


def test_two_workers_equal_one(tmp_path, tiny_experiment, reference):
    run(tiny_experiment, tmp_path, "workers=2")
    assert records(tmp_path) == reference


def test_another_order_and_three_shards_equal_one_process(tmp_path, tiny_experiment, reference):
    from qlibero.config.load import load_experiment
    from qlibero.run.experiment import run_experiment

    experiment = load_experiment(tiny_experiment, ["tasks=[1,0]", "backends=[fake,baseline]", "tracking.mode=disabled"])
    for shard in (2, 0, 1):
        run_experiment(experiment, tmp_path, shard=(shard, 3))
    assert records(tmp_path) == reference


def test_five_sigkills_at_random_moments_lose_nothing_and_change_nothing(tmp_path, tiny_experiment, reference):
    moments = random.Random(20261123)
    for processes in (1, 2, 1, 2, 1):  # the ledger goes on whoever wrote it
        sets = ("--set", f"launch.processes={processes}")
        process = qlibero("run", tiny_experiment, "--out", tmp_path, *sets, start_new_session=True)
        time.sleep(moments.uniform(4, 14))
        if processes == 1:
            process.send_signal(signal.SIGKILL)
        else:
            os.killpg(process.pid, signal.SIGKILL)  # the death of a machine: nobody is left to end anything
        process.wait()
    done = records(tmp_path)
    assert done.items() <= reference.items()
    document = run(tiny_experiment, tmp_path, "launch.processes=2")
    assert document["complete"] and document["arms"]["fake"]["episodes"] == 6
    assert records(tmp_path) == reference
    assert len(list((tmp_path / "baseline").glob("episodes-00?of002-*.jsonl"))) >= 2


def test_a_complete_run_is_shown_without_running_anything(tmp_path, tiny_experiment, reference):
    run(tiny_experiment, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("episodes-*.jsonl")}
    started = time.monotonic()
    assert run(tiny_experiment, tmp_path)["complete"]
    assert time.monotonic() - started < 5, "a complete run must not load a policy or a simulator"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("episodes-*.jsonl")} == before


def test_videos_afterwards_replay_the_very_episodes(undisturbed, reference):
    for expected in (len(ARMS), 0):  # what has a video already stays
        process = qlibero("videos", undisturbed, "--episodes", 1)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert len(json.loads(stdout.splitlines()[-1])["videos"]) == expected
    assert all(len(list((undisturbed / arm / "videos").glob("*.mp4"))) == 1 for arm in ARMS)
    assert records(undisturbed) == reference


def test_a_probe_along_a_run_asks_what_the_run_asked(undisturbed, tiny_experiment):
    """The arm of the run, asked again along the baseline's episodes: as many calls as were made, of the same scenes."""
    process = qlibero("probe", tiny_experiment, "--run", undisturbed, "--episodes", 2)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    document = json.loads(stdout.splitlines()[-1])
    baseline = sorted(read_ledger(undisturbed, "baseline"), key=lambda record: record.key)
    asked = [baseline[0], baseline[-1]]  # spread over all
    assert document["observations"] == sum(record.replans for record in asked)
    (fake,) = document["arms"]
    of = document["episodes"]
    assert sorted(set(of)) == sorted(str(record.key) for record in asked)
    assert set(fake["phases"]) == {"start", "middle", "end"} and fake["flipped"] == 0
    # where both arms answered the same first observation, their recorded actions differ by as much as the probe says
    other = {record.key: record for record in read_ledger(undisturbed, "fake")}
    changes = [
        read_trajectory(undisturbed, other[record.key])[:5, :6] - read_trajectory(undisturbed, record)[:5, :6]
        for record in asked
    ]
    assert [fake["errors"][of.index(str(record.key))] for record in asked] == pytest.approx(
        [float(np.sqrt(np.mean(change.astype(float) ** 2))) for change in changes], rel=1e-4
    )
