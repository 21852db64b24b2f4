"""Starting and ending a mirror, the process that replays a run's ledger into a tracker while the run goes on.

A tracker may hang, die or lose its network; an episode must not notice. So the launcher only ever starts a process and,
at the end, waits for it for a bounded time. The launcher holds the write end of the mirror's standard input and never
writes to it: end of file is how the mirror learns that the run is over, also when the launcher was killed. The mirror
then drains what the ledger has and exits by itself. Whatever goes wrong, the ledger can be replayed again.

A tracker is a module that declares a `TrackerPlugin` and is a program: `python -m MODULE RUN_DIR [--follow]`, with what
its `arguments(tracking)` gives, if it has that function. `replay.program` is all of such a program but the tracker's
own log.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qlibero import files
from qlibero.documents import JsonObject
from qlibero.errors import QliberoError, UserError
from qlibero.registry import TrackerPlugin, get
from qlibero.tracking import wandb_environment

if TYPE_CHECKING:
    from qlibero.config.schema import Tracking

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MirrorEnd:
    """How a mirror ended: how many rows it has of each arm, and the command that replays the ledger `again`."""

    tracker: str
    complete: bool
    mode: str | None
    rows: dict[str, int]
    problem: str | None
    again: str

    def told(self, tracking: Tracking) -> str | None:
        """What to tell people; None when all is well."""
        if not self.complete:
            problem = self.problem or "failed"
            return f"{self.tracker} mirror {problem}; the ledger has everything, and this replays it: {self.again}"
        if tracking.mode == "online" and self.mode == "offline":
            return (
                f"{self.tracker} could not be reached and went on offline; once it can, this replays the ledger: "
                f"{self.again}"
            )
        return None

    def to_json(self) -> JsonObject:
        return asdict(self)


@dataclass
class Mirror:
    """One mirror process of one tracker."""

    tracker: str
    module: str
    run_dir: Path
    arguments: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    problem: str | None = None

    def end(self) -> None:
        """Tell the mirror that the run is over; returns at once."""
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    def finish(self, timeout_s: float = 60.0) -> MirrorEnd:
        """Tell the mirror that the run is over and wait at most `timeout_s` seconds for it.

        A mirror that was killed is started once more to replay the ledger; one that does not end in time is killed.
        Never raises.
        """
        deadline = time.monotonic() + timeout_s
        self.end()
        status = _wait(self.process, deadline)
        if status is not None and status < 0:
            _spawn(self)  # it was killed on the way: one more replay, from row 0
            self.end()
            status = _wait(self.process, deadline)
        state = read_state(self.run_dir, self.tracker)
        problem = self.problem
        if status is None and self.process is not None:
            _kill(self.process)
            problem = f"did not end within {timeout_s:g} s and was stopped"
        elif status:
            problem = f"ended with status {status}, see {log_path(self.run_dir, self.tracker)}"
        again = shlex.join([sys.executable, "-m", self.module, str(self.run_dir), *self.arguments])
        return MirrorEnd(self.tracker, status == 0, state.get("mode"), state.get("rows", {}), problem, again)


@dataclass(frozen=True)
class Mirrors:
    """The mirrors of one run; none when tracking is disabled."""

    mirrors: tuple[Mirror, ...]

    def finish(self, timeout_s: float = 60.0) -> list[MirrorEnd]:
        """End all of them, `timeout_s` seconds at most in total; how each ended. Never raises."""
        deadline = time.monotonic() + timeout_s
        for mirror in self.mirrors:
            mirror.end()
        return [mirror.finish(max(0.5, deadline - time.monotonic())) for mirror in self.mirrors]


def start_mirrors(run_dir: Path | str, tracking: Tracking) -> Mirrors:
    """Start a mirror process for every tracker of `tracking`. Takes milliseconds and never raises.

    Call it when `run_dir` exists and holds experiment.yaml, in the one process that owns the run directory (the shards
    of a sweep have none; the merge that follows them does).
    """
    try:
        tracking, notes = wandb_environment.apply(tracking, os.environ)
    except ValueError as problem:
        notes = [f"the WANDB_* variables are not used: {' '.join(str(problem).split())[:300]}"]
    for note in notes:
        log.warning(note)
    if tracking.mode == "disabled":
        return Mirrors(())
    mirrors = []
    for tracker in tracking.trackers:
        mirror = _mirror(tracker, Path(run_dir), tracking)
        if mirror.problem is None:
            _spawn(mirror)
        mirrors.append(mirror)
    return Mirrors(tuple(mirrors))


def _mirror(tracker: str, run_dir: Path, tracking: Tracking) -> Mirror:
    """Not started yet; with a `problem` where its module does not load."""
    try:
        plugin = get(TrackerPlugin, tracker)
        arguments = getattr(plugin.load(), "arguments", None)
    except UserError as problem:
        return Mirror(tracker, tracker, run_dir, (), problem=f"could not be started: {problem}")
    return Mirror(tracker, plugin.module, run_dir, tuple(arguments(tracking)) if arguments else ())


def _spawn(mirror: Mirror) -> None:
    mirror.process = None
    environment = dict(os.environ, PYTHONUNBUFFERED="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", mirror.module, str(mirror.run_dir), "--follow", *mirror.arguments]
    try:
        with files.open_log(log_path(mirror.run_dir, mirror.tracker)) as log:
            # Its own session: Ctrl-C in the terminal ends the run, and the mirror still gets to drain.
            mirror.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )
    except (OSError, QliberoError) as error:
        mirror.problem = f"could not be started: {error}"


def _wait(process: subprocess.Popen[bytes] | None, deadline: float) -> int | None:
    if process is None:
        return None
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the mirror and what it started: wandb's service lives in a session of its own."""
    for child in children(process.pid):
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)
    process.kill()
    process.wait()


def children(pid: int) -> list[int]:
    """Process ids of the living direct children of `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == str(pid) and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def log_path(run_dir: Path, tracker: str) -> Path:
    """Where the mirror's own output goes."""
    return Path(run_dir) / f"{tracker}-mirror.log"


def state_path(run_dir: Path, tracker: str) -> Path:
    return Path(run_dir) / f"{tracker}-mirror.json"


def read_state(run_dir: Path, tracker: str) -> JsonObject:
    """What the mirror last said about itself: {"mode", "rows": {arm: n}, "problem"}; empty when it said nothing."""
    try:
        found: JsonObject = json.loads(state_path(run_dir, tracker).read_text())
        return found
    except (OSError, ValueError):
        return {}


def write_state(run_dir: Path, tracker: str, state: JsonObject) -> None:
    files.replace(state_path(run_dir, tracker), json.dumps(state, indent=1))
