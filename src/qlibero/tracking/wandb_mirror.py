"""The ledger in Weights & Biases: `python -m qlibero.tracking.wandb_mirror RUN_DIR [--mode online]`.

One wandb run per arm, grouped by experiment. Offline by default: `wandb sync` uploads the directories later. The host
and the key come from the user's environment (WANDB_BASE_URL, WANDB_API_KEY or ~/.netrc) and are written nowhere.

Why it is built like this (measured on wandb 0.31.0): `run.log` raises into its caller when wandb's service process
dies, `finish` may block for ever on a dead server, and a killed process loses what was not flushed. So this is a
process of its own, every wait has an end, and after any exception it becomes a fresh process that starts over:
  - offline, the id's directories that were never uploaded are deleted and replayed from row 0;
  - online, the server says how many rows it has and the rest follows (the client *appends* to an id it finds there);
  - an id that may be on a server is never continued offline: what such a directory adds at `wandb sync` could double
    rows. The arm then gets a new id, and its run is whole again.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlibero import files
from qlibero.documents import JsonObject
from qlibero.errors import QliberoError, WorkFailed
from qlibero.registry import TrackerPlugin
from qlibero.results.effective import effective_settings, kernel_rows
from qlibero.results.ledger import ArmLedger
from qlibero.results.runs import read_run
from qlibero.tracking import replay, wandb_environment
from qlibero.tracking.mirror import children, read_state, write_state
from qlibero.tracking.rows import Row

if TYPE_CHECKING:
    import wandb

    from qlibero.config.schema import Tracking

log = logging.getLogger(__name__)

PLUGIN = TrackerPlugin("wandb", "Weights & Biases, offline by default", needs=("wandb",), order=1)
ATTEMPTS = 3  # replays in one life: the last one always offline
INIT_TIMEOUT_S = 10
FINISH_TIMEOUT_S = 30
DRAIN_LIMIT_S = 90  # from the end of the launcher to the end of this process, whatever happens
ROWS_NOTE = "qlibero-rows"  # in a finished offline directory: how many rows it holds up to


class WandbRun:
    """One arm as one wandb run (`replay.TrackerRun`)."""

    def __init__(self, run_dir: Path, arm: str, ledger: ArmLedger, options: argparse.Namespace):
        self.directory, self.arm = run_dir / arm, arm
        _check_writable(self.directory / "wandb")
        self.experiment = read_run(run_dir).experiment
        self.name = str(self.experiment.get("name") or run_dir.resolve().name)
        self.options, self.meta = options, ledger.meta
        if options.mode == "online":
            try:
                self._online()
            except Exception as problem:  # a missing key, a dead network, a refused host: kept for `wandb sync`
                log.warning(f"{arm}: online failed ({_discreet(problem)}), going on offline")
                options.mode = "offline"
                _restart(options)
        else:
            self._offline()
        self.run.define_metric("episode")
        self.run.define_metric("*", step_metric="episode")

    def _online(self) -> None:
        state = RunId.of(self.directory / "wandb", self.arm)
        forget_unsynced(self.directory / "wandb", state.run_id)
        self._init(state.online(), mode="online", resume="allow")
        self.have = self.run.step

    def _offline(self) -> None:
        state = RunId.of(self.directory / "wandb", self.arm)
        forget_unsynced(self.directory / "wandb", state.run_id)
        self.have = 0
        for marker in (self.directory / "wandb").glob(f"offline-run-*-{state.run_id}/*.synced"):
            note = marker.parent / ROWS_NOTE
            self.have = max(self.have, int(note.read_text())) if note.exists() else 0
            if not self.have:  # uploaded half-way: nobody here knows how many rows
                state = state.fresh()
                break
        if state.seen_online:
            state, self.have = state.fresh(), 0
        self._init(state, mode="offline")

    def _init(self, state: RunId, mode: Literal["online", "offline"], resume: Literal["allow"] | None = None) -> None:
        import wandb

        settings = effective_settings(self.experiment, self.arm, self.meta)
        self.run = wandb.init(
            project=self.options.project,
            entity=self.options.entity,
            id=state.run_id,
            name=f"{self.name}/{self.arm}",
            group=self.options.group or self.name,
            job_type=self.options.job_type,
            notes=self.options.notes,
            tags=list(dict.fromkeys([*_tags(settings), *self.options.tag])),
            dir=str(self.directory),
            config=settings,
            reinit="create_new",
            settings=_settings(),
            mode=mode,
            resume=resume,
        )
        try:
            self._attach()
        except Exception as problem:  # rows matter more, and the file lies beside them
            log.warning(f"{self.arm}: no artifact ({_discreet(problem)})")

    def _attach(self) -> None:
        """What the arm is, whole, as one artifact: its hundreds of layers would be hundreds of columns of a table."""
        import wandb

        record = wandb.Artifact(f"{self.run.id}-record", "qlibero-arm", "what the arm is: settings, kernels, layers")
        for path in (
            self.directory / "meta.json",
            *(self.directory.parent / name for name in ("experiment.yaml", "environment.json")),
        ):
            if path.is_file():
                record.add_file(str(path))
        if rows := kernel_rows(self.meta):
            record.add(wandb.Table(list(rows[0]), [list(row.values()) for row in rows]), "kernels")
        self.run.log_artifact(record)

    def log(self, row: Row, step: int) -> None:
        self.run.log(row, step=step, commit=True)

    def log_video(self, key: str, path: Path, row: Row, step: int) -> None:
        import wandb

        self.run.log({**row, key: wandb.Video(str(path), format="mp4")}, step=step, commit=True)

    def summarize(self, summary: Row) -> None:
        self.run.summary.update(summary)

    def finish(self, rows: int) -> None:
        self.run.finish()
        for directory in (self.directory / "wandb").glob(f"offline-run-*-{self.run.id}"):
            if not list(directory.glob("*.synced")):
                files.replace(directory / ROWS_NOTE, str(rows))


@dataclass(frozen=True)
class RunId:
    """The arm's wandb id, drawn once and kept beside the wandb directories; `seen_online`: a server may know it."""

    path: Path
    slug: str
    run_id: str
    seen_online: bool

    @classmethod
    def of(cls, directory: Path, arm: str) -> RunId:
        path, slug = directory / "run_id", re.sub("[^A-Za-z0-9-]+", "-", arm)
        if not path.exists():
            return cls(path, slug, "", False).fresh()
        run_id, _, seen = path.read_text().strip().partition(" ")
        return cls(path, slug, run_id, seen == "online")

    def fresh(self) -> RunId:
        return self._kept(RunId(self.path, self.slug, f"{self.slug}-{secrets.token_hex(4)}", False))

    def online(self) -> RunId:
        return self._kept(RunId(self.path, self.slug, self.run_id, True))

    @staticmethod
    def _kept(state: RunId) -> RunId:
        files.replace(state.path, state.run_id + (" online" if state.seen_online else "") + "\n")
        return state


