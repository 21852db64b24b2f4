"""What `qlibero run` and `videos` show while they work: a line that lives, or plain lines when nobody watches.

Every phase has its line: what is under way (`activity`), how far, how long it has taken and what is left of it. What is
left of a run counts from its first episode on, so that start-up, which does not come again, makes no ETA longer.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from qlibero.activity import heard_by
from qlibero.console import console, count_text, log_to
from qlibero.places import pasteable

if TYPE_CHECKING:
    from qlibero.config.schema import Experiment
    from qlibero.results.records import EpisodeRecord

PLAIN_EVERY_S = 30.0
EPISODES = "episodes"


class PhaseProgress:
    """Hears what is under way. On a terminal one live line; in a log file a line when it begins, then two a minute."""

    def __init__(self) -> None:
        self.console = console()
        self.phase, self.started, self.printed = "", time.monotonic(), 0.0
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(heard_by(self.doing))
            stack.enter_context(log_to(self.say))
            self._hears = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hears.__exit__(kind, error, trace)
        self.stop()

    def stop(self) -> None:
        """Take the live line away, so that something whole can be printed; the next phase brings it back."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = self.task = None

    def say(self, text: str) -> None:
        """A line for the reader, above the live one; what is logged meanwhile is shown so."""
        self.console.print(pasteable(text), markup=False)

    def doing(self, what: str, done: int = 0, total: int = 0) -> None:
        """The listener of `activity`."""
        if what != self.phase:
            self.phase, self.started = what, time.monotonic()
            self.printed = self.started if self.console.is_terminal else 0.0
        self._show(what, done, total, what)

    def _show(self, what: str, done: int, total: int, text: str) -> None:
        """The live line, or a plain one when half a minute has passed since the last, or the phase begins or ends."""
        eta = self._eta(done, total)
        if self.console.is_terminal:
            if self.bar is None:
                columns = (BarColumn(30), TextColumn("{task.description}"), TimeElapsedColumn())
                self.bar = Progress(*columns, TextColumn("{task.fields[eta]}"), console=self.console, transient=True)
                self.bar.start()
            if self.task is None or self.bar.tasks[0].fields["phase"] != what:
                if self.task is not None:
                    self.bar.remove_task(self.task)
                self.task = self.bar.add_task("", total=total or None, eta="", phase=what)
            count = f"{done}/{total} " if total else ""
            self.bar.update(self.task, completed=done, total=total or None, description=escape(count + text), eta=eta)
        elif time.monotonic() - self.printed > PLAIN_EVERY_S or (total and done == total):
            self.printed = time.monotonic()
            self.say(f"{done}/{total} {text}  {eta}".rstrip() if total else text)

    def _eta(self, done: int, total: int) -> str:
        elapsed = time.monotonic() - self.started
        if not done or not total:
            return ""
        if done == total:
            return f"in {timedelta(seconds=round(elapsed))}"
        return f"about {timedelta(seconds=round(elapsed * (total - done) / self._equivalent(done)))} left"

    def _equivalent(self, done: int) -> float:
        """Parts done, those under way included."""
        return done


class RunProgress(PhaseProgress):
    """Hears of every finished episode too, and counts successes."""

    def __init__(self, experiment: Experiment):
        super().__init__()
        self.experiment = experiment
        self.tally = {arm.name: [0, 0, 0] for arm in experiment.arms()}  # successes, episodes, errors of this call
        self.missing = self.done = 0
        self.in_flight = 0

    def start(self, missing: int, total: int) -> None:
        """The run begins: `missing` of `total` episodes, all arms together, are still to be run."""
        e = self.experiment
        (kind, count), seeds, arms = e.initial_states(), len(e.all_seeds()), ", ".join(self.tally)
        states = count_text(count, f"{kind} initial state") + (f" × {seeds} seeds" if seeds > 1 else "")
        self.say(f"{e.name}: {', '.join(e.suites)}, {count_text(len(e.all_tasks()), 'task')} × {states}, arms {arms}")
        if missing < total:
            self.say(
                f"{total - missing} of {count_text(total, 'episode')} in the ledger already"
                + (", nothing to run" if not missing else "")
            )
        self.missing = missing

    def doing(self, what: str, done: int = 0, total: int = 0) -> None:
        """The listener of `activity`; episodes are announced with the number of simulators as `done`."""
        if what == EPISODES:
            self.in_flight, done, total = done, 0, self.missing
        super().doing(what, done, total)

    def episode(self, record: EpisodeRecord) -> None:
        """One episode has been written to the ledger."""
        counts = self.tally[record.arm]
        counts[0] += record.outcome == "success"
        counts[1] += record.outcome != "error"
        counts[2] += record.outcome == "error"
        self.done += 1
        self._show(EPISODES, self.done, self.missing, f"episodes  {self._tallies()}")

    def _equivalent(self, done: int) -> float:
        # the others in flight are on average half done
        return done + (self.in_flight - 1) / 2 if self.phase == EPISODES and self.in_flight else done

    def _tallies(self) -> str:
        return "  ".join(
            f"{arm} {k}/{n}" + (f" ({count_text(e, 'error')})" if e else "") for arm, (k, n, e) in self.tally.items()
        )
