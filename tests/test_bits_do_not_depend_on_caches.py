"""Risk: bits that hang on a cache, a core, a shard or a crash: two policies under one name (contracts 1 and 5).

Each row starts with every cache cold: nothing compiled, nothing calibrated, nothing remembered. A row that is killed
goes on in a process that finds all of it warm, the artifact among it. All rows must leave equal records.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlibero.places import CHECKOUT
from qlibero.results.ledger import read_ledger

ARMS = ("baseline", "fake")
EPISODES = 3 * len(ARMS)
SETS = ("tasks=[0]", "episodes_per_task=3", "max_steps=6", "tracking=[]", "videos=0")  # two calls of the policy each
SHARD = """
import sys
from pathlib import Path
from qlibero.config.load import load_experiment
from qlibero.run.experiment import run_experiment
config, out, index, count, *sets = sys.argv[1:]
run_experiment(load_experiment(Path(config), sets), Path(out), (int(index), int(count)))
"""


@dataclass(frozen=True)
class Row:
    workers: int
    cores: int
    shards: int = 1
    killed: bool = False
    read_only: bool = False


ROWS = [Row(workers=4, cores=2, killed=True), Row(workers=1, cores=1, shards=2, read_only=True)]


def read_only_checkout(place: Path) -> Path:
    """A checkout that nobody can write: what would be compiled beside the source finds no place there."""
    shutil.copytree(CHECKOUT / "src", place / "src", ignore=shutil.ignore_patterns("*.nbi", "*.nbc"))
    shutil.copy(CHECKOUT / "pyproject.toml", place)
    for path in (*place.rglob("*"), place):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return place


def start(row: Row, config: Path, place: Path, shard: tuple[int, int]) -> subprocess.Popen:
    environment = {**os.environ, **{name: str(place / name) for name in ("XDG_CACHE_HOME", "QLIBERO_HOME")}}
    cores = sorted(os.sched_getaffinity(0))[: row.cores]
    command = ["taskset", "-c", ",".join(map(str, cores))]
    if row.read_only:
        environment["PYTHONPATH"] = str(place / "checkout/src")
        if os.geteuid() == 0:  # root, too, obeys the modes of files without this
            command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    else:
        environment["NUMBA_CACHE_DIR"] = str(place / "numba")
    command += [sys.executable, "-c", SHARD, config, place / "run", *shard, *SETS, f"workers={row.workers}"]
    return subprocess.Popen([*map(str, command)], env=environment, cwd=place, start_new_session=True)


def records(place: Path) -> dict:
    return {
        (arm, r.key): (r.fingerprint, r.action_digest, r.outcome, r.steps, r.identity, r.probe, r.machine, r.kernels)
        for arm in ARMS
        for r in read_ledger(place / "run", arm)
    }


def leave_records(row: Row, config: Path, place: Path) -> dict:
    if row.killed:
        process = start(row, config, place, (0, 1))
        deadline = time.monotonic() + 300
        while not any(b"\n" in path.read_bytes() for path in place.glob("run/*/episodes-*")):
            assert time.monotonic() < deadline and process.poll() is None, "no episode before the kill"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert 0 < len(records(place)) < EPISODES
    together = [start(row, config, place, (index, row.shards)) for index in range(row.shards)]
    assert [process.wait(timeout=300) for process in together] == [0] * row.shards
    return records(place)


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_experiment) -> dict:
    return leave_records(Row(workers=1, cores=1), tiny_experiment, tmp_path_factory.mktemp("first"))


@pytest.mark.parametrize("row", ROWS, ids=["killed-four-workers-two-cores", "read-only-two-shards-one-core"])
def test_records_are_equal_however_cold_narrow_split_or_interrupted(row, first, tiny_experiment, tmp_path):
    assert len(first) == EPISODES and len({probe for *_, probe, _, _ in first.values()}) == len(ARMS)
    if row.read_only:
        if CHECKOUT is None:
            pytest.skip("an installed wheel has no checkout")
        source = read_only_checkout(tmp_path / "checkout") / "src"
    assert leave_records(row, tiny_experiment, tmp_path) == first
    if row.read_only:
        assert not [*source.rglob("*.nbi")], "the checkout was written after all"
