"""Does the policy see? Its success as it is, with its targets displaced, and of a twin trained on black images.

    controls.py --checkpoint examples/libero/embedded --suite libero_object
    controls.py --checkpoint examples/libero/embedded --suite libero_object --displaced 0.03 0.08
    controls.py --checkpoint logs/blind/snapshot --suite libero_object --blind

A policy that memorised coordinates passes the first and fails the second; one that needs its eyes cannot
be matched by the third, which had the same data and the same number of training steps. Every finished task is
a line of `--out`; the same command continues there.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
from demonstrations import parse_tasks
from placements import RADIUS, displace
from rollout import Pilot

from qlibero.policies.pi05.weights import WEIGHTS, sha256
from qlibero.sim.scene import Scene
from qlibero.sim.suites import SETTLE_ACTION, SUITES
from qlibero.stats.proportions import wilson

SEED = 7


def evaluate(pilot: Pilot, scene: Scene, episodes: int, displaced: tuple[float, float] | None) -> tuple[int, int]:
    """(successes, episodes run) from official initial states, the target moved by `displaced` metres if given.

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
    parser.add_argument("--episodes", type=int, default=20, help="per task")
    parser.add_argument("--displaced", type=float, nargs=2, metavar=("LOW", "HIGH"), help="metres, such as 0.03 0.08")
    parser.add_argument("--blind", action="store_true", help="give the policy black images")
    parser.add_argument("--out", type=Path, default=Path("logs/controls.jsonl"))
    arguments = parser.parse_args()
    displaced = tuple(arguments.displaced) if arguments.displaced else None
    condition = {
        "weights": sha256(arguments.checkpoint / WEIGHTS),
        "suite": arguments.suite,
        "displaced": arguments.displaced,
        "blind": arguments.blind,
        "states": arguments.episodes,
    }
    done = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    pilot = Pilot(arguments.checkpoint, arguments.blind)
    won = run = 0
    for task in parse_tasks(arguments.tasks):
        row = next((row for row in done if row.items() >= {**condition, "task": task}.items()), None)
        if row is None:
            scene = Scene(arguments.suite, task)
            successes, episodes = evaluate(pilot, scene, arguments.episodes, displaced)
            row = {**condition, "task": task, "successes": successes, "episodes": episodes}
            append(arguments.out, row)
            scene.close()
        print(f"{arguments.suite} task {task}: {row['successes']}/{row['episodes']}", flush=True)
        won, run = won + row["successes"], run + row["episodes"]
    low, high = wilson(won, run)
    print(json.dumps({**condition, "successes": won, "episodes": run, "wilson95": [round(low, 4), round(high, 4)]}))


def append(path: Path, row: dict) -> None:
    """One line in one write, so that processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, (json.dumps(row) + "\n").encode())
    os.close(file)


if __name__ == "__main__":
    main()
