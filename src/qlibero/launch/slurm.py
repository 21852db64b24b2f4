"""Shards as Slurm arrays, and a merge job after them. What is submitted are scripts people can read and submit again.

Learnt from a real Slurm (docs/clusters.md): a batch script's `$0` is a copy in Slurm's spool, so paths are absolute; a
task is SLURM_ARRAY_JOB_ID + SLURM_ARRAY_TASK_ID, for one task's own job id is the array's; sacct may not exist, so
state comes from the ledger and squeue; a requeued task may wait two minutes for its credential to expire, so a shard
should be ten minutes of work or more; and MaxArraySize bounds the *index* of a task, so that many shards are several
arrays, each counted from 0.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qlibero import files
from qlibero.config.launch import Launch, Slurm, SlurmMerge
from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.errors import UserError, WorkFailed
from qlibero.launch.cells import OURS, Shard, spans
from qlibero.launch.engine import Engine, Place, Submission, Submitted
from qlibero.launch.slurm_options import gigabytes, gpus_of, seconds
from qlibero.places import CHECKOUT as OUR_CHECKOUT
from qlibero.quoting import sbatch_option, slurm_file
from qlibero.registry import EnginePlugin

log = logging.getLogger(__name__)

PLUGIN = EnginePlugin("slurm", "arrays of jobs of a Slurm cluster", provides="ENGINE", order=2)
MERGE, JOBS = "merge.sbatch", "jobs.json"
DEFAULT_ARRAY_SIZE = 1001  # Slurm's own, where nobody can be asked


@dataclass(frozen=True)
class Array:
    """Shards `offset + task` for the `tasks` of one array; `number` among the arrays of the submission."""

    number: int
    offset: int
    tasks: tuple[int, ...]

    @property
    def script(self) -> str:
        return f"submit-{self.number}.sbatch" if self.number else "submit.sbatch"


def arrays(submission: Submission) -> list[Array]:
    """The submission's shards in as many arrays as the cluster's MaxArraySize makes of them."""
    size = max_array_size()
    return [
        Array(number, offset, tuple(i - offset for i in submission.indices if offset <= i < offset + size))
        for number, offset in enumerate(array_offsets(submission.indices, size))
    ]


def array_offsets(indices: Iterable[int], size: int) -> list[int]:
    """The shard that each array of at most `size` tasks begins at."""
    return sorted({index // size * size for index in indices})


def max_array_size() -> int:
    """The cluster's MaxArraySize, one more than the largest index of a task; Slurm's default where it cannot be asked.

    Raises UserError where arrays are switched off.
    """
    said = _run(["scontrol", "show", "config"]).stdout if shutil.which("scontrol") else ""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", said, re.MULTILINE)
    size = int(found[1]) if found else DEFAULT_ARRAY_SIZE
    if size < 2:
        raise UserError(f"this cluster takes no job arrays (MaxArraySize = {size}); use --engine local inside a job")
    return size


def describe(submission: Submission) -> str:
    """All scripts and command lines."""
    parts = arrays(submission)
    scripts = [(part.script, array_script(submission, part)) for part in parts]
    scripts.append((MERGE, merge_script(submission)))
    note = (
        f"# {count_text(len(submission.indices), 'shard')} in {count_text(len(parts), 'array')}: "
        f"MaxArraySize is {max_array_size()}\n"
    )
    commands = [f"sbatch --parsable {shlex.quote(str(submission.directory / part.script))}\n" for part in parts]
    merge = shlex.quote(str(submission.directory / MERGE))
    return (
        (note if len(parts) > 1 else "")
        + "".join(f"# ---- {submission.directory / name}\n{text}\n" for name, text in scripts)
        + f"# ---- submitted as\n{''.join(commands)}"
        + f"sbatch --parsable --dependency=afterany:<their job ids> {merge}\n"
    )


def submit(submission: Submission) -> Submitted:
    """Write the scripts and queue them; returns at once.

    Raises WorkFailed when an array is refused; the message says which shards are queued already, and if none are, the
    submission's directory is gone. A refused merge job is said, and is `merge_status` 1: the shards are queued all the
    same, and the next `sweep` merges.
    """
    try:
        return _submit(submission)
    finally:
        if not (submission.directory / JOBS).exists():  # no job will ever write there
            shutil.rmtree(submission.directory, ignore_errors=True)


def _submit(submission: Submission) -> Submitted:
    if not shutil.which("sbatch"):
        raise UserError("--engine slurm: no sbatch here; run this on a login node, or look at it with --dry-run")
    parts = arrays(submission)
    scripts = {part.script: array_script(submission, part) for part in parts} | {MERGE: merge_script(submission)}
    for name, text in scripts.items():
        files.replace(submission.directory / name, text)
    queued: list[dict[str, int | str]] = []
    for part in parts:
        # `array_limit` is meant for all tasks, Slurm counts it for each array: so one array after the other
        chained = queued and submission.launch.slurm.array_limit
        waits = [f"--dependency=afterany:{queued[-1]['job']}"] if chained else []
        try:
            job = _sbatch(submission.directory / part.script, *waits)
        except WorkFailed as refusal:
            so_far = ", ".join(f"job {each['job']}" for each in queued)
            what = (
                f"queued already, and kept: {so_far}" if queued else "nothing is queued (--dry-run shows the scripts)"
            )
            raise WorkFailed(f"{refusal}; {what}. The same command submits what is missing") from None
        queued.append({"job": job, "offset": part.offset})
        _note_jobs(submission, {"arrays": queued})
        log.info(f"queued {count_text(len(part.tasks), 'shard')} as job {job}")
    jobs = [str(each["job"]) for each in queued]
    try:
        merge = _sbatch(submission.directory / MERGE, f"--dependency=afterany:{':'.join(jobs)}")
    except WorkFailed as refusal:
        log.error(
            f"{count_text(len(submission.indices), 'shard')} queued (job {', '.join(jobs)}), the merge "
            "after them is NOT: "
            f"{refusal}. The same command merges when they are done; launch.slurm.merge gives that job a partition and "
            "options of its own"
        )
        return Submitted(finished=False, jobs=tuple(jobs), merge_status=1)
    _note_jobs(submission, {"arrays": queued, "merge": merge})
    return Submitted(finished=False, jobs=(*jobs, merge))


def array_script(submission: Submission, part: Array) -> str:
    """submit.sbatch: one shard per array task; puts its work down and comes back before the time limit and on USR1."""
    slurm = submission.launch.slurm
    limit = f"%{slurm.array_limit}" if slurm.array_limit else ""
    log = f"shard-{part.offset}+%a.log" if part.offset else "shard-%a.log"
    options = [
        sbatch_option("job-name", submission.name),
        f"--array={spans(part.tasks)}{limit}",
        sbatch_option("output", f"{slurm_file(str(submission.directory))}/logs/{log}"),
        *_resources(slurm),
        f"--signal=B:USR1@{slurm.signal_s}",
        "--requeue",
        "--open-mode=append",
    ]
    command = _in_container(submission, submission.shard_command(0)[:-1])
    requeue = 'scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"'
    return f"""{_head(submission, options)}
