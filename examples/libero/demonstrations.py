"""Make demonstrations: scripted experts act in fresh scenes; physics now, pixels later.

    python examples/libero/demonstrations.py --suite libero_object --tasks 0-9 --episodes 60

One small npz an episode, named by its seed; what exists is not made again, so the same command continues.
Only the simulator's state is stored: `frames.py` renders it, because rendering is nine tenths of the cost
on a CPU, and a GPU renders the same states within seconds.

Why the episodes look as they do (facts behind it: README.md):
- Seeds start at 10⁹ and no official initial state is ever used, so evaluation is never seen.
- Half of the scenes have their objects displaced beyond the suite's spread (`placements.py`).
- Noise goes into the executed action, the label is the expert's clean action (DART): AR(1), and random kicks.
- A third of the episodes start in trouble: blocked above a rim, closed on nothing, the object dropped, the
  arm astray. Only what the expert does about it is recorded.
- With `--policy`, the trouble is the policy's own: it drives for a while, then the expert takes over
  (DAgger).
"""

from __future__ import annotations

import argparse
import bdb
import os
from pathlib import Path

import numpy as np
from experts import PickPlace, make_expert
from placements import RADIUS, displace

from qlibero.sim.scene import Scene, axis_angle
from qlibero.sim.suites import SUITES

FIRST_SEED = 1_000_000_000
FRAME_EVERY = 3  # steps between stored states
STARTS = {"calm": 0.64, "blocked": 0.09, "empty": 0.09, "dropped": 0.09, "astray": 0.09}
NOISE = {"none": (0.25, 0.0, False), "mild": (0.45, 0.15, False), "strong": (0.30, 0.30, True)}
_AXES = np.array([1, 1, 0.7, 0.3, 0.3, 0.5])  # noise per action axis


def record_episode(scene: Scene, seed: int, drive=None) -> dict[str, np.ndarray] | None:
    """One demonstration in a scene drawn from `seed`, or None if it went wrong.

    `drive(scene, rng)`, if given, brings the scene into the state where the expert takes over; returning
    False means there is nothing to correct. Arrays: actions (T, 7) clean labels; states (T, 8) before each
    action; frame_steps (F,); at those steps qpos (F, nq) and aims (F, 2, 3); body_pos, body_quat: the
    fixtures' places; language; start.
    """
    from robosuite.utils.errors import RandomizationError

    rng = np.random.default_rng(seed)
    try:
        scene.reset(None, seed)
    except (RandomizationError, bdb.BdbQuit):
        return None  # LIBERO found no place for its objects; it calls the debugger before it says so
    if rng.random() < 0.5 and not displace(scene, rng, 0.0, RADIUS[scene.suite]):
        return None
    if drive is not None:
        start = "policy"
        if not drive(scene, rng):
            return None
    else:
        start = str(rng.choice(list(STARTS), p=list(STARTS.values())))
        if start != "calm" and not _trouble(scene, rng, start):
            return None

    _, sigma, kicks = NOISE[str(rng.choice(list(NOISE), p=[p for p, _, _ in NOISE.values()]))]
    expert, data = make_expert(scene.env), scene.env.sim.data
    phase = int(rng.integers(FRAME_EVERY))
    noise, kick, kick_left = np.zeros(6), np.zeros(6), 0
    actions, states, frame_steps, qpos, aims = [], [], [], [], []
    for step in range(SUITES[scene.suite].max_steps):
        if step == 0 or step % FRAME_EVERY == phase:
            frame_steps.append(step)
            qpos.append(np.array(data.qpos, np.float32))
            aims.append(expert.aims().astype(np.float32))
        states.append(proprioception(scene.env))
        actions.append(expert.act())
        executed = actions[-1].copy()
        if sigma:
            noise = 0.6 * noise + 0.8 * sigma * rng.standard_normal(6) * _AXES
            if kicks and kick_left == 0 and rng.random() < 0.04 and expert.phase not in ("close", "open", "turn"):
                kick, kick_left = rng.uniform(-1, 1, 6) * _AXES * 0.8, int(rng.integers(2, 6))
            executed[:6] += noise + (kick if kick_left else 0)
            kick_left = max(0, kick_left - 1)
        if scene.step(np.clip(executed, -1, 1)):
            return {
                "actions": np.array(actions, np.float32),
                "states": np.array(states, np.float32),
                "frame_steps": np.array(frame_steps, np.int32),
                "qpos": np.array(qpos),
                "aims": np.array(aims),
                "body_pos": np.array(scene.env.sim.model.body_pos, np.float32),
                "body_quat": np.array(scene.env.sim.model.body_quat, np.float32),
                "language": np.array(scene.language),
                "start": np.array(start),
            }
    return None


