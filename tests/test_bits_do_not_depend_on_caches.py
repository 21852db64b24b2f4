"""Risk: bits that hang on a cache, a core, a shard or a crash: two policies under one name (contracts 1 and 5).

The rows below cover every pair of conditions that can be had on one machine; all of them must leave equal records. The
first row is the very first process of a checkout: nothing compiled, nothing calibrated, nothing remembered.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlibero.places import CHECKOUT
from qlibero.results.ledger import read_ledger

ARMS = ("baseline", "fake")
SETS = ("tasks=[0]", "episodes_per_task=4", "max_steps=10", "tracking=[]", "videos=0")
# caches, workers, cores, shards, killed
ROWS = [
    ("cold", 1, 1, 1, False),
    ("warm", 4, 2, 2, False),
    ("cold", 4, 2, 1, True),
    ("read-only", 1, 2, 2, False),
    ("warm", 1, 1, 1, True),
]
SHARD = """
import sys
from pathlib import Path
from qlibero.config.load import load_experiment
from qlibero.experiment import run_experiment
config, out, index, count, *sets = sys.argv[1:]
run_experiment(load_experiment(Path(config), sets), Path(out), (int(index), int(count)))
"""


def caches(place: Path) -> dict[str, str]:
    names = ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "QLIBERO_HOME")
    return {name: str(place / name.lower()) for name in names}


def start(config: Path, out: Path, kind: str, place: Path, workers: int, cores: int, shard: tuple[int, int]):
    environment = {**os.environ, **caches(place)}
    command = [sys.executable, "-c", SHARD, config, out, *shard, *SETS, f"workers={workers}"]
    text = shlex.join(
        ["taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores])), *map(str, command)]
    )
    if kind == "read-only":  # as in a container image: nothing can be cached beside the source
        environment.pop("NUMBA_CACHE_DIR")
        text = f"mount --bind {CHECKOUT} {CHECKOUT} && mount -o remount,ro,bind {CHECKOUT} && {text}"
        return subprocess.Popen(["unshare", "-m", "bash", "-c", text], env=environment, cwd="/", start_new_session=True)
    return subprocess.Popen(["bash", "-c", f"exec {text}"], env=environment, start_new_session=True)


def records(out: Path) -> dict:
    return {
        (arm, r.key): (r.fingerprint, r.action_digest, r.outcome, r.steps, r.identity, r.probe, r.machine, r.kernels)
        for arm in ARMS
        for r in read_ledger(out, arm)
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_experiment) -> tuple[Path, dict]:
    place = tmp_path_factory.mktemp("first")
    return place, leave_records(ROWS[0], tiny_experiment, place, place)


def leave_records(row, config: Path, out: Path, place: Path) -> dict:
    kind, workers, cores, shards, killed = row
    out = out / "run"
    if killed:
        process = start(config, out, kind, place, workers, cores, (0, 1))
        deadline = time.monotonic() + 300
        while not any(b"\n" in path.read_bytes() for path in out.glob("*/episodes-*")):
            assert time.monotonic() < deadline and process.poll() is None, "no episode before the kill"
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert 0 < len(records(out)) < 8
    for index in range(shards):
        assert start(config, out, kind, place, workers, cores, (index, shards)).wait(timeout=300) == 0
    return records(out)


@pytest.mark.parametrize("row", ROWS[1:], ids=lambda row: "-".join(map(str, row)))
def test_records_are_equal_however_cold_narrow_split_or_interrupted(row, first, tiny_experiment, tmp_path):
    place, expected = first
    assert len(expected) == 8 and len({probe for *_, probe, _, _ in expected.values()}) == 2
    if row[0] == "read-only":
        if CHECKOUT is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
            pytest.skip("needs a checkout and the right to mount it read-only")
    assert leave_records(row, tiny_experiment, tmp_path, place if row[0] == "warm" else tmp_path) == expected
