"""In what two arms differ besides quantization: then a paired difference is the difference of all of that together.

Pairs stay pairs as long as their scenes are the same: another checkpoint, another number of flow steps or of executed
actions is a fair question. But the answer must say what was asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qlibero.documents import JsonObject
from qlibero.results.pairing import Arm

Unlike = dict[str, tuple[Any, Any]]
"""What differs → (of the reference, of the arm); None where it does not apply."""

OF_POLICY = ("profile", "dtype", "device", "flow_steps", "action_horizon", "url")


def unlike(reference: Arm, other: Arm) -> Unlike:
    """In what the two differ, as far as their meta.json and records say. {} for an A/A arm."""
    sides = [_about(arm) for arm in (reference, other)]
    if sides[0]["policy"] != sides[1]["policy"]:  # of another kind of policy nothing else is comparable
        names: tuple[str, ...] = ("policy", "replan_steps", "latency_steps")
    else:
        names = tuple(dict.fromkeys(name for side in sides for name in side))
    return {name: (a, b) for name in names if (a := sides[0].get(name)) != (b := sides[1].get(name))}


def _about(arm: Arm) -> JsonObject:
    said = arm.meta.policy
    return {
        "policy": said.type,
        "weights": f"{said.name or ''} {said.sha256[:8]}".strip() if said.sha256 else None,
        **{name: getattr(said, name) for name in OF_POLICY},
        "replan_steps": _only(record.replan_steps for record in arm.records.values()),
        "latency_steps": _only(record.latency_steps for record in arm.records.values()),
    }


def _only(values: Iterable[Any]) -> Any:
    """The value that all have; None where there is none, or they differ."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def unlike_text(found: Unlike) -> str:
    """`flow_steps 1 instead of 10, replan_steps 10 instead of 5 (another protocol of the policy)`."""
    return ", ".join(
        f"{name} {_shown(b)} instead of {_shown(a)}"
        + (" (another protocol of the policy)" if name == "replan_steps" else "")
        for name, (a, b) in found.items()
    )


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
