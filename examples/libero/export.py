"""Make the shipped checkpoint: a training snapshot plus observations for quantization's calibration.

    python examples/libero/export.py --snapshot logs/training/snapshot --to examples/libero/embedded

`calibration.npz` gets a few moments of one demonstration per task. Their seeds are used by no training
example and no evaluation, and no official initial state is in them.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from demonstrations import FIRST_SEED, parse_tasks, record_episode
from placements import RADIUS

from qlibero.policies.base import Observation
from qlibero.policies.pi05.weights import WEIGHTS, sha256
from qlibero.quant.observations import write_demonstrations
from qlibero.sim.libero import CAMERAS
from qlibero.sim.scene import Scene

MOMENTS = 4  # of an episode
SOURCE = f"scripted demonstrations, seeds from {FIRST_SEED + 900_000_000} on; examples/libero/export.py"


def calibration(scene: Scene) -> list[Observation]:
    """Observations (256 px) of one demonstration in `scene`, from start to end; empty if the expert never succeeds."""
    first = FIRST_SEED + 900_000_000 + scene.task * 10_000
    episode = next((e for seed in range(first, first + 5) if (e := record_episode(scene, seed))), None)
    if episode is None:
        return []
    sim, seen = scene.env.sim, []
    sim.model.body_pos[:], sim.model.body_quat[:] = episode["body_pos"], episode["body_quat"]
    for index in np.linspace(0, len(episode["qpos"]) - 1, MOMENTS).astype(int):
        sim.data.qpos[:] = episode["qpos"][index]
        sim.forward()
        sim._render_context_offscreen.gl_ctx.make_current()
        frames = [sim.render(256, 256, camera_name=camera)[::-1, ::-1].copy() for camera in CAMERAS]
        seen.append(Observation(*frames, episode["states"][episode["frame_steps"][index]], scene.language))
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--snapshot", type=Path, default=Path("logs/training/snapshot"))
    parser.add_argument("--to", type=Path, default=Path("examples/libero/embedded"))
    parser.add_argument("--suites", nargs="+", default=list(RADIUS), choices=list(RADIUS))
    parser.add_argument("--tasks", default="0-9")
    arguments = parser.parse_args()
    shutil.copytree(arguments.snapshot, arguments.to, dirs_exist_ok=True)
    observations: list[Observation] = []
    for suite in arguments.suites:
        for task in parse_tasks(arguments.tasks):
            scene = Scene(suite, task)
            observations += calibration(scene)
            scene.close()
    write_demonstrations(arguments.to / "calibration.npz", observations, SOURCE)
    print(f"{arguments.to}: {len(observations)} observations, weights {sha256(arguments.to / WEIGHTS)}")


if __name__ == "__main__":
    main()
