"""Shards as tasks of a Ray cluster (`pip install 'qlibero[ray]'`). The nodes share the file system and environment.

A task only holds the resources and waits for an ordinary process, so a shard is the same thing here as everywhere. Ray
starts the task again when its worker or node dies, and the ledger continues.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
from pathlib import Path

from qlibero.config.launch import Launch
from qlibero.errors import UserError
from qlibero.files import open_log
from qlibero.launch.engine import Engine, Place, Submission, Submitted, end_with_parent, run_merge, shown
from qlibero.machine.capacity import CORES
from qlibero.registry import EnginePlugin

log = logging.getLogger(__name__)

PLUGIN = EnginePlugin("ray", "tasks of a Ray cluster", needs=("ray",), provides="ENGINE", order=3)
RETRIES = 3


def describe(submission: Submission) -> str:
    """Resources and command lines of the tasks."""
    ray = submission.launch.ray
    head = (
        f"# ray at {ray.address}: tasks of {ray.cpus:g} CPUs and {ray.gpus:g} GPUs, "
        f"{RETRIES} retries when a worker or node dies"
    )
    return (
        "\n".join(
            [head, *(shown(submission.shard_command(i)) for i in submission.indices), shown(submission.merge_command())]
        )
        + "\n"
    )


def submit(submission: Submission) -> Submitted:
    """Run all shards on the cluster, then the merge here."""
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray: Ray is not installed; pip install 'qlibero[ray]'") from None
    options = submission.launch.ray
    address = None if options.address == "local" else options.address
    try:
        _reach(options.address)
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="warning")
    except (OSError, ValueError, RuntimeError) as problem:  # Ray's own message advises a flag that qlibero has not
        why = "none is running on this machine" if options.address == "auto" else (str(problem).splitlines() or [""])[0]
        raise UserError(
            f"no Ray cluster at launch.ray.address={options.address} ({why}): start one with `ray start --head`, "
            "name another with --set launch.ray.address=HOST:6379, "
            "or write `local` for one that lives as long as this command"
        ) from None
    try:
        task = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=RETRIES)(_run)
        cores = str(max(1, int(options.cpus)))
        tasks = {task.remote(submission.shard_command(i), str(submission.log(i)), cores): i for i in submission.indices}
        waiting, failed = list(tasks), []
        while waiting:
            (done,), waiting = ray.wait(waiting, num_returns=1)
            try:
                status = ray.get(done)
            except ray.exceptions.RayError as problem:  # out of retries
                status = str(problem).strip().splitlines()[-1]
            if status:
                failed.append(tasks[done])
                log.error(f"shard {tasks[done]} ended with status {status}, see {submission.log(tasks[done])}")
            else:
                log.info(f"shard {tasks[done]} is done ({len(tasks) - len(waiting) - len(failed)} of {len(tasks)})")
    finally:
        ray.shutdown()
    return Submitted(finished=True, failed=tuple(sorted(failed)), merge_status=run_merge(submission))


def _reach(address: str) -> None:
    """Raises OSError for HOST:PORT where nobody listens; Ray itself would go on trying for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _run(command: list[str], log: str, cores: str) -> int:
    """On a node: run the shard and wait. Ends with it when Ray kills this worker."""
    with open_log(Path(log)) as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, CORES: cores},
            preexec_fn=end_with_parent,
        )
    status = process.wait()
    if status == -signal.SIGKILL:  # as if the worker had died: Ray shall try again
        os._exit(137)
    return status


class Ray(Engine):
    """See the module's docstring."""

    describe = staticmethod(describe)
    submit = staticmethod(submit)

    def place(self, launch: Launch) -> Place:
        return Place(max(1, int(launch.ray.cpus)), gpus=launch.ray.gpus)


ENGINE = Ray()
