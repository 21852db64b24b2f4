"""What a suite perturbs, so that verdicts can be given by axis: quantization on a saturated suite hides its losses."""

from __future__ import annotations

import re
from collections.abc import Collection

UNPERTURBED = "unperturbed"
_AXES = {"swap": "position", "object": "object", "lan": "instruction", "task": "task"}
_PERTURBED = re.compile(r"libero_(?:spatial|object|goal|10)_(swap|object|lan|task)")


def axis_of(suite: str) -> str:
    """`position`, `object`, `instruction` or `task` for a suite of LIBERO-PRO, `unperturbed` for any other."""
    found = _PERTURBED.fullmatch(suite)
    return _AXES[found[1]] if found else UNPERTURBED


def task_name(suite: str, task: int, suites: Collection[str]) -> str:
    """What a task is called among those of `suites`: its number, or SUITE/NUMBER where they are several."""
    return f"{suite}/{task}" if len(suites) > 1 else str(task)
