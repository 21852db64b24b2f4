"""Shards as processes on this machine, `launch.processes` at a time; one policy process per GPU where there are GPUs.

A shard that is killed (out of memory, a stray SIGKILL) is started again: what it had finished is in the ledger. One
that ends by itself with an error is not; it says in its log what to do.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from qlibero.config.launch import Launch
from qlibero.files import open_log
from qlibero.launch.engine import Engine, Place, Submission, Submitted, end_with_parent, run_merge, shown
from qlibero.machine.capacity import CORES, capacity
from qlibero.machine.environment import usable_gpus
from qlibero.registry import EnginePlugin

log = logging.getLogger(__name__)

PLUGIN = EnginePlugin("local", "processes on this machine", provides="ENGINE", order=1)
RESTARTS = 3
NO_ROOM = 1 << 16  # bytes of free disk with which nothing can be written that matters
STOP_S = 30.0  # what a shard gets to put its current episodes down


@dataclass(frozen=True)
class Failed:
    """How a shard ended: its exit status, negative for a signal, and its last message."""

    status: int
    said: str


def processes(launch: Launch) -> int:
    """Shards at once."""
    return max(1, len(usable_gpus())) if launch.processes == "auto" else launch.processes


def describe(submission: Submission) -> str:
    """The command lines, in the order they are started."""
    head = (
        f"# {min(processes(submission.launch), len(submission.indices))} at a time, logs in {submission.directory}/logs"
    )
    lines = [shown(submission.shard_command(i)) for i in submission.indices]
    return "\n".join([head, *lines, shown(submission.merge_command())]) + "\n"


def submit(submission: Submission) -> Submitted:
    """Run all shards, then the merge. Interrupted, it stops the shards (finished episodes are kept) and raises on."""
    failed = run_shards(submission)
    return Submitted(finished=True, failed=tuple(sorted(failed)), merge_status=run_merge(submission))


def run_shards(submission: Submission, meanwhile: Callable[[], None] = lambda: None) -> dict[int, Failed]:
    """Run all shards; returns those that failed. `meanwhile` is called ten times a second."""
    waiting = deque((index, 0) for index in submission.indices)
    running: dict[int, tuple[subprocess.Popen[bytes], int, int]] = {}  # slot → process, shard, restarts so far
    failed: dict[int, Failed] = {}
    at_once, gpus = processes(submission.launch), usable_gpus()
    try:
        while waiting or running:
            for slot in range(at_once):
                if slot not in running and waiting:
                    index, restarts = waiting.popleft()
                    running[slot] = (_start(submission, index, slot, at_once, gpus), index, restarts)
            time.sleep(0.1)
            meanwhile()
            for slot, (process, index, restarts) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[slot]
                if status < 0 and restarts < RESTARTS:
                    log.warning(f"shard {index} was killed by {signal.Signals(-status).name}: starting it again")
                    waiting.append((index, restarts + 1))
                elif status:
                    failed[index] = Failed(status, _last_words(submission, index))
                    log.error(f"shard {index} ended with status {status}: {failed[index].said}")
                else:
                    done = len(submission.indices) - len(waiting) - len(running) - len(failed)
                    log.info(f"shard {index} is done ({done} of {len(submission.indices)})")
    finally:
        _stop([process for process, _, _ in running.values()])
    return failed


def _start(submission: Submission, index: int, slot: int, at_once: int, gpus: list[str]) -> subprocess.Popen[bytes]:
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if at_once > 1:  # alone, it has all cores and whichever GPU its policy names
        environment[CORES] = str(max(1, capacity().cores // at_once))
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    with open_log(submission.log(index)) as log:
        return subprocess.Popen(
            submission.shard_command(index),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            preexec_fn=end_with_parent,
        )


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_words(submission: Submission, index: int) -> str:
    log = submission.log(index)
    lines = log.read_text(errors="replace").splitlines()
    if said := [place for place, line in enumerate(lines) if line.startswith("qlibero: ")]:
        first = said[-1]  # of a message; the JSON line that comes after it says where it ends
        end = next((place for place in range(first, len(lines)) if lines[place].startswith("{")), first + 1)
        return "\n".join(lines[first:end]).removeprefix("qlibero: ")
    if shutil.disk_usage(log.parent).free < NO_ROOM:  # then its log ends before it could say so
        return (
            f"the disk of {log.parent} is full. Everything finished is kept; "
            "free some space and give the same command again"
        )
    return f"see {log}"


class Local(Engine):
    """See the module's docstring."""

    here = True
    more_memory = "set workers or launch.processes"
    describe = staticmethod(describe)
    submit = staticmethod(submit)

    def place(self, launch: Launch) -> Place:
        ours, at_once = capacity(), processes(launch)
        gpus = min(len(usable_gpus()), at_once) / at_once
        return Place(max(1, ours.cores // at_once), ours.memory_gb / at_once, gpus, at_once)


ENGINE = Local()
