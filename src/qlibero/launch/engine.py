"""What the engines have in common: local, Slurm and Ray are siblings that all run the same command for a shard.

An engine is a module that declares an `EnginePlugin` and provides an object of a class derived from `Engine`.
"""

from __future__ import annotations

import ctypes
import logging
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from qlibero.config.launch import Launch
from qlibero.registry import EnginePlugin, every, get

if TYPE_CHECKING:
    from qlibero.launch.cells import Shard

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Submission:
    """Shards `indices` of `manifest`, to be run by an engine. `directory` takes its scripts and logs."""

    name: str
    directory: Path
    indices: tuple[int, ...]
    launch: Launch

    @property
    def manifest(self) -> Path:
        return self.directory / "manifest.json"

    def log(self, index: int | str) -> Path:
        return self.directory / "logs" / f"shard-{index}.log"

    def shard_command(self, index: int) -> list[str]:
        return [*program(), "run-shard", "--manifest", str(self.manifest), "--index", str(index)]

    def merge_command(self) -> list[str]:
        return [*program(), "run-shard", "--manifest", str(self.manifest), "--merge"]


@dataclass(frozen=True)
class Submitted:
    """`finished`: the shards have been run, well or badly; otherwise they are queued as `jobs`. `merge_status`: how the
    merge after them ended, 0 when well or when it is queued."""

    finished: bool
    failed: tuple[int, ...] = ()
    jobs: tuple[str, ...] = ()
    merge_status: int = 0


@dataclass(frozen=True)
class Place:
    """What one shard gets on an engine, as far as it is known before anything is submitted."""

    cores: int = 1
    memory_gb: float | None = None
    gpus: float = 0.0
    at_once: int | None = None
    """Shards that run beside each other; None: all."""


class Engine:
    """What runs the shards of a sweep. The first two every engine has; of the rest there may be nothing to say."""

    here = False
    """Whether shards run on this very machine."""
    more_memory = "set workers"
    """What to do when a shard's simulators do not fit its memory."""

    def describe(self, submission: Submission) -> str:
        """Exactly what `submit` would start, as text (this is `--dry-run`)."""
        raise NotImplementedError

    def submit(self, submission: Submission) -> Submitted:
        """Start it; returns when all is done, or when it is queued."""
        raise NotImplementedError

    def place(self, launch: Launch) -> Place:
        """What one shard gets under these options."""
        return Place()

    def problems(self, launch: Launch) -> Iterator[str]:
        """Why these options cannot work, if so."""
        yield from ()

    def jobs(self, missing: tuple[int, ...], chosen: bool) -> dict[str, int] | None:
        """What would be submitted for the `missing` shards; None where there is nothing to say of it. `chosen`: this is
        the sweep's own engine."""
        return None

    def live_shards(self, sweep_directory: Path) -> dict[Shard, str]:
        """Shards that earlier submissions still have in the queue, with their state. Raises WorkFailed where nobody can
        say: then submitting again could double the work."""
        return {}

    def merge_is_queued(self, sweep_directory: Path) -> bool:
        """Whether an earlier submission's merge still waits or runs. Raises like `live_shards`."""
        return False


def load_engine(name: str) -> Engine:
    """The engine of that name. UserError for one that is not there or does not load."""
    return cast(Engine, get(EnginePlugin, name).load())


def engines(also: str = "local") -> dict[str, Engine]:
    """Every engine that needs no path, and `also`: any of them may have been used before in a directory."""
    names = dict.fromkeys([*(plugin.name for plugin in every(EnginePlugin)), also])
    return {name: load_engine(name) for name in names}


def program() -> list[str]:
    """The qlibero of this very environment: a cluster's nodes see it at the same path."""
    return [sys.executable, "-m", "qlibero.cli"]


def run_merge(submission: Submission) -> int:
    """Run the merge here, for engines that stay until the end; returns its exit status."""
    status = subprocess.run(
        submission.merge_command(), stdout=subprocess.DEVNULL, check=False, preexec_fn=end_with_parent
    ).returncode
    if status:
        by_hand = shown(submission.merge_command())
        log.error(f"the merge after the shards ended with status {status}; by hand: {by_hand}")
    return status


def end_with_parent() -> None:
    """In a child before exec: SIGTERM when the parent dies, so that a killed launcher leaves nothing behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def shown(command: list[str]) -> str:
    return shlex.join(command)
