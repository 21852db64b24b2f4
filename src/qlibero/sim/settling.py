"""Initial states that do not hold still: objects released in overlap are thrown apart while the scene settles.

Every arm meets the same ones, so they cost power and no fairness: all are kept, and `qlibero lint --settle SUITE`
lists them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlibero.sim.suites import SETTLE_ACTION, SETTLE_STEPS

THROWN = 0.03
"""Metres sideways within the settle steps, of any object: what merely comes to rest stays below 1 cm."""
LOST = 0.2
"""Metres sideways, or down, of an object that the goal names."""
FIXTURES_BY = 7  # the seed that places fixtures: some lie 15 mm elsewhere with another


@dataclass(frozen=True)
class Thrown:
    """What became of an initial state: which `thing` went furthest `sideways`, in metres; "" where none is thrown."""

    init: int
    thing: str
    sideways: float
    lost: bool
    """An object that the goal names is out of its place: nobody can be asked to solve this."""
    solved: bool
    """The goal is true before anybody has moved."""


def settle(suite: str, task: int) -> Iterator[Thrown]:
    """Settle every official initial state of a task in a simulator; those in which something is thrown, or that are
    solved as they stand. Takes about 10 s and 2 GB."""
    from qlibero.sim.scene import Scene
    from qlibero.sim.suites import init_states

    scene = Scene(suite, task, resolution=64)
    try:
        scene.reset(0, FIXTURES_BY)
        env = scene.env
        wanted = {str(name) for fact in env.parsed_problem["goal_state"] for name in fact[1:]}
        bodies = {name: env.obj_body_id[name] for name in env.objects_dict}
        for init, state in enumerate(init_states(suite, task)):
            scene.enter(state)
            before = _positions(env, bodies)
            solved = False
            for _ in range(SETTLE_STEPS):
                solved = scene.step(SETTLE_ACTION)
            moved = _positions(env, bodies) - before
            sideways = np.linalg.norm(moved[:, :2], axis=1)
            worst = int(sideways.argmax())
            lost = any(name in wanted and (sideways[i] > LOST or moved[i, 2] < -LOST) for i, name in enumerate(bodies))
            if sideways[worst] > THROWN or lost or solved:
                thing = list(bodies)[worst] if sideways[worst] > THROWN else ""
                yield Thrown(init, thing, round(float(sideways[worst]), 3), lost, solved)
    finally:
        scene.close()


def _positions(env: Any, bodies: dict[str, int]) -> np.ndarray:
    return np.array([env.sim.data.body_xpos[index] for index in bodies.values()])
