"""The ledger in trackio, a dashboard without an account: `python -m qlibero.tracking.trackio_mirror RUN_DIR`.

Look at it with `TRACKIO_DIR=RUN_DIR/trackio trackio show`. Optional: `pip install 'qlibero[trackio]'`. The database is
SQLite in write-ahead mode inside the run directory, which network file systems do not support: there, mirror afterwards
on a local copy. trackio has no summary, no own x axis and no way to continue a run exactly, and a kill costs it its
last rows. So the database is made anew from row 0 each time, its rows are counted at the end, and the summary is
a last row.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
from pathlib import Path

from qlibero.console import count_text
from qlibero.errors import UserError, WorkFailed
from qlibero.registry import TrackerPlugin
from qlibero.results.effective import effective_settings
from qlibero.results.ledger import ArmLedger
from qlibero.results.runs import read_run
from qlibero.tracking import replay
from qlibero.tracking.rows import Row

PLUGIN = TrackerPlugin("trackio", "a dashboard without an account, on this machine", needs=("trackio",), order=2)


class TrackioRun:
    """One arm as one trackio run (`replay.TrackerRun`)."""

    have = 0

    def __init__(self, run_dir: Path, arm: str, ledger: ArmLedger):
        import trackio

        experiment = read_run(run_dir).experiment
        self.arm, self.rows, self.database = arm, 0, run_dir / "trackio"
        self.following = 1  # the first step behind all rows
        project = str(experiment.get("name") or run_dir.resolve().name)
        config = effective_settings(experiment, arm, ledger.meta)
        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self.run = trackio.init(project=project, name=arm, group=project, config=config, **quiet)

    def log(self, row: Row, step: int) -> None:
        place = int(row.get("episode", self.following))  # trackio's x axis is its step
        self.run.log(row, step=place)
        self.following = max(self.following, place + 1)
        self.rows += 1

    def log_video(self, key: str, path: Path, row: Row, step: int) -> None:
        import trackio

        self.log({**row, key: trackio.Video(path, format="mp4")}, step)

    def summarize(self, summary: Row) -> None:
        self.last = {f"summary/{name}": value for name, value in summary.items()}

    def finish(self, rows: int) -> None:
        self.log(self.last, rows)
        self.run.finish()
        stored = 0
        for path in self.database.glob("*.db"):
            with sqlite3.connect(path) as connection:
                stored += connection.execute("SELECT count(*) FROM metrics WHERE run_name = ?", (self.arm,)).fetchone()[
                    0
                ]
        if stored != self.rows:
            raise WorkFailed(f"trackio holds {stored} of {count_text(self.rows, 'row')} of {self.arm}")


def prepare(run_dir: Path) -> None:
    """An empty database, made before trackio is imported, which reads where it is then."""
    os.environ |= {"TRACKIO_DIR": str(run_dir / "trackio"), "HF_HUB_OFFLINE": "1"}
    try:
        import trackio  # noqa: F401
    except ImportError:
        raise UserError(
            "tracking: trackio is not installed; pip install 'qlibero[trackio]', or remove it from tracking"
        ) from None
    shutil.rmtree(run_dir / "trackio", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(replay.program("trackio", TrackioRun, prepare))
