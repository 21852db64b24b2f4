"""What the files of a checkpoint say about how it is to be run, in one form whoever wrote them.

A number that they say and that will run is taken. One that they say and qlibero runs otherwise is listed by
`differences`, for `checkpoint verify` and the head of a run. One that they do not say stays None here.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlibero.console import count_text

AGENT, WRIST = 0, 1
"""LIBERO's two cameras, in the order of an observation."""


@dataclass(frozen=True)
class Declared:
    """See the module's docstring. `where` is the file that says it."""

    where: str
    action_horizon: int | None = None
    """Actions of a chunk."""
    flow_steps: int | None = None
    executed_steps: int | None = None
    """Actions executed of a chunk before the next is asked for."""
    max_token_len: int | None = None
    min_period: float | None = None
    max_period: float | None = None
    cameras: tuple[int, ...] = (AGENT, WRIST)
    """Which of LIBERO's cameras the network sees first, which second."""
    remarks: tuple[str, ...] = ()
    """What else is in the files and worth saying."""


def differences(declared: Declared, flow_steps: int, replan_steps: int) -> list[str]:
    """One line for each number in which a run with these settings differs from what the checkpoint declares."""
    lines = []
    if declared.flow_steps not in (None, flow_steps):
        lines.append(
            f"{declared.where} declares {count_text(declared.flow_steps, 'flow step')}, {flow_steps} run "
            "(policy.flow_steps)"
        )
    if declared.executed_steps not in (None, replan_steps):
        lines.append(
            f"{declared.where} declares {count_text(declared.executed_steps, 'executed action')} of a "
            f"chunk, {replan_steps} are "
            "executed (policy.replan_steps)"
        )
    return lines
