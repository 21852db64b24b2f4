"""Risk: a sweep on Ray loses or doubles episodes when a worker or a node dies."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import light_shard
import pytest

from qlibero.config.launch import Launch
from qlibero.errors import UserError
from qlibero.launch import engine
from qlibero.launch import ray as ray_engine

pytestmark = pytest.mark.libero

SHARDS = 4


@pytest.fixture(scope="module")
def cluster():
    """Two real nodes of two pretend GPUs each."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 4, "num_gpus": 2, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.second = cluster.add_node(**node)
    yield cluster
    cluster.shutdown()


def test_shards_are_finished_once_when_a_worker_and_a_node_die(cluster, tmp_path, monkeypatch, said):
    import ray

    monkeypatch.setattr(engine, "program", lambda: [sys.executable, light_shard.__file__])
    (tmp_path / "logs").mkdir()
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": []}))
    launch = Launch(ray={"address": cluster.address, "cpus": 1, "gpus": 1})
    submission = engine.Submission("drill", tmp_path, tuple(range(SHARDS)), launch)
    fallen: list[int] = []

    def hurt() -> None:
        deadline = time.monotonic() + 60
        while not all(light_shard.rows(tmp_path, i) for i in range(SHARDS)) and time.monotonic() < deadline:
            time.sleep(0.1)
        shard = int((tmp_path / "pid-0").read_text())
        worker = int(Path(f"/proc/{shard}/stat").read_text().rpartition(")")[2].split()[1])
        fallen.append(worker)
        os.kill(worker, signal.SIGKILL)  # a worker: Ray starts its task again …
        while alive(shard) and time.monotonic() < deadline:
            time.sleep(0.1)
        fallen.extend([] if alive(shard) else [shard])  # … and its shard has ended with it
        cluster.remove_node(cluster.second, allow_graceful=False)  # a node

    threading.Thread(target=hurt, daemon=True).start()
    submitted = ray_engine.submit(submission)
    assert submitted.finished and not submitted.failed, said
    assert len(fallen) == 2
    for index in range(SHARDS):
        assert sorted(light_shard.rows(tmp_path, index)) == list(range(light_shard.ROWS))
    assert (tmp_path / "merged").exists()
    assert not ray.is_initialized()
    gpus = {json.loads(line)["gpu"] for path in tmp_path.glob("rows-*") for line in path.read_text().splitlines()}
    assert gpus <= {"0", "1"}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("address", "why"), [("auto", "none is running on this machine"), ("127.0.0.1:9", "Connection refused")]
)
def test_without_a_cluster_the_setting_is_named(tmp_path, monkeypatch, address, why):
    import ray

    def nobody(**options) -> None:  # what Ray says where no cluster runs; a neighbour's may run on this machine
        raise ConnectionError(
            "Could not find any running Ray instance. Please specify the one to connect to by setting `--address` flag"
        )

    monkeypatch.setattr(ray, "init", nobody)
    made = engine.Submission("x", tmp_path, (0,), Launch(ray={"address": address}))
    with pytest.raises(
        UserError, match=rf"no Ray cluster at launch.ray.address={address} .*{why}.*--set launch.ray.address"
    ) as refused:
        ray_engine.submit(made)
    assert "--address" not in str(refused.value)


def test_without_ray_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'qlibero\[ray\]'"):
        ray_engine.submit(engine.Submission("x", tmp_path, (0,), Launch()))
