"""Shards as one Slurm array, and a merge job after it. What is submitted is a script people can read and submit again.

Learnt from a real Slurm (docs/clusters.md): a batch script's `$0` is a copy in Slurm's spool, so paths are absolute; a
task is SLURM_ARRAY_JOB_ID + SLURM_ARRAY_TASK_ID, for one task's own job id is the array's; sacct may not exist, so
state comes from the ledger and squeue; a requeued task may wait two minutes for its credential to expire, so a shard
should be ten minutes of work or more.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from qlibero.config.schema import CHECKOUT
from qlibero.errors import UserError, WorkFailed
from qlibero.launch.cells import OURS, Shard, spans
from qlibero.launch.engine import Submission, Submitted
from qlibero.places import REPOSITORY

SUBMIT, MERGE, JOBS = "submit.sbatch", "merge.sbatch", "jobs.json"


def describe(submission: Submission) -> str:
    """Both scripts and the two command lines."""
    return "".join(
        f"# ---- {submission.directory / name}\n{text}\n"
        for name, text in ((SUBMIT, array_script(submission)), (MERGE, merge_script(submission)))
    ) + (
        f"# ---- submitted as\nsbatch --parsable {submission.directory / SUBMIT}\n"
        f"sbatch --parsable --dependency=afterany:<its job id> {submission.directory / MERGE}\n"
    )


def submit(submission: Submission, say: Callable[[str], None]) -> Submitted:
    """Write the scripts and queue them; returns at once."""
    if not shutil.which("sbatch"):
        raise UserError("--engine slurm: no sbatch here; run this on a login node, or look at it with --dry-run")
    (submission.directory / SUBMIT).write_text(array_script(submission))
    (submission.directory / MERGE).write_text(merge_script(submission))
    array = _sbatch(submission.directory / SUBMIT)
    say(f"queued {len(submission.indices)} shards as job {array}")
    _note_jobs(submission, {"array": array})
    merge = _sbatch(submission.directory / MERGE, f"--dependency=afterany:{array}")
    _note_jobs(submission, {"array": array, "merge": merge})
    return Submitted(finished=False, jobs=(array, merge))


def array_script(submission: Submission) -> str:
    """submit.sbatch: one shard per array task; puts its work down and comes back before the time limit and on USR1."""
    slurm = submission.launch.slurm
    limit = f"%{slurm.array_limit}" if slurm.array_limit else ""
    options = [
        f"--job-name={submission.name}",
        f"--array={spans(submission.indices)}{limit}",
        f"--output={submission.directory}/logs/shard-%a.log",
        *_resources(submission),
        f"--time={slurm.time}",
        f"--signal=B:USR1@{slurm.signal_s}",
        "--requeue",
        "--open-mode=append",
    ]
    command = _in_container(submission, submission.shard_command(0)[:-1])
    requeue = 'scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"'
    return f"""#!/bin/bash
# Written by `qlibero sweep`. Each array task runs one shard of {submission.manifest}.
# Running a shard again continues it: this file can be submitted again at any time.
{_lines("#SBATCH ", options)}
set -uo pipefail
cd {shlex.quote(str(REPOSITORY))} || exit 1   # Slurm runs a copy of this file: $0 leads nowhere
{_setup(submission)}
put_down() {{   # TERM to the shard: what it has finished is in the ledger
  trap '' USR1 TERM
  kill -TERM "$shard" 2>/dev/null
  wait "$shard"
}}
# The time limit is near: come back and continue. A preempted task is brought back by Slurm itself.
trap 'put_down; echo "requeued at $(date -u +%FT%TZ)"; {requeue}; exit 0' USR1
trap 'put_down; exit 143' TERM

echo "shard $SLURM_ARRAY_TASK_ID on $(hostname), start ${{SLURM_RESTART_COUNT:-0}}"
{command} "$SLURM_ARRAY_TASK_ID" &
shard=$!
wait "$shard"
"""


def merge_script(submission: Submission) -> str:
    """merge.sbatch: runs once, after the last shard has ended, well or badly."""
    options = [
        f"--job-name={submission.name}-merge",
        f"--output={submission.directory}/logs/merge.log",
        *[option for option in _resources(submission) if not option.startswith(("--gres", "--cpus-per-task", "--mem"))],
        "--time=01:00:00",
        "--open-mode=append",
    ]
    return f"""#!/bin/bash
# Written by `qlibero sweep`: after the shards, mirrors the ledgers and writes sweep/result.json.
{_lines("#SBATCH ", options)}
set -uo pipefail
cd {shlex.quote(str(REPOSITORY))} || exit 1
{_setup(submission)}
{_in_container(submission, submission.merge_command())}
"""


def live_shards(sweep_directory: Path) -> dict[Shard, str]:
    """Shards that earlier submissions still have in the queue, with their state. {} where there is no squeue to ask.

    Raises WorkFailed when squeue is there and does not answer: then submitting again could double the work.
    """
    found: dict[Shard, str] = {}
    for note in _notes(sweep_directory):
        shards = json.loads((note.parent / "manifest.json").read_text())["shards"]
        for index, state in _queued(json.loads(note.read_text())["array"]):
            found[Shard(*shards[int(index)])] = state
    return found


def merge_is_queued(sweep_directory: Path) -> bool:
    """Whether an earlier submission's merge job still waits or runs. Raises like `live_shards`."""
    jobs = [json.loads(note.read_text()).get("merge") for note in _notes(sweep_directory)]
    return any(job and _queued(job) for job in jobs)


def _notes(sweep_directory: Path) -> list[Path]:
    return sorted(sweep_directory.glob(f"{OURS}/submission-*/{JOBS}")) if shutil.which("squeue") else []


def _queued(job: str) -> list[list[str]]:
    """[array index, state] of a job's tasks that squeue still lists; [] for a job it has forgotten."""
    asked = _run(["squeue", "--noheader", "--array", "--jobs", job, "--format=%K %T"])
    if asked.returncode and "Invalid job id" not in asked.stderr:
        raise WorkFailed(f"squeue does not answer: {asked.stderr.strip()}")
    return [line.split() for line in asked.stdout.splitlines()]


def _resources(submission: Submission) -> list[str]:
    slurm = submission.launch.slurm
    named = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "gres": slurm.gres,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.mem,
    }
    return ["--nodes=1", "--ntasks=1", *(f"--{key}={value}" for key, value in named.items() if value), *slurm.extra]


def _setup(submission: Submission) -> str:
    exports = "export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1"
    return "\n".join([exports, *submission.launch.slurm.setup])


def _in_container(submission: Submission, command: list[str]) -> str:
    """The container has its own checkout: told where ours lies, it gives the same configuration the same hash."""
    prefix = submission.launch.slurm.container
    return (
        f"{prefix} env {CHECKOUT}={shlex.quote(str(REPOSITORY))} qlibero {shlex.join(command[3:])}"
        if prefix
        else shlex.join(command)
    )


def _lines(prefix: str, options: list[str]) -> str:
    return "\n".join(prefix + option for option in options)


def _sbatch(script: Path, *options: str) -> str:
    done = _run(["sbatch", "--parsable", *options, str(script)])
    if done.returncode:
        raise WorkFailed(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise WorkFailed(f"{command[0]} did not answer within 60 s") from None


def _note_jobs(submission: Submission, jobs: dict[str, str]) -> None:
    path = submission.directory / JOBS
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(jobs))
    os.replace(temporary, path)