index=$((SLURM_ARRAY_TASK_ID + {part.offset}))   # the shard's, in the manifest
put_down() {{   # TERM to the shard: what it has finished is in the ledger
  trap '' USR1 TERM
  kill -TERM "$shard" 2>/dev/null
  wait "$shard"
}}
# The time limit is near: come back and continue. A preempted task is brought back by Slurm itself.
trap 'put_down; echo "requeued at $(date -u +%FT%TZ)"; {requeue}; exit 0' USR1
trap 'put_down; exit 143' TERM

echo "shard $index on $(hostname), start ${{SLURM_RESTART_COUNT:-0}}"
{command} "$index" &
shard=$!
wait "$shard"
"""


def merge_script(submission: Submission) -> str:
    """merge.sbatch: runs once, after the last shard has ended, well or badly."""
    slurm, merge = submission.launch.slurm, submission.launch.slurm.merge
    inherited = {key: getattr(merge, key) or getattr(slurm, key) for key in ("partition", "account", "qos")}
    options = [
        sbatch_option("job-name", f"{submission.name}-merge"),
        sbatch_option("output", f"{slurm_file(str(submission.directory))}/logs/merge.log"),
        *_resources(merge.model_copy(update=inherited)),
        "--open-mode=append",
    ]
    return f"""{_head(submission, options)}
{_in_container(submission, submission.merge_command())}
"""


def live_shards(sweep_directory: Path) -> dict[Shard, str]:
    """Shards that earlier submissions still have in the queue, with their state. {} where there is no squeue to ask.

    Raises WorkFailed when squeue is there and does not answer: then submitting again could double the work.
    """
    found: dict[Shard, str] = {}
    for note in _notes(sweep_directory):
        shards = json.loads((note.parent / "manifest.json").read_text())["shards"]
        for job, offset in _arrays_of(json.loads(note.read_text())):
            for index, state in _queued(job):
                found[Shard(*shards[offset + int(index)])] = state
    return found


def merge_is_queued(sweep_directory: Path) -> bool:
    """Whether an earlier submission's merge job still waits or runs. Raises like `live_shards`."""
    jobs = [json.loads(note.read_text()).get("merge") for note in _notes(sweep_directory)]
    return any(job and _queued(job) for job in jobs)


