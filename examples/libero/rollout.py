"""Let a checkpoint act in a scene: the tutorial's own small loop (experiments use `qlibero run`).

Replan after 5 of 10 actions, 10 flow steps, noise from the episode's key: the same episode that qlibero
would run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # noqa: F401  now, not later: it loads Triton, whose LLVM crashes if Mesa's is there first

from qlibero.config.schema import Pi05
from qlibero.episode_key import EpisodeKey
from qlibero.policies import load_policy
from qlibero.policies.base import Observation
from qlibero.run.noise import call_noise
from qlibero.sim.scene import Scene

REPLAN = 5


class Pilot:
    """A checkpoint directory as something that drives scenes, on one CPU core. `blind`: it gets black images."""

    def __init__(self, checkpoint: Path, blind: bool = False):
        torch.set_num_threads(1)
        self.policy = load_policy(Pi05(type="pi05", checkpoint=checkpoint, device="cpu"))
        self.blind = blind

    def steps(self, scene: Scene, init: int, seed: int) -> Iterator[bool]:
        """Act for ever in a scene that has just been reset; yields after every step whether the goal is reached."""
        key, call = EpisodeKey(scene.suite, scene.task, init, seed), 0
        while True:
            seen = scene.observation
            images = [seen.image, seen.wrist_image]
            if self.blind:
                images = [np.zeros_like(image) for image in images]
            observation = Observation(*images, seen.state, scene.language)
            noise = call_noise(key, call, self.policy.noise_shape)[None]
            actions = self.policy.infer([observation], noise).actions[0]
            call += 1
            for index, action in enumerate(actions[:REPLAN]):
                yield scene.step(action, observe=index == REPLAN - 1)

    def episode(self, scene: Scene, init: int, seed: int, max_steps: int) -> int | None:
        """The step of success, or None, in a scene that has just been reset."""
        for step, success in enumerate(self.steps(scene, init, seed), 1):
            if success:
                return step
            if step >= max_steps:
                return None
