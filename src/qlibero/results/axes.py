"""What a suite perturbs, so that verdicts can be given by axis: quantization on a saturated suite hides its losses."""

from __future__ import annotations

import re
from collections.abc import Collection

UNPERTURBED = "unperturbed"
_AXES = {"swap": "position", "object": "object", "lan": "instruction", "language": "instruction"}
_PRO = re.compile(r"libero_(?:spatial|object|goal|10)_(swap|object|lan|task)")
_PLUS = re.compile(r"libero_plus_(?:spatial|object|goal|10)_(camera|robot|noise|language|level)")


def axis_of(suite: str) -> str:
    """`position`, `object`, `instruction` or `task` for a suite of LIBERO-PRO, `camera`, `robot`, `noise`,
    `instruction` or `level` for one of LIBERO-plus, `unperturbed` for any other."""
    found = _PRO.fullmatch(suite) or _PLUS.fullmatch(suite)
    return _AXES.get(found[1], found[1]) if found else UNPERTURBED


def task_name(suite: str, task: int, suites: Collection[str]) -> str:
    """What a task is called among those of `suites`: its number, or SUITE/NUMBER where they are several."""
    return f"{suite}/{task}" if len(suites) > 1 else str(task)
