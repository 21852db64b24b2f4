"""How far objects move between a suite's episodes: official initial states, fresh resets, and our demonstrations.

    python examples/libero/spread.py --suites libero_object libero_spatial libero_goal --resets 10

Prints, per suite, the mean and largest range (centimetres, over objects and tasks) of the objects'
positions. It is why demonstrations are widened: a policy could memorise coordinates that do not vary.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from demonstrations import FIRST_SEED, parse_tasks
from placements import RADIUS, displace

from qlibero.sim.scene import Scene


def positions(scene: Scene) -> np.ndarray:
    """(objects, 2) metres of the movable objects, in a fixed order."""
    return np.stack(
        [scene.env.sim.data.body_xpos[scene.env.obj_body_id[n]][:2] for n in sorted(scene.env.objects_dict)]
    )


def ranges(suite: str, task: int, resets: int) -> dict[str, np.ndarray]:
    """For each source, the range (objects,) in centimetres along the axis on which an object moves most."""
    scene = Scene(suite, task, resolution=16)
    seen: dict[str, list[np.ndarray]] = {"official": [], "fresh": [], "widened": []}
    for index in range(resets):
        scene.reset(index * 50 // resets, 7)
        seen["official"].append(positions(scene))
        scene.reset(None, FIRST_SEED + index)
        seen["fresh"].append(positions(scene))
        if displace(scene, np.random.default_rng(index), 0.0, RADIUS[suite]):
            seen["widened"].append(positions(scene))
    scene.close()
    return {source: 100 * np.ptp(np.stack(xy), axis=0).max(-1) for source, xy in seen.items() if xy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suites", nargs="+", default=list(RADIUS), choices=list(RADIUS))
    parser.add_argument("--tasks", default="0-9")
    parser.add_argument("--resets", type=int, default=10, help="per task and source")
    arguments = parser.parse_args()
    table: dict[str, dict[str, dict[str, float]]] = {}
    for suite in arguments.suites:
        found: dict[str, list[np.ndarray]] = {}
        for task in parse_tasks(arguments.tasks):
            for source, values in ranges(suite, task, arguments.resets).items():
                found.setdefault(source, []).append(values)
        joined = {source: np.concatenate(values) for source, values in found.items()}
        table[suite] = {
            source: {"mean_cm": round(float(v.mean()), 2), "largest_cm": round(float(v.max()), 2)}
            for source, v in joined.items()
        }
        for source, row in table[suite].items():
            print(f"{suite:16s} {source:9s} mean {row['mean_cm']:5.2f} largest {row['largest_cm']:5.2f} cm")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
