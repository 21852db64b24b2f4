"""Run by test_purity in processes of its own: `purity_probe.py SUITE/TASK …` prints one JSON line a task.

Per task: digests of every reset in a sequence that visits one episode twice with other seeds, other initial states,
fresh placements and steps between; and whether LIBERO's own recompiling reset and step give the same bits.
"""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
from stock_libero import StockEpisodes, physics, rough_actions

from qlibero.sim.scene import Scene

VISITS = ((0, 7), (11, 8), (None, 3), (0, 7))


def sha(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def probe(suite: str, task: int, visits=VISITS) -> dict:
    scene = Scene(suite, task)
    seen = []
    for init, seed in visits:
        scene.reset(init, seed)
        model, now = scene.env.sim.model, scene.observation
        seen.append(
            {
                "visit": [init, seed],
                "fixtures": sha(model.body_pos, model.body_quat),
                "qpos": sha(scene.env.sim.data.qpos, scene.env.sim.data.qvel),
                "frames": sha(now.image, now.wrist_image, now.state),
                "fingerprint": scene.fingerprint(),
            }
        )
        ours = [physics(scene.env)]
        for action in rough_actions(4, seed):
            scene.step(action)
            ours.append(physics(scene.env))
    scene.close()
    init, seed = visits[-1]
    stock = StockEpisodes(suite, task, render=False)
    stock.reset_pure(init, seed)
    theirs = [physics(stock.control.env)]
    for action in rough_actions(4, seed):
        stock.control.step(action)
        theirs.append(physics(stock.control.env))
    equal = bool(np.array_equal(theirs, ours))
    stock.close()
    return {"suite": suite, "task": task, "seen": seen, "equals_stock": equal}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        suite, task = name.split("/")
        print(json.dumps(probe(suite, int(task))), flush=True)
