"""Give demonstrations their pixels: render the stored states, and note where things are in them.

    python examples/libero/frames.py --demonstrations logs/demonstrations --out logs/frames

Each episode becomes one npz of training examples: both cameras at 128 px (rendered at 256 and averaged
2×2, as the policy will see them), state, the chunk of the next 10 clean actions, and privileged targets for
auxiliary losses.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from demonstrations import parse_tasks
from network import HORIZON, KINDS, SIZE
from placements import RADIUS

from qlibero.frames import resize_area
from qlibero.sim.libero import CAMERAS
from qlibero.sim.scene import Scene

INSTANCES = 2  # of one kind in a scene (the two bowls of libero_spatial)


def examples(scene: Scene, episode: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Training examples of one recorded episode, F rows.

    images (F, 2, 128, 128, 3) uint8; states (F, 8); chunks (F, 10, 7), the last action repeated past the
    end; keypoints (F, 2, 20, 2, 2) float16: (row, column) in [-1, 1] of each camera's kinds, NaN when
    absent or out of view; aims (F, 2, 3) metres and aim_pixels (F, 2 cameras, 2 aims, 2), likewise;
    language.
    """
    model, data = scene.env.sim.model, scene.env.sim.data
    model.body_pos[:], model.body_quat[:] = episode["body_pos"], episode["body_quat"]
    images, keypoints, aim_pixels = [], [], []
    for qpos, aims in zip(episode["qpos"], episode["aims"], strict=True):
        data.qpos[:] = qpos
        scene.env.sim.forward()
        images.append(render(scene))
        keypoints.append(_keypoints(scene))
        aim_pixels.append(np.stack([project(scene, camera, aims) for camera in CAMERAS]))
    steps = episode["frame_steps"]
    ahead = np.minimum(steps[:, None] + np.arange(HORIZON), len(episode["actions"]) - 1)
    return {
        "images": np.stack(images),
        "states": episode["states"][steps],
        "chunks": episode["actions"][ahead],
        "keypoints": np.stack(keypoints),
        "aims": episode["aims"],
        "aim_pixels": np.stack(aim_pixels).astype(np.float16),
        "language": episode["language"],
    }


def render(scene: Scene) -> np.ndarray:
    """Both cameras of the present state, (2, 128, 128, 3) uint8, upright."""
    sim = scene.env.sim
    sim._render_context_offscreen.gl_ctx.make_current()
    frames = [sim.render(2 * SIZE, 2 * SIZE, camera_name=camera)[::-1, ::-1] for camera in CAMERAS]
    return np.stack([np.rint(resize_area(frame, SIZE)).astype(np.uint8) for frame in frames])


def project(scene: Scene, camera: str, points: np.ndarray) -> np.ndarray:
    """(row, column) in [-1, 1] of world points (N, 3) in the upright frame; NaN outside it."""
    model, data = scene.env.sim.model._model, scene.env.sim.data._data
    index = model.camera(camera).id
    local = (points - data.cam_xpos[index]) @ data.cam_xmat[index].reshape(3, 3)
    depth = -local[:, 2]
    scale = 1 / (np.maximum(depth, 1e-3) * np.tan(np.deg2rad(model.cam_fovy[index]) / 2))
    pixels = np.stack([-local[:, 1] * scale, -local[:, 0] * scale], -1)  # the frame is turned by 180°, mirrored once
    pixels[(depth < 1e-3) | (np.abs(pixels) > 1).any(1)] = np.nan
    return pixels


def _keypoints(scene: Scene) -> np.ndarray:
    env = scene.env
    found = np.full((len(CAMERAS), len(KINDS), INSTANCES, 2), np.nan, np.float16)
    names = sorted(env.obj_body_id)
    points = np.stack([*(env.sim.data._data.xpos[env.obj_body_id[name]] for name in names), scene.eef_position()])
    for camera, name_of_camera in enumerate(CAMERAS):
        pixels = project(scene, name_of_camera, points)
        found[camera, KINDS.index("gripper"), 0] = pixels[-1]
        for name, pixel in zip(names, pixels[:-1], strict=True):
            kind, number = name.rsplit("_", 1)
            found[camera, KINDS.index(kind), int(number) - 1] = pixel
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demonstrations", type=Path, default=Path("logs/demonstrations"))
    parser.add_argument("--out", type=Path, default=Path("logs/frames"))
    parser.add_argument("--suite", choices=list(RADIUS), help="default: all")
    parser.add_argument("--tasks", default="0-9")
    arguments = parser.parse_args()
    for suite in [arguments.suite] if arguments.suite else RADIUS:
        for task in parse_tasks(arguments.tasks):
            source = arguments.demonstrations / suite / f"{task:02d}"
            target = arguments.out / suite / f"{task:02d}"
            todo = [path for path in sorted(source.glob("*.npz")) if not (target / path.name).exists()]
            if not todo:
                continue
            scene = Scene(suite, task)
            scene.reset(None, 0)
            for path in todo:
                with np.load(path) as episode:
                    save(target / path.name, examples(scene, dict(episode)))
            print(f"{suite} task {task}: rendered {len(todo)} episodes", flush=True)
            scene.close()


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Uncompressed (training reads it often), whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
