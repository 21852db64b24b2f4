"""The dataset card of an export: what a stranger needs to use the table, and to doubt it."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.results.episode_table import COLUMNS, SCHEMA, VERSION
from qlibero.results.runs import RunResults, suites_of


def dataset_card(file: str, rows: Sequence[JsonObject], header: JsonObject, runs: Sequence[RunResults]) -> str:
    """Markdown with the front matter of a Hugging Face dataset; `file` lies beside it."""
    size = next(name for most, name in _SIZES if len(rows) < most)
    front: JsonObject = {
        "pretty_name": f"LIBERO episodes: {', '.join(header['runs'])}",
        "tags": ["robotics", "LIBERO", "evaluation", "qlibero"],
        "size_categories": [size],
    }
    if file.endswith(".parquet"):
        front["configs"] = [{"config_name": "default", "data_files": [{"split": "test", "path": file}]}]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
            "---",
            f"# {front['pretty_name']}",
            "",
            f"{count_text(len(rows), 'evaluation episode')} of vision-language-action policies on LIBERO, "
            "one row an episode and "
            f"arm, written by qlibero {header['qlibero']} as `{SCHEMA}` version {VERSION}.",
            "",
            *(line for run in runs for line in _about(run, rows)),
            "## Judge it again",
            "",
            "```",
            "pip install qlibero",
            f"qlibero compare {file}",
            "```",
            "",
            "pairs the arms by episode key and scene fingerprint and prints the verdicts; "
            + ("the first line" if file.endswith(".jsonl") else f"the file's metadata (key `{SCHEMA}`)")
            + " holds each run's experiment, environment and arms, as JSON.",
            "",
            "## Columns",
            "",
            "| column | type | meaning |",
            "|---|---|---|",
            *(f"| `{name}` | {kind.replace('_', ' of ')} | {about} |" for name, (kind, about) in COLUMNS.items()),
            "",
        ]
    )


_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1e18, "100K<n<1M"))


def _about(run: RunResults, rows: Sequence[JsonObject]) -> list[str]:
    said, told = run.experiment, run.environment
    suites = ", ".join(suites_of(said)) or "?"
    versions = ", ".join(f"{name} {number}" for name, number in (told.get("versions") or {}).items())
    lines = [
        f"## {run.name}",
        "",
        f"Suite {suites}, protocol {said.get('protocol', '?')}, margin {said.get('margin', '?')}, "
        f"estimand {said.get('estimand', '?')}. {versions}.",
        "",
        "| arm | policy | successes | errors |",
        "|---|---|---|---|",
    ]
    for name, arm in run.arms.items():
        mine = [row for row in rows if row["run"] == run.name and row["arm"] == name]
        finished = [row["success"] for row in mine if row["success"] is not None]
        what = " ".join(filter(None, (arm.meta.policy.name, arm.meta.policy.dtype)))
        if mine:
            label = arm.meta.label or name
            lines.append(f"| {label} | {what} | {sum(finished)}/{len(finished)} | {len(mine) - len(finished)} |")
    return [*lines, ""]
