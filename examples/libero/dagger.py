"""DAgger: the policy drives until something is worth correcting; the expert shows what should have been done.

`drive` gives the policy a random number of steps. If it has solved the task by then there is nothing to
learn; otherwise a fresh expert takes over wherever the scene has come to, and `demonstrations.py` records
its corrections.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rollout import Pilot

from qlibero.sim.scene import Scene
from qlibero.sim.suites import SETTLE_ACTION


class PolicyDriver:
    """A `drive` for `demonstrations.record_episode`."""

    def __init__(self, checkpoint: Path):
        self.pilot = Pilot(checkpoint)

    def __call__(self, scene: Scene, rng: np.random.Generator) -> bool:
        """False if the policy solved the task before its time was up."""
        scene.step(SETTLE_ACTION, observe=True)  # objects may have been displaced since the last frame
        wanted = int(rng.integers(10, 170))
        for step, success in enumerate(self.pilot.steps(scene, -1, int(rng.integers(1 << 31))), 1):
            if success:
                return False
            if step >= wanted:
                return True
        return False
