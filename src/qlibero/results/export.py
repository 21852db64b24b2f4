"""Episodes as a flat table for people's own notebooks: CSV always, Parquet where pyarrow is installed.

One row per episode and arm. Per-call lists become percentiles; whoever needs every call reads the ledger
itself.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlibero.errors import UserError
from qlibero.files import replace
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import RunResults, read_runs
from qlibero.results.summary import percentiles, phase_calls, policy_calls

PLAIN = (
    "suite",
    "task",
    "init",
    "inits",
    "seed",
    "outcome",
    "steps",
    "success_step",
    "replans",
    "attempt",
    "sim_ms",
    "render_ms",
    "path_length_m",
    "jerk",
    "gripper_flips",
    "fingerprint",
    "action_digest",
    "error",
    "finished_at",
    "protocol",
    "max_steps",
    "replan_steps",
    "kernels",
    "config_hash",
    "identity",
    "probe",
    "machine",
)


def episode_rows(run: RunResults) -> list[dict[str, Any]]:
    """Rows with the same columns for every episode; `success` is 1, 0, or None for an error."""
    phases = list(dict.fromkeys(p for arm in run.arms.values() for r in arm.records for p in r.phases_ms))
    return [_row(run, name, record, phases) for name, arm in run.arms.items() for record in arm.records]


def _row(run: RunResults, arm: str, record: EpisodeRecord, phases: Sequence[str]) -> dict[str, Any]:
    calls = percentiles(policy_calls([record])) or {}
    by_phase = phase_calls([record])
    return {
        "run": run.name,
        "arm": arm,
        **{name: getattr(record, name) for name in PLAIN},
        "success": None if record.outcome == "error" else int(record.succeeded),
        **{f"policy_ms_{p}": calls.get(p) for p in ("p50", "p95", "p99")},
        **{
            f"{phase}_ms_p50": (percentiles(by_phase[phase]) or {}).get("p50") if phase in by_phase else None
            for phase in phases
        },
    }


def export_episodes(
    paths: Sequence[Path | str],
    out: Path | str,
    arms: Sequence[str] | None = None,
    tasks: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Write the episodes of one or several runs to `out` (.csv or .parquet). Returns {"file", "rows", "columns"}.

    `arms`, `tasks`: only these. Raises UserError for another suffix, a missing pyarrow or an arm that no run has,
    WorkFailed if the file cannot be written.
    """
    out = Path(out)
    if out.suffix not in (".csv", ".parquet"):
        raise UserError(f"export: {out.name} ends in neither .csv nor .parquet")
    runs = read_runs(paths)
    known = dict.fromkeys(arm for run in runs for arm in run.arms)
    for arm in arms or ():
        if arm not in known:
            raise UserError(f"export: --arm {arm}: the runs have {', '.join(known)}")
    rows = [
        row
        for run in runs
        for row in episode_rows(run)
        if (not arms or row["arm"] in arms) and (not tasks or row["task"] in tasks)
    ]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    replace(out, _parquet(rows, columns) if out.suffix == ".parquet" else _csv(rows, columns), "Choose another -o")
    return {"file": str(out), "rows": len(rows), "columns": columns}


def _csv(rows: list[dict[str, Any]], columns: list[str]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _parquet(rows: list[dict[str, Any]], columns: list[str]) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError("export: Parquet needs pyarrow (pip install 'qlibero[parquet]'); or write a .csv") from None
    table = pyarrow.table({column: [row.get(column) for row in rows] for column in columns})
    data = io.BytesIO()
    pyarrow.parquet.write_table(table, data)
    return data.getvalue()
