"""How many simulators fit where this process runs: the cores and the memory that are really ours, whoever limits them.

A machine's own numbers say too much: a container or a batch job sees all cores and all memory of its node and is killed
when it uses them. So limits are read where they are set: the affinity, the cgroups of both versions from our own up to
the root, what Slurm granted (also where it does not enforce it), and the part that an engine gave each of several
shards. `run`, `plan` and `doctor` all ask here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlibero.console import count_text

WORKER_GB = 1.9  # of a rendering simulator: 1.4 GB at first, 1.9 after 60 episodes over ten tasks, where it stays
BATCHES = 4  # of a policy on a GPU, that simulators must be able to fill: one is computed, one waits, two are stepped
MOST_PER_CORE = 4
SLURM_CORES = "SLURM_CPUS_PER_TASK"
CORES = "QLIBERO_CORES"  # set by engines that start several shards on a node: the cores of each


@dataclass(frozen=True)
class Capacity:
    """What this process may use. `free_gb` is what of `memory_gb` nobody has taken; `why` names each limit."""

    cores: int
    memory_gb: float
    free_gb: float
    why: str


@dataclass(frozen=True)
class Simulators:
    """How many to start. `short` says what is wrong when somebody asked for more than fits."""

    workers: int
    why: str
    short: str | None = None


def simulators(
    asked: int | Literal["auto"], episodes: int, here: Capacity | None = None, gpu_batch: int | None = None
) -> Simulators:
    """As many as asked for; with `auto` as many as are `wanted`, as free memory allows. Never more than episodes.

    `gpu_batch`: rows of a call of a policy that is on a GPU.
    """
    here = here or capacity()
    if asked != "auto":
        workers = min(asked, episodes)
        needs = workers * WORKER_GB
        short = (
            f"{count_text(workers, 'simulator')} need{'s' * (workers == 1)} {needs:g} GB and "
            f"{here.free_gb:.1f} GB are free ({here.why})"
            if needs > here.free_gb
            else None
        )
        return Simulators(workers, f"workers: {asked}", short)
    most = wanted(here.cores, gpu_batch)
    workers = fitting(most, here.free_gb)
    reason = count_text(here.cores, "core")
    if most > here.cores:
        reason += f", and a policy on a GPU that takes {gpu_batch} at a time"
    if workers < most:
        reason = f"{here.free_gb:.1f} GB free, {WORKER_GB:g} GB each"
    return Simulators(
        min(workers, episodes), f"{reason} ({here.why})" if workers <= episodes else count_text(episodes, "episode")
    )


def wanted(cores: int, gpu_batch: int | None = None) -> int:
    """Simulators that keep these cores busy, and a policy on a GPU: one per core, but those that wait for the GPU need
    none, so there `BATCHES` batches of them, at most `MOST_PER_CORE` a core."""
    return max(cores, min(BATCHES * gpu_batch, MOST_PER_CORE * cores)) if gpu_batch else cores


def fitting(most: int, memory_gb: float) -> int:
    """How many of `most` simulators fit in so much memory; one must try."""
    return max(1, min(most, int(memory_gb / WORKER_GB)))


def capacity(environ: Mapping[str, str] | None = None, root: Path = Path("/"), affinity: int | None = None) -> Capacity:
    """Cores and memory of this process. `root` is where /proc and /sys are looked for."""
    environ = os.environ if environ is None else environ
    machine_cores = len(os.sched_getaffinity(0)) if affinity is None else affinity
    cores = {"the affinity": float(machine_cores)}
    total, available = _machine_memory(root)
    memory: dict[str, float] = {"the machine": total}
    free = [available]
    for group in _cgroups(root, "cpu"):
        if (quota := _quota(group)) is not None:
            cores["a cgroup quota"] = min(quota, cores.get("a cgroup quota", quota))
    for group in _cgroups(root, "memory"):
        if (limit := _limit(group)) is not None and limit < total:
            memory["a cgroup limit"] = min(limit, memory.get("a cgroup limit", limit))
            free.append(max(0, limit - _used(group)))
    given = {name: float(environ[name]) for name in (SLURM_CORES, CORES) if environ.get(name, "").isdecimal()}
    cores |= {SLURM_CORES: given[SLURM_CORES]} if SLURM_CORES in given else {}
    cores_by = min(cores, key=cores.__getitem__)
    whole = max(1, int(cores[cores_by]))  # of the job; shards beside each other are parts of it
    if granted := _slurm_memory(environ, whole):
        memory["Slurm's --mem"] = granted
    elif cores_by == SLURM_CORES:  # neighbours have the rest of the cores, and need memory for them
        memory[f"its share of {machine_cores} cores"] = min(memory.values()) * whole / machine_cores
    ours = whole
    if given.get(CORES, whole) < whole:
        cores_by, ours = CORES, max(1, int(given[CORES]))
        memory[f"its share of {whole} cores"] = min(memory.values()) * ours / whole
    memory_by = min(memory, key=memory.__getitem__)
    why = f"cores by {cores_by}, memory by {memory_by}"
    return Capacity(ours, memory[memory_by] / 1e9, min(memory[memory_by], *free) / 1e9, why)


def memory_bytes(root: Path = Path("/")) -> int:
    """Physical memory, or a cgroup's limit where that is lower."""
    limits = [limit for group in _cgroups(root, "memory") if (limit := _limit(group)) is not None]
    return min([_machine_memory(root)[0], *limits])


# ------------------------------------------------------------------------------------------------- where limits are set
def _machine_memory(root: Path) -> tuple[int, int]:
    """Total and available bytes. `available` counts the page cache, which is there for the taking; `free` would not."""
    lines = (line.split() for line in _read(root / "proc/meminfo").splitlines())
    known = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1}
    total = known.get("MemTotal:") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, known.get("MemAvailable:", total)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Directories of this process's cgroups for `controller` in both versions, its own first, then every parent.

    Inside a container the path that /proc names may not exist; then its root is our own.
    """
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base = mount if (mount / "cgroup.controllers").exists() else mount / "unified"
        elif controller in controllers.split(","):
            base = mount / controllers if (mount / controllers).is_dir() else mount / controller
        else:
            continue
        below = Path(path.lstrip("/"))
        for part in (below, *below.parents):
            if (base / part).is_dir():
                yield base / part


def _quota(group: Path) -> float | None:
    """Cores a cgroup may use; None without a limit."""
    if words := _read(group / "cpu.max").split():
        return None if words[0] == "max" else int(words[0]) / int(words[1])
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota / period if quota and quota > 0 and period else None


def _limit(group: Path) -> int | None:
    limit = _number(group / "memory.max")
    return _number(group / "memory.limit_in_bytes") if limit is None else limit


def _used(group: Path) -> int:
    """What a cgroup holds and would not give back: its files' inactive pages do not count."""
    used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
    stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
    return used - int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _slurm_memory(environ: Mapping[str, str], cores: int) -> int | None:
    """Bytes granted by --mem or --mem-per-cpu, which Slurm gives in MiB; None where neither was asked for (0: all)."""
    node, each = (environ.get(f"SLURM_MEM_PER_{what}", "") for what in ("NODE", "CPU"))
    mib = int(node) if node.isdecimal() else int(each) * cores if each.isdecimal() else 0
    return mib * 2**20 or None


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.lstrip("-").isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
