"""The plan as tables for a terminal: what all cells have in common once, then what distinguishes them."""

from __future__ import annotations

from dataclasses import asdict

from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.launch.plan import CellPlan, Plan

Rows = list[JsonObject]

DETECTABLE = "detectable"  # a sentence: what so many pairs can find
ALONE = "one arm alone: there is no difference to detect"


def readable(found: Plan) -> list[tuple[str, Rows]]:
    """(title, rows) of each table."""
    cells = [_row(cell) for cell in found.cells]
    title = (
        f"{found.sweep}: {found.done:,} of {count_text(found.episodes, 'episode')} in the ledger, "
        f"in {count_text(found.shards, 'shard')}"
    )
    tables = []
    if len(cells) > 1:
        common = [key for key in cells[0] if len({str(cell[key]) for cell in cells}) == 1]
        tables.append(
            (f"{title}; {len(cells)} cells with", [{"of each cell": key, "": cells[0][key]} for key in common])
        )
        tables.append(
            ("and", [{key: value for key, value in cell.items() if key not in (*common, DETECTABLE)} for cell in cells])
        )
        if DETECTABLE not in common:
            tables.append(("what their pairs can find", _sentences(cells)))
    else:
        tables.append(
            (title, [{"of the experiment": key, "": value} for key, value in cells[0].items() if key != "cell"])
        )
    if found.engines:
        tables.append(
            (
                "what is missing, on each engine",
                [{"engine": name, **asdict(cost)} for name, cost in found.engines.items()],
            )
        )
    return tables


def _row(cell: CellPlan) -> JsonObject:
    each = cell.seconds_each or {}
    return {
        "cell": cell.cell,
        "suite": cell.suite,
        "arms": ", ".join(_arm(name, cell.overrides) for name in cell.arms),
        "episodes": f"{cell.done:,} of {cell.episodes:,} done",
        "shards": cell.shards,
        "s per episode": ", ".join(f"{arm} {seconds:g}" for arm, seconds in each.items()) or "not known yet",
        DETECTABLE: cell.detectable.sentence if cell.detectable else ALONE,
    }


def _arm(name: str, overrides: dict[str, list[str]]) -> str:
    """An arm, and what is not the experiment's own in its policy: what its pairs are then about."""
    return f"{name} ({', '.join(overrides[name])})" if name in overrides else name


def _sentences(cells: Rows) -> Rows:
    """Each sentence once, with the cells it is true of: beside every cell it would be told dozens of times."""
    alike: dict[str, list[str]] = {}
    for cell in cells:
        alike.setdefault(cell[DETECTABLE], []).append(cell["cell"])
    return [
        {"cells": len(names), DETECTABLE: sentence, "": names[0] + (f" and {len(names) - 1} more" if names[1:] else "")}
        for sentence, names in alike.items()
    ]
