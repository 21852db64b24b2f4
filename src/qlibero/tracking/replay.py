"""Replaying a run's ledger into a tracker while the run goes on, or after it.

What every tracker shows is decided in `rows.py`; the trackers only know how to log. The rows of an arm have a fixed
order, written down *before* a row is logged (`Order`): row i is logged as step i, so a tracker that says how many rows
it holds can be continued exactly, and one that cannot say is emptied and replayed from row 0. It is the order in which
episodes are planned (under `stop` the declared one), and a row's x is its episode's place in it: equal x is the same
episode in every arm. So while a run goes on an episode is shown once all before it are; the summary counts what has
finished. A note of what *was* logged would not do: a mirror killed between the two loses or doubles a row. A row whose
record the ledger has lost since (its tail was torn) and which the tracker does not hold is void: the episode is run
again and gets a new row.

Only finished episodes have rows. Errors are tried again by the next run, and a row cannot be taken back from a
tracker; they are counted in the summary.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qlibero import files
from qlibero.errors import QliberoError, WorkFailed
from qlibero.results.declaration import read_declaration
from qlibero.results.ledger import ArmLedger, arms_of, read_arm
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import read_run, video_path
from qlibero.tracking.mirror import children, write_state
from qlibero.tracking.rows import Row, arithmetic_summary, arm_summary, episode_row, versus_baseline

log = logging.getLogger(__name__)

LOCK_WAIT_S = 120
DRAIN_LIMIT_S = 90  # from the end of the launcher to the end of a mirror
POLL_S = 2.0  # how often a live mirror looks for new rows


class TrackerRun(Protocol):
    """One arm of one experiment in a tracker. `have`: how many rows, from row 0, it held when it was opened."""

    have: int

    def log(self, row: Row, step: int) -> None: ...
    def log_video(self, key: str, path: Path, row: Row, step: int) -> None: ...
    def summarize(self, summary: Row) -> None: ...
    def finish(self, rows: int) -> None: ...


class Order:
    """The arm's rows in a tracker's order: an episode key per line, or a video's path in the run directory."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._file = path, files.open_own(path, os.O_RDWR | os.O_APPEND)
        data = os.pread(self._file, os.fstat(self._file).st_size, 0)
        end = data.rfind(b"\n") + 1
        os.ftruncate(self._file, end)  # an entry that was cut was not logged either
        self.entries = data[:end].decode().splitlines()

    def append(self, entry: str) -> None:
        files.append(self._file, entry.encode() + b"\n", self._path)
        self.entries.append(entry)


@dataclass
class _Opened:
    """A tracker's run of an arm, which begins with the arm's first finished episode."""

    run: TrackerRun
    order: Order
    places: dict[str, int]
    """Of every planned episode, from 1, in order (see `planned_places`)."""
    void: set[str] = field(default_factory=set)
    """Entries that the ledger no longer has."""

    def in_order(self, records: Iterable[str], errors: Set[str], last: bool) -> list[str]:
        """Finished episodes that have a row by now: on the last look all, else those before which none is
        missing; an episode that ended in an error is not waited for."""
        found = dict.fromkeys(records)
        known = self.places if last else itertools.takewhile(lambda key: key in found or key in errors, self.places)
        return [key for key in known if key in found] + [key for key in found if key not in self.places]

    def place(self, entry: str) -> int:
        """From 1. An episode that is planned no more, or in no plan, stands behind those that are."""
        return self.places.setdefault(entry, len(self.places) + 1)


class ArmReplay:
    """One arm's rows on their way from the ledger into a tracker run."""

    def __init__(self, run_dir: Path, arm: str, tracker: str, open_run: Callable[[str, ArmLedger], TrackerRun]):
        self.run_dir, self.arm, self.tracker, self.open_run = run_dir, arm, tracker, open_run
        self.opened: _Opened | None = None
        self.rows = self.wins = self.finished = self.size = 0

    def catch_up(self, last: bool = False) -> None:
        """Log what is new. On the `last` call also the videos and the summary."""
        size = sum(path.stat().st_size for path in (self.run_dir / self.arm).glob("episodes-*.jsonl"))
        if size == self.size and not last:
            return
        self.size = size
        ledger = read_arm(self.run_dir, self.arm)
        records = {str(record.key): record for record in ledger.records if record.outcome != "error"}
        errors = {str(record.key) for record in ledger.records if record.outcome == "error"}
        videos = {name: record for record in records.values() if (name := self._video(record))} if last else {}
        if self.opened is None:
            if not records:
                return
            run = self.open_run(self.arm, ledger)
            order = Order(self.run_dir / self.arm / self.tracker / "order")
            self.opened = _Opened(run, order, planned_places(self.run_dir))
        to, order = self.opened, self.opened.order
        known = set(order.entries) - to.void
        for entry in (*to.in_order(records, errors, last), *videos):
            if entry not in known:
                order.append(entry)
        to.void -= records.keys()
        place = {entry: step for step, entry in enumerate(order.entries)}  # of two equal rows the earlier one is void
        while self.rows < len(order.entries):
            entry = order.entries[self.rows]
            if place[entry] == self.rows:
                self._log(to, entry, self.rows, records)
            self.rows += 1
        if not last:
            to.run.summarize(arm_summary(ledger))
        else:
            summary = arm_summary(ledger) | versus_baseline(self.run_dir, self.arm)
            to.run.summarize(summary | arithmetic_summary(self.run_dir, self.arm))

    def _log(
        self,
        to: _Opened,
        entry: str,
        step: int,
        records: Mapping[str, EpisodeRecord],
    ) -> None:
        if record := records.get(entry):
            self.finished += 1
            self.wins += record.succeeded
            place = to.place(entry)
            if step >= to.run.have:
                to.run.log(episode_row(record, place, self.finished, self.wins), step)
        elif step < to.run.have:
            return
        elif (path := self.run_dir / entry).suffix != ".mp4":
            to.void.add(entry)
        elif path.is_file():
            shown = next(record for record in records.values() if self._video(record) == entry)
            row: Row = {"episode": to.place(str(shown.key))}
            to.run.log_video(f"rollout/task{shown.task}/{shown.outcome}", path, row, step)

    def _video(self, record: EpisodeRecord) -> str | None:
        path = video_path(self.run_dir, record)
        return str(path.relative_to(self.run_dir)) if path.is_file() else None

    def finish(self) -> None:
        if self.opened is not None:
            self.opened.run.finish(self.rows)