def proprioception(env) -> np.ndarray:
    """The (8,) float32 state that the evaluation gives to policies, read off the simulator without rendering."""
    robot, data = env.robots[0], env.sim.data
    w, x, y, z = data.get_body_xquat(robot.robot_model.eef_name)
    return np.concatenate(
        [
            data.site_xpos[robot.eef_site_id],
            axis_angle(np.array([x, y, z, w])),
            data.qpos[robot._ref_gripper_joint_pos_indexes],
        ]
    ).astype(np.float32)


def _trouble(scene: Scene, rng: np.random.Generator, start: str) -> bool:
    """Bring the scene into trouble; False if that failed (or solved the task)."""
    expert = make_expert(scene.env)
    if start == "astray" or not isinstance(expert, PickPlace):
        heading = rng.uniform(-1, 1, 6) * _AXES
        grip = float(rng.choice([-1.0, 1.0], p=[0.7, 0.3]))
        for _ in range(int(rng.integers(8, 30))):
            heading = 0.9 * heading + 0.3 * rng.standard_normal(6) * _AXES
            if scene.step(np.clip([*heading, grip], -1, 1)):
                return False
        return True
    low, high = {"blocked": (0.010, 0.030), "empty": (0.025, 0.05), "dropped": (0.0, 0.0)}[start]
    angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(low, high)
    expert.grasp_offset = np.array([radius * np.cos(angle), radius * np.sin(angle), 0.0])
    last_phase, wait = {"blocked": ("down", 6), "empty": ("close", 11), "dropped": ("move", 12)}[start]
    wait = int(rng.integers(1, wait + 1))
    for _ in range(120):
        if scene.step(expert.act()):
            return False
        if expert.phase == last_phase and expert.clock >= wait:
            break
    else:
        return False
    if start == "dropped":
        for _ in range(int(rng.integers(3, 9))):
            if scene.step([*(rng.uniform(-0.4, 0.4, 6) * _AXES), -1.0]):
                return False
    return True


def parse_tasks(text: str) -> list[int]:
    """ "0,3-5" → [0, 3, 4, 5]."""
    spans = [part.split("-") for part in text.split(",")]
    return [task for span in spans for task in range(int(span[0]), int(span[-1]) + 1)]


def save(path: Path, arrays: dict[str, np.ndarray] | None) -> None:
    """Write an episode whole or not at all; an empty `.failed` file marks a seed that gave none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if arrays is None:
        path.with_suffix(".failed").touch()
        return
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", required=True, choices=list(RADIUS))
    parser.add_argument("--tasks", default="0-9", help="such as 0,3-5")
    parser.add_argument("--episodes", type=int, default=60, help="seeds tried per task")
    parser.add_argument("--out", type=Path, default=Path("logs/demonstrations"))
    parser.add_argument("--policy", type=Path, help="checkpoint directory: DAgger, the policy drives first")
    parser.add_argument("--round", type=int, default=0, help="separates the seeds of DAgger rounds")
    arguments = parser.parse_args()
    drive = None
    if arguments.policy:
        from dagger import PolicyDriver

        drive = PolicyDriver(arguments.policy)
    for task in parse_tasks(arguments.tasks):
        scene = Scene(arguments.suite, task, resolution=256 if drive else 16)
        made = 0
        for episode in range(arguments.episodes):
            seed = FIRST_SEED + arguments.round * 1_000_000 + task * 10_000 + episode
            path = arguments.out / arguments.suite / f"{task:02d}" / f"{seed}.npz"
            if not path.exists() and not path.with_suffix(".failed").exists():
                save(path, record_episode(scene, seed, drive))
            made += path.exists()
        print(
            f"{arguments.suite} task {task}: {made} of {arguments.episodes} seeds gave a demonstration",
            flush=True,
        )
        scene.close()


if __name__ == "__main__":
    main()
