"""What `qlibero run` shows while it works: a bar with success counts and ETA, or plain lines when nobody watches."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qlibero.console import console
from qlibero.places import pasteable

if TYPE_CHECKING:
    from qlibero.config.schema import Experiment
    from qlibero.results.records import EpisodeRecord

PLAIN_EVERY_S = 30.0


class RunProgress:
    """Hears of every finished episode. On a terminal one live line; in a log file one line per half minute."""

    def __init__(self, experiment: Experiment):
        self.console = console()
        self.experiment = experiment
        self.tally = {arm.name: [0, 0, 0] for arm in experiment.arms()}  # successes, episodes, errors of this call
        self.missing = self.done = 0
        self.started = self.printed = time.monotonic()
        self.bar: Progress | None = None

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        """A line for the reader, above the bar."""
        self.console.print(pasteable(text))

    def start(self, missing: int, total: int) -> None:
        """The run begins: `missing` of `total` episodes, all arms together, are still to be run."""
        e = self.experiment
        (kind, count), seeds, arms = e.initial_states(), len(e.all_seeds()), ", ".join(self.tally)
        states = f"{count} {kind} initial states" + (f" × {seeds} seeds" if seeds > 1 else "")
        self.say(f"{e.name}: {e.suite}, {len(e.task_ids())} tasks × {states}, arms {arms}")
        if missing < total:
            self.say(
                f"{total - missing} of {total} episodes are in the ledger already"
                + (", nothing to run" if not missing else "")
            )
        self.missing, self.started = missing, time.monotonic()
        self.printed = self.started
        if missing and self.console.is_terminal:
            columns = (
                BarColumn(30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[tally]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[eta]}"),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=missing, tally="", eta="starting simulators")
            self.bar.start()

    def episode(self, record: EpisodeRecord) -> None:
        """One episode has been written to the ledger."""
        counts = self.tally[record.arm]
        counts[0] += record.outcome == "success"
        counts[1] += record.outcome != "error"
        counts[2] += record.outcome == "error"
        self.done += 1
        if self.bar is not None:
            self.bar.update(self.task, advance=1, tally=self._tallies(), eta=self._eta())
        elif time.monotonic() - self.printed > PLAIN_EVERY_S or self.done == self.missing:
            self.printed = time.monotonic()
            self.say(f"{self.done}/{self.missing} episodes  {self._tallies()}  {self._eta()}")

    def _tallies(self) -> str:
        return "  ".join(f"{arm} {k}/{n}" + (f" ({e} errors)" if e else "") for arm, (k, n, e) in self.tally.items())

    def _eta(self) -> str:
        elapsed = time.monotonic() - self.started
        if self.done == self.missing:
            return f"in {timedelta(seconds=round(elapsed))}"
        left = elapsed / self.done * (self.missing - self.done)
        return f"about {timedelta(seconds=round(left))} left"