def _tags(settings: JsonObject) -> list[str]:
    """The arm, and what of its settings people look for."""
    bits = (settings["weight_bits"], settings["activation_bits"])
    precision = "W{}A{}".format(*bits) if None not in bits else settings["dtype"]
    suites = settings["suite"] if isinstance(settings["suite"], list) else [settings["suite"]]
    said = (settings["arm"], settings["backend"], settings["method"], precision, *suites)
    return [str(word)[:64] for word in said if word]


def _settings() -> wandb.Settings:
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
        x_transaction_log_flush_interval=1,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_save_requirements=False,
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        symlink=False,
    )


def forget_unsynced(directory: Path, run_id: str) -> None:
    """Delete the id's wandb directories that were never uploaded: the replay that follows holds all they held."""
    for path in directory.glob(f"*run-*-{run_id}"):
        if not list(path.glob("*.synced")):
            shutil.rmtree(path)


def _check_writable(directory: Path) -> None:
    """wandb itself would go on in the system's temporary directory, with one warning nobody reads."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as problem:
        raise WorkFailed(f"{directory} cannot be written ({problem.strerror}): no wandb run for this arm") from problem


def _discreet(problem: BaseException) -> str:
    """An exception's text without the user's host and key."""
    text = " ".join(f"{type(problem).__name__}: {problem}".split())
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        if os.environ.get(name):
            text = text.replace(os.environ[name], f"${name}")
    return re.sub(r"https?://\S+", "<url>", text)[:300]


def _end_orphans(run_dir: Path) -> None:
    """End the service of a mirror that was killed: it may still be uploading, while the server is asked what it has."""
    for pid in read_state(run_dir, "wandb").get("service", []):
        with contextlib.suppress(OSError):
            if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


def arguments(tracking: Tracking) -> list[str]:
    """Of this program, from the experiment's settings."""
    found = ["--mode", tracking.mode, "--project", tracking.project]
    found += ["--entity", tracking.entity] if tracking.entity else []
    found += [f"--tag={tag}" for tag in tracking.tags] + [f"--job-type={tracking.job_type}"]
    found += [f"--group={tracking.group}"] * bool(tracking.group)
    return found + [f"--notes={tracking.notes}"] * bool(tracking.notes)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qlibero.tracking.wandb_mirror", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--arm", action="append", help="an arm to mirror; again for more (default: all)")
    parser.add_argument("--mode", choices=("offline", "online"), default="offline")
    parser.add_argument("--project", default="qlibero")
    parser.add_argument("--entity")
    parser.add_argument("--tag", action="append", default=[], help="beside the arm's name; again for more")
    parser.add_argument("--group", help="default: the experiment's name")
    parser.add_argument("--notes")
    parser.add_argument("--job-type", default="eval")
    parser.add_argument("--follow", action="store_true", help="go on until standard input ends")
    parser.add_argument("--attempt", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attempt == ATTEMPTS:
        options.mode = "offline"
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 10)  # never in the way of an episode
    for name in wandb_environment.TAKEN:  # start_mirrors has read them
        os.environ.pop(name, None)
    os.environ.pop("WANDB_SERVICE", None)  # of a launcher that uses wandb itself: its service may end before this does
    home = options.run_dir.resolve() / ".wandb"
    for name in ("data", "cache", "artifact"):
        os.environ.setdefault(f"WANDB_{name.upper()}_DIR", str(home / name))
    os.environ |= {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}

    def report(rows: dict[str, int]) -> None:
        state = {"mode": options.mode, "rows": rows, "attempt": options.attempt, "service": children(os.getpid())}
        write_state(options.run_dir, "wandb", state)

    over = replay.until_launcher_ends(DRAIN_LIMIT_S) if options.follow else None
    try:
        with replay.only_one(options.run_dir, "wandb"):
            _end_orphans(options.run_dir)
            replay.replay(
                options.run_dir,
                "wandb",
                lambda arm, ledger: WandbRun(options.run_dir, arm, ledger, options),
                report,
                arms=options.arm,
                over=over,
            )
    except QliberoError as problem:
        log.error(str(problem))
        return problem.exit_status
    except Exception as problem:
        log.error(f"replay {options.attempt} broke off: {_discreet(problem)}")
        if options.attempt < ATTEMPTS:
            options.attempt += 1
            _restart(options)
        replay.end_children()
        os._exit(1)  # wandb's exit handlers may wait for a service that is gone
    return 0


def _restart(options: argparse.Namespace) -> None:
    """Become a fresh mirror: same process id and standard input, none of wandb's state, service or exit handlers."""
    replay.end_children()
    command = [sys.executable, "-m", "qlibero.tracking.wandb_mirror", str(options.run_dir)]
    command += [f"--mode={options.mode}", f"--project={options.project}", f"--attempt={options.attempt}"]
    command += [f"--job-type={options.job_type}"] + [f"--tag={tag}" for tag in options.tag]
    command += [f"--{key}={value}" for key in ("group", "notes") if (value := getattr(options, key))]
    command += [f"--entity={options.entity}"] * bool(options.entity) + ["--follow"] * options.follow
    os.execv(sys.executable, command + [f"--arm={arm}" for arm in options.arm or ()])


if __name__ == "__main__":
    sys.exit(main())
