"""The ledger in trackio, a dashboard without an account: `python -m qlibero.tracking.trackio_mirror RUN_DIR`.

Look at it with `TRACKIO_DIR=RUN_DIR/trackio trackio show`. Optional: `pip install 'qlibero[trackio]'`. The database is
SQLite in write-ahead mode inside the run directory, which network file systems do not support: there, mirror afterwards
on a local copy. trackio has no summary, no own x axis and no way to continue a run exactly, and a kill costs it its
last rows. So the database is made anew from row 0 each time, its rows are counted at the end, and the summary is
a last row.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import sys
from pathlib import Path

from qlibero.errors import QliberoError, UserError, WorkFailed
from qlibero.results.ledger import ArmLedger
from qlibero.results.runs import read_run
from qlibero.tracking import replay
from qlibero.tracking.mirror import write_state

DRAIN_LIMIT_S = 90


class TrackioRun:
    """One arm as one trackio run (`replay.TrackerRun`)."""

    have = 0

    def __init__(self, run_dir: Path, arm: str, ledger: ArmLedger):
        import trackio

        experiment = read_run(run_dir).experiment
        self.arm, self.rows, self.database = arm, 0, run_dir / "trackio"
        project = str(experiment.get("name") or run_dir.resolve().name)
        config = {"arm": arm, "experiment": experiment, "meta": ledger.meta}
        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self.run = trackio.init(project=project, name=arm, group=project, config=config, **quiet)

    def log(self, row: dict, step: int) -> None:
        self.run.log(row, step=step)
        self.rows += 1

    def log_video(self, key: str, path: Path, row: dict, step: int) -> None:
        import trackio

        self.log({**row, key: trackio.Video(path, format="mp4")}, step)

    def summarize(self, summary: dict) -> None:
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
            raise WorkFailed(f"trackio holds {stored} of {self.rows} rows of {self.arm}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qlibero.tracking.trackio_mirror", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--project", help=argparse.SUPPRESS)  # the experiment's name is the project here
    parser.add_argument("--follow", action="store_true", help="go on until standard input ends")
    options = parser.parse_args()
    run_dir = options.run_dir.resolve()
    os.environ |= {"TRACKIO_DIR": str(run_dir / "trackio"), "HF_HUB_OFFLINE": "1"}  # read when trackio is imported
    over = replay.until_launcher_ends(DRAIN_LIMIT_S) if options.follow else None
    try:
        try:
            import trackio  # noqa: F401
        except ImportError:
            raise UserError(
                "tracking: trackio is not installed; pip install 'qlibero[trackio]', or remove it from tracking"
            ) from None
        with replay.only_one(run_dir, "trackio"):
            shutil.rmtree(run_dir / "trackio", ignore_errors=True)
            replay.replay(
                run_dir,
                "trackio",
                lambda arm, ledger: TrackioRun(run_dir, arm, ledger),
                lambda rows: write_state(run_dir, "trackio", {"mode": "local", "rows": rows}),
                over=over,
            )
    except QliberoError as problem:
        print(problem, file=sys.stderr, flush=True)
        return problem.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
