"""Risk: the local dashboard differs from the ledger. The real trackio, its database read with sqlite3."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from test_wandb_mirror import assert_equal_to_ledger, wait_until, write

from qlibero.config.schema import Tracking
from qlibero.tracking.mirror import log_path, read_state, start_mirrors

pytestmark = pytest.mark.slow

pytest.importorskip("trackio", reason="needs trackio: pip install 'qlibero[trackio]'")


def rows(run: Path, arm: str) -> list[dict]:
    (path,) = (run / "trackio").glob("*.db")
    with sqlite3.connect(path) as connection:
        found = connection.execute("SELECT metrics FROM metrics WHERE run_name = ? ORDER BY step", (arm,)).fetchall()
    return [json.loads(row) for (row,) in found]


def test_database_equals_the_ledger_after_a_kill(tmp_path):
    run = tmp_path / "run"
    write(run, "baseline", range(5))
    (mirror,) = start_mirrors(run, Tracking(trackers=("trackio",))).mirrors
    wait_until(lambda: read_state(run, "trackio").get("rows", {}).get("baseline") == 5, 90)
    mirror.process.kill()
    write(run, "baseline", range(5, 8))
    write(run, "fake", range(8))
    said = mirror.finish(90)
    assert said.complete and said.rows == {"baseline": 8, "fake": 8}, (said, log_path(run, "trackio").read_text())
    for arm in ("baseline", "fake"):
        assert_equal_to_ledger(rows(run, arm), run, arm)
    assert rows(run, "fake")[-1]["summary/versus_baseline/pairs"] == 8
    assert rows(run, "baseline")[-1]["summary/successes"] == 5