def _arrays_of(note: JsonObject) -> Iterator[tuple[str, int]]:
    yield from ((each["job"], each["offset"]) for each in note.get("arrays", ()))
    if "array" in note:  # as it was noted while a submission was one array
        yield note["array"], 0


def _notes(sweep_directory: Path) -> list[Path]:
    return sorted(sweep_directory.glob(f"{OURS}/submission-*/{JOBS}")) if shutil.which("squeue") else []


def _queued(job: str) -> list[list[str]]:
    """[array index, state] of a job's tasks that squeue still lists; [] for a job it has forgotten."""
    asked = _run(["squeue", "--noheader", "--array", "--jobs", job, "--format=%K %T"])
    if asked.returncode and "Invalid job id" not in asked.stderr:
        raise WorkFailed(f"squeue does not answer: {asked.stderr.strip()}")
    return [line.split() for line in asked.stdout.splitlines()]


def _resources(options: Slurm | SlurmMerge) -> list[str]:
    named = ("partition", "account", "qos", "gres", "gpus", "nodelist", "cpus_per_task", "mem", "time")
    given = {name: getattr(options, name, None) for name in named}
    for extra in options.extra:
        if not extra.startswith("-") or not extra.isprintable():
            raise UserError(f"launch.slurm: extra holds {extra!r}; each entry is one option, e.g. --constraint=h100")
    return [
        "--nodes=1",
        "--ntasks=1",
        *(sbatch_option(name.replace("_", "-"), str(value)) for name, value in given.items() if value),
        *options.extra,
    ]


def _head(submission: Submission, options: list[str]) -> str:
    """What both scripts begin with. The user's lines run as in their own shell: ours is stricter only after them."""
    slurm = submission.launch.slurm
    lines = "\n".join(_setup_line(line) for line in slurm.setup)
    where = shlex.quote(slurm.chdir or str(OUR_CHECKOUT or Path.cwd()))
    sbatch = "\n".join(f"#SBATCH {option}" for option in options)
    return f"""#!/bin/bash{" -l" if slurm.login_shell else ""}
# Written by `qlibero sweep`, to run shards of manifest.json beside this file, or the merge after them.
# Running one again continues it: this file can be submitted again at any time.
{sbatch}
cd {where} || exit 1   # Slurm runs a copy of this file: $0 leads nowhere
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
{lines}
set -uo pipefail"""


def _setup_line(line: str) -> str:
    whole = subprocess.run(["bash", "-n"], input=line, capture_output=True, text=True)
    if whole.returncode:
        raise UserError(
            f"launch.slurm.setup: {line!r} is no whole shell command ({whole.stderr.strip().splitlines()[-1]}); write "
            "what belongs together as one entry"
        )
    said = shlex.quote(f"launch.slurm.setup failed: {line}")
    return f"{{ {line}\n}} || {{ echo {said} >&2; exit 1; }}"


def _in_container(submission: Submission, command: list[str]) -> str:
    """The container has a qlibero of its own, which is called by name."""
    prefix = submission.launch.slurm.container
    return f"{prefix} qlibero {shlex.join(command[3:])}" if prefix else shlex.join(command)


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


def _note_jobs(submission: Submission, jobs: JsonObject) -> None:
    files.replace(submission.directory / JOBS, json.dumps(jobs))


class SlurmEngine(Engine):
    """See the module's docstring."""

    more_memory = "set workers or launch.slurm.mem"
    describe = staticmethod(describe)
    submit = staticmethod(submit)
    live_shards = staticmethod(live_shards)
    merge_is_queued = staticmethod(merge_is_queued)

    def place(self, launch: Launch) -> Place:
        slurm = launch.slurm
        memory = gigabytes(slurm.mem) if slurm.mem else None
        return Place(slurm.cpus_per_task, memory, gpus_of(slurm), slurm.array_limit)

    def problems(self, launch: Launch) -> Iterator[str]:
        slurm = launch.slurm
        if seconds(slurm.time) <= slurm.signal_s:
            yield f"launch.slurm.time {slurm.time} is not longer than launch.slurm.signal_s {slurm.signal_s}"

    def jobs(self, missing: tuple[int, ...], chosen: bool) -> dict[str, int] | None:
        if not chosen and not shutil.which("scontrol"):
            return None
        size = max_array_size()
        arrays = len(array_offsets(missing, size))
        if chosen or arrays > 1:
            asked = "" if shutil.which("scontrol") else ", Slurm's default, for there is no scontrol here to ask"
            log.info(
                f"on Slurm: {count_text(len(missing), 'task')} in {count_text(arrays, 'job array')} "
                f"(MaxArraySize {size}{asked}), and a merge job after them"
            )
        return {"tasks": len(missing), "arrays": arrays, "merge_jobs": 1, "max_array_size": size}


ENGINE = SlurmEngine()
