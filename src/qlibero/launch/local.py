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

from qlibero.config.schema import Launch
from qlibero.files import open_log
from qlibero.launch.engine import Engine, Place, Submission, Submitted, end_with_parent, run_merge, shown
from qlibero.machine.capacity import CORES, capacity
from qlibero.machine.environment import find_gpus
from qlibero.registry import EnginePlugin

log = logging.getLogger(__name__)

PLUGIN = EnginePlugin("local", "processes on this machine", provides="ENGINE", order=1)
RESTARTS = 3
NO_ROOM = 1 << 16  # bytes of free disk with which nothing can be written that matters
STOP_S = 30.0  # what a shard gets to put its current episodes down


def describe(submission: Submission) -> str:
    """The command lines, in the order they are started."""
    head = (
        f"# {min(submission.launch.processes, len(submission.indices))} at a time, logs in {submission.directory}/logs"
    )
    lines = [shown(submission.shard_command(i)) for i in submission.indices]
    return "\n".join([head, *lines, shown(submission.merge_command())]) + "\n"


def submit(submission: Submission) -> Submitted:
    """Run all shards, then the merge. Interrupted, it stops the shards (finished episodes are kept) and raises on."""
    waiting = deque((index, 0) for index in submission.indices)
    running: dict[int, tuple[subprocess.Popen[bytes], int, int]] = {}  # slot → process, shard, restarts so far
    failed: list[int] = []
    gpus = [gpu["index"] for gpu in find_gpus()]
    try:
        while waiting or running:
            for slot in range(submission.launch.processes):
                if slot not in running and waiting:
                    index, restarts = waiting.popleft()
                    running[slot] = (_start(submission, index, slot, gpus), index, restarts)
            time.sleep(0.1)
            for slot, (process, index, restarts) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[slot]
                if status < 0 and restarts < RESTARTS:
                    log.warning(f"shard {index} was killed by {signal.Signals(-status).name}: starting it again")
                    waiting.append((index, restarts + 1))
                elif status:
                    failed.append(index)
                    log.error(f"shard {index} ended with status {status}: {_last_words(submission, index)}")
                else:
                    done = len(submission.indices) - len(waiting) - len(running) - len(failed)
                    log.info(f"shard {index} is done ({done} of {len(submission.indices)})")
    finally:
        _stop([process for process, _, _ in running.values()])
    return Submitted(finished=True, failed=tuple(sorted(failed)), merge_status=run_merge(submission))


def _start(submission: Submission, index: int, slot: int, gpus: list[str]) -> subprocess.Popen[bytes]:
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if submission.launch.processes > 1:
        environment[CORES] = str(max(1, capacity().cores // submission.launch.processes))
    if gpus and "CUDA_VISIBLE_DEVICES" not in environment:
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
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("qlibero: ")]
    if lines:
        return lines[-1].removeprefix("qlibero: ")
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
        ours, processes = capacity(), launch.processes
        gpus = min(len(find_gpus()), processes) / processes
        return Place(max(1, ours.cores // processes), ours.memory_gb / processes, gpus, processes)


ENGINE = Local()
