"""Risk: a run starts more simulators than its job may hold and is killed, as the node has room that is not ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlibero.machine.capacity import WORKER_GB, Capacity, capacity, memory_bytes, simulators

GIB = 2**30
MEMINFO = f"MemTotal: {256 * GIB // 1024} kB\nMemFree: 1024 kB\nMemAvailable: {200 * GIB // 1024} kB\n"


def machine(root: Path, cgroup: str = "0::/\n", **files: str) -> Path:
    """A root directory with /proc and /sys as a 256 GiB machine has them. `files`: path below /sys/fs/cgroup → text."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(MEMINFO)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def gib(bytes_gb: float) -> float:
    return round(bytes_gb * 1e9 / GIB, 2)


def test_without_limits_the_machine_is_ours_and_its_page_cache_counts_as_free(tmp_path):
    found = capacity({}, machine(tmp_path), affinity=64)
    assert (found.cores, gib(found.memory_gb), gib(found.free_gb)) == (64, 256, 200)


def test_a_container_of_cgroup_2(tmp_path):
    files = {
        "cgroup.controllers": "cpu memory",
        "memory.max": str(16 * GIB),
        "memory.current": str(6 * GIB),
        "memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
        "cpu.max": "350000 100000\n",
    }
    found = capacity({}, machine(tmp_path, "0::/\n", **files), affinity=64)
    assert (found.cores, gib(found.memory_gb), gib(found.free_gb)) == (3, 16, 12)
    assert "cgroup quota" in found.why and "cgroup limit" in found.why
    assert memory_bytes(tmp_path) == 16 * GIB


def test_shards_of_a_container_share_its_memory_by_its_own_cores(tmp_path):
    """Not by those of the machine, of which a quota leaves it a few."""
    files = {"cgroup.controllers": "cpu memory", "memory.max": str(64 * GIB), "cpu.max": "3200000 100000\n"}
    found = capacity({"QLIBERO_CORES": "8"}, machine(tmp_path, "0::/\n", **files), affinity=128)
    assert (found.cores, gib(found.memory_gb)) == (8, 16) and "its share of 32 cores" in found.why


def test_a_limit_of_a_parent_binds_its_children(tmp_path):
    """Slurm limits the job, and the step inside it says `max`."""
    files = {
        "cgroup.controllers": "cpu memory",
        "slurm/job_7/memory.max": str(8 * GIB),
        "slurm/job_7/memory.current": str(GIB),
        "slurm/job_7/cpu.max": "max 100000",
        "slurm/job_7/step_0/memory.max": "max",
    }
    found = capacity({}, machine(tmp_path, "0::/slurm/job_7/step_0\n", **files), affinity=32)
    assert (found.cores, gib(found.memory_gb), gib(found.free_gb)) == (32, 8, 7)


@pytest.mark.parametrize(
    "path", ["/docker/abc", "/"]
)  # the path of the host, as a container without its own namespace sees it
def test_a_container_of_cgroup_1(tmp_path, path):
    files = {
        "memory/memory.limit_in_bytes": str(10 * GIB),
        "memory/memory.usage_in_bytes": str(2 * GIB),
        "memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
        "cpu,cpuacct/cpu.cfs_quota_us": "400000",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
    }
    found = capacity({}, machine(tmp_path, f"4:memory:{path}\n3:cpu,cpuacct:{path}\n0::/\n", **files), affinity=16)
    assert (found.cores, gib(found.memory_gb), gib(found.free_gb)) == (4, 10, 9)


def test_unlimited_cgroups_of_version_1_limit_nothing(tmp_path):
    files = {
        "memory/memory.limit_in_bytes": str(2**63 - 4096),
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
    }
    found = capacity({}, machine(tmp_path, "4:memory:/\n3:cpu:/\n", **files), affinity=16)
    assert (found.cores, gib(found.memory_gb)) == (16, 256)


@pytest.mark.parametrize(
    ("environ", "cores", "memory", "why"),
    [
        ({"SLURM_CPUS_PER_TASK": "16", "SLURM_MEM_PER_NODE": str(24 * 1024)}, 16, 24, "Slurm's --mem"),
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_MEM_PER_CPU": "2048"}, 4, 8, "Slurm's --mem"),
        ({"SLURM_CPUS_PER_TASK": "16", "SLURM_MEM_PER_NODE": "0"}, 16, 64, "its share of 64 cores"),
        ({"SLURM_CPUS_PER_TASK": "128"}, 64, 256, "the machine"),  # hyperthreads it was promised and does not see
        ({"QLIBERO_CORES": "32"}, 32, 128, "its share of 64 cores"),  # one of two shards of a local sweep
        (  # one of four processes of a run in a job of Slurm's, whose memory they share
            {"SLURM_CPUS_PER_TASK": "16", "SLURM_MEM_PER_NODE": str(24 * 1024), "QLIBERO_CORES": "4"},
            4,
            6,
            "its share of 16 cores",
        ),
        ({"SLURM_CPUS_PER_TASK": "16", "SLURM_MEM_PER_CPU": "2048", "QLIBERO_CORES": "4"}, 4, 8, "its share of 16"),
        ({"SLURM_CPUS_PER_TASK": "16", "QLIBERO_CORES": "4"}, 4, 16, "its share of 16 cores"),
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_MEM_PER_CPU": "2048", "QLIBERO_CORES": "9"}, 4, 8, "Slurm's --mem"),
    ],
)
def test_what_a_scheduler_granted_counts_also_where_it_is_not_enforced(tmp_path, environ, cores, memory, why):
    found = capacity(environ, machine(tmp_path), affinity=64)
    assert (found.cores, gib(found.memory_gb)) == (cores, memory) and why in found.why


def test_as_many_simulators_as_fit_and_the_reason_goes_with_the_number():
    small = Capacity(16, 24.0, 9 * WORKER_GB + 0.1, "cores by SLURM_CPUS_PER_TASK, memory by Slurm's --mem")
    auto = simulators("auto", 1000, small)
    assert auto.workers == 9 and "GB free" in auto.why and "Slurm's --mem" in auto.why and auto.short is None
    assert simulators("auto", 4, small).workers == 4 and simulators("auto", 4, small).why == "4 episodes"
    asked = simulators(12, 1000, small)
    assert (
        asked.workers == 12 and "12 simulators need 22.8 GB and 17.2 GB are free" in asked.short
    )  # their choice, but said
    assert simulators("auto", 5, Capacity(2, 1.0, 0.5, "")).workers == 1  # one must try: it may be enough


@pytest.mark.parametrize(
    ("cores", "free_gb", "batch", "workers", "says"),
    [
        (16, 120.0, 8, 32, "16 cores, and a policy on a GPU that takes 8 at a time"),  # as measured best
        (16, 120.0, None, 16, "16 cores ("),
        (16, 40.0, 8, 21, "40.0 GB free, 1.9 GB each"),
        (2, 120.0, 8, 8, "2 cores, and"),  # no more than four a core
        (64, 500.0, 8, 64, "64 cores ("),
        (16, 120.0, 1, 16, "16 cores ("),
    ],
)
def test_a_policy_on_a_gpu_gets_four_batches_of_simulators(cores, free_gb, batch, workers, says):
    found = simulators("auto", 10_000, Capacity(cores, 2 * free_gb, free_gb, "why"), gpu_batch=batch)
    assert found.workers == workers and found.why.startswith(says)
    assert simulators(5, 10_000, Capacity(cores, 2 * free_gb, free_gb, "why"), gpu_batch=batch).workers == 5