def replay(
    run_dir: Path,
    tracker: str,
    open_run: Callable[[str, ArmLedger], TrackerRun],
    report: Callable[[dict[str, int]], None],
    *,
    arms: Sequence[str] | None = None,
    over: threading.Event | None = None,
) -> None:
    """Replay the arms of `run_dir` (all when None) until `over` is set, then drain; at once when `over` is None.

    `report({arm: finished episodes})` is called after each look at the ledger.
    """
    replays: dict[str, ArmReplay] = {}
    last = False
    while not last:
        last = over is None or over.wait(POLL_S)
        for arm in arms or arms_of(run_dir):
            if arm not in replays:
                replays[arm] = ArmReplay(run_dir, arm, tracker, open_run)
            replays[arm].catch_up(last)
        if not last:
            report({arm: one.finished for arm, one in replays.items()})
    for one in replays.values():
        one.finish()
    report({arm: one.finished for arm, one in replays.items()})


def program(
    tracker: str,
    open_run: Callable[[Path, str, ArmLedger], TrackerRun],
    prepare: Callable[[Path], None] = lambda run_dir: None,
) -> int:
    """A tracker's whole program: `python -m MODULE RUN_DIR [--follow]`; returns its exit status.

    The tracker is filled from row 0 each time: `prepare(run_dir)` empties it.
    """
    parser = argparse.ArgumentParser(description=f"Replay a run's ledger into {tracker}.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--follow", action="store_true", help="go on until standard input ends")
    options = parser.parse_args()
    run_dir = options.run_dir.resolve()
    over = until_launcher_ends(DRAIN_LIMIT_S) if options.follow else None
    try:
        with only_one(run_dir, tracker):
            prepare(run_dir)
            replay(
                run_dir,
                tracker,
                lambda arm, ledger: open_run(run_dir, arm, ledger),
                lambda rows: write_state(run_dir, tracker, {"mode": "local", "rows": rows}),
                over=over,
            )
    except QliberoError as problem:
        log.error(str(problem))
        return problem.exit_status
    return 0


@contextlib.contextmanager
def only_one(run_dir: Path, tracker: str) -> Iterator[None]:
    """One mirror per run directory: two would delete each other's work. An older one is waited for, it drains."""
    with open(files.open_own(run_dir / f".{tracker}-mirror.lock", os.O_RDWR), "rb+") as lock:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise WorkFailed(f"another {tracker} mirror of {run_dir} is still running") from None
                time.sleep(0.2)
        yield


def until_launcher_ends(drain_limit_s: float) -> threading.Event:
    """An event that is set when standard input ends, which is when the launcher has finished or died.

    From then on this process has `drain_limit_s` seconds; after that it ends itself and its children, so that nothing
    is left behind by a tracker that hangs.
    """
    over = threading.Event()

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        over.set()
        threading.Event().wait(drain_limit_s)
        log.error(f"still not drained {drain_limit_s:g} s after the end of the run: giving up")
        end_children()
        os._exit(4)

    threading.Thread(target=watch, daemon=True).start()
    return over


def end_children() -> None:
    """Kill what this process has started (a tracker's service process)."""
    for child in children(os.getpid()):
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)


def planned_places(run_dir: Path) -> dict[str, int]:
    """Place from 1 of every planned episode, by its key, in order; {} where the run's files do not say what is
    planned."""
    declared = read_declaration(run_dir)
    order = declared.spendable if declared is not None else read_run(run_dir).planned_order or ()
    return {str(key): place for place, key in enumerate(order, start=1)}
