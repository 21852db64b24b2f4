"""Does the policy see? Its success as it is, with its targets displaced, and of a twin trained on black
images.

    controls.py --checkpoint examples/libero/embedded --suite libero_object --episodes 10
    controls.py --checkpoint examples/libero/embedded --suite libero_object --displaced 0.03 0.08
    controls.py --checkpoint logs/blind/snapshot --suite libero_object --blind

A policy that memorised coordinates passes the first and fails the second; one that needs its eyes cannot
be matched by the third, which had the same data and the same number of training steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from demonstrations import parse_tasks
from placements import RADIUS, displace
from rollout import Pilot

from qlibero.results.statistics import wilson
from qlibero.sim.scene import Scene
from qlibero.sim.suites import SETTLE_ACTION, SUITES

SEED = 7


def evaluate(
    pilot: Pilot, scene: Scene, episodes: int, displaced: tuple[float, float] | None
) -> tuple[int, int]:
    """(successes, episodes run) from official initial states, the target moved by `displaced` metres if
    given.

    The expert's own target is moved: the first argument of the goal. States in which it cannot be moved
    that far without a collision are left out.
    """
    target = scene.env.parsed_problem["goal_state"][0][1]
    won = run = 0
    for init in range(episodes):
        scene.reset(init, SEED)
        if displaced is not None:
            if not displace(scene, np.random.default_rng(init), *displaced, only=target):
                continue
            scene.step(SETTLE_ACTION, observe=True)
        run += 1
        won += pilot.episode(scene, init, SEED, SUITES[scene.suite].max_steps) is not None
    return won, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--suite", required=True, choices=list(RADIUS))
    parser.add_argument("--tasks", default="0-9")
    parser.add_argument("--episodes", type=int, default=10, help="per task")
    parser.add_argument(
        "--displaced", type=float, nargs=2, metavar=("LOW", "HIGH"), help="metres, such as 0.03 0.08"
    )
    parser.add_argument("--blind", action="store_true", help="give the policy black images")
    arguments = parser.parse_args()
    pilot = Pilot(arguments.checkpoint, arguments.blind)
    won = run = 0
    for task in parse_tasks(arguments.tasks):
        scene = Scene(arguments.suite, task)
        displaced = tuple(arguments.displaced) if arguments.displaced else None
        a, b = evaluate(pilot, scene, arguments.episodes, displaced)
        print(f"{arguments.suite} task {task}: {a}/{b}  {scene.language}", flush=True)
        won, run = won + a, run + b
        scene.close()
    low, high = wilson(won, run)
    print(
        json.dumps(
            {
                "suite": arguments.suite,
                "displaced": arguments.displaced,
                "blind": arguments.blind,
                "successes": won,
                "episodes": run,
                "wilson95": [round(low, 4), round(high, 4)],
            }
        )
    )


if __name__ == "__main__":
    main()
