"""Which actions are executed between two policy calls: as many as the policy is asked for, or as time goes on.

Sync: the simulator waits for the answer, then executes its first `replan_steps` actions. Async: the robot goes on while
the policy thinks, for `latency_steps` control steps of the chunk it has. The new chunk, made for the moment of its
observation, is entered at the action of the moment at which it arrives. Where there is no action, before the first
answer or behind a chunk's last one, the robot stands still and keeps its gripper as it is.

Counted in control steps, so an episode stays a function of its key: nothing here looks at a clock.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ACTION = 7
GRIPPER = 6
OPEN = -1.0  # the gripper before the first action, as LIBERO's settling steps command it


@dataclass(frozen=True)
class Pace:
    """`replan_steps`: control steps from one call to the next, or more where a call takes longer. `latency_steps`:
    control steps that go by before an answer is there; None: the simulator waits."""

    replan_steps: int
    latency_steps: int | None = None


class Chunks:
    """What one episode executes of its chunks."""

    def __init__(self, pace: Pace):
        self.pace = pace
        self._rest: np.ndarray | None = None  # of the chunk that is being executed, before the new one is there
        self._gripper = OPEN

    def next(self, chunk: np.ndarray) -> np.ndarray:
        """(n, 7) float32: the actions from the observation that `chunk` (H, 7) answers to the next observation."""
        pace = self.pace
        if pace.latency_steps is None:
            return chunk[: pace.replan_steps]
        late = pace.latency_steps
        steps = max(pace.replan_steps, late)
        # the scene has not changed while the robot waited for its first answer: nothing of that is outdated
        entered = 0 if self._rest is None else late
        until = entered + steps - late
        before = self._filled(chunk[:0] if self._rest is None else self._rest[:late], late)
        rows = np.concatenate([before, self._filled(chunk[entered:until], steps - late)])
        self._rest = chunk[until:]
        return rows

    def _filled(self, actions: np.ndarray, count: int) -> np.ndarray:
        """The actions, and standing still for what they lack of `count`."""
        if len(actions):
            self._gripper = float(actions[-1, GRIPPER])
        still = np.zeros((count - len(actions), ACTION), np.float32)
        still[:, GRIPPER] = self._gripper
        return np.concatenate([actions, still])
