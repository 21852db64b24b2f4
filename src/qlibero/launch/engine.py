"""What the engines have in common: local, Slurm and Ray are siblings that all run the same command for a shard.

An engine is a module with two functions:
    describe(submission) -> str              exactly what `submit` would start, as text (this is `--dry-run`)
    submit(submission, say) -> Submitted     start it; local and Ray return when all is done, Slurm when it is queued
"""

from __future__ import annotations

import ctypes
import importlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from qlibero.config.schema import Launch

ENGINES = ("local", "slurm", "ray")
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


def load_engine(name: str) -> ModuleType:
    """The engine's module."""
    return importlib.import_module(f"qlibero.launch.{name}")


def program() -> list[str]:
    """The qlibero of this very environment: a cluster's nodes see it at the same path."""
    return [sys.executable, "-m", "qlibero.cli"]


def run_merge(submission: Submission, say: Callable[[str], None]) -> int:
    """Run the merge here, for engines that stay until the end; returns its exit status."""
    status = subprocess.run(
        submission.merge_command(), stdout=subprocess.DEVNULL, check=False, preexec_fn=end_with_parent
    ).returncode
    if status:
        say(f"the merge after the shards ended with status {status}; by hand: {shown(submission.merge_command())}")
    return status


def end_with_parent() -> None:
    """In a child before exec: SIGTERM when the parent dies, so that a killed launcher leaves nothing behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def shown(command: list[str]) -> str:
    return shlex.join(command)
