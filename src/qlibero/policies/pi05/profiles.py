"""Semantics profiles: what the same weights must be fed to mean what they were trained to mean.

The same file under the wrong profile scores 0 %, so a profile is part of a checkpoint's identity: it is
either proven by the checkpoint's own files or named by the user, and it is recorded with every result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from qlibero.frames import Resize

PromptMode = Literal["none", "prompt", "proj", "suffix"]
STATE_NUMBERS = 8
"""What LIBERO's robot has: position 3, axis-angle 3, gripper 2."""
BINS = 256


@dataclass(frozen=True)
class Profile:
    """One way of feeding a pi0.5."""

    name: str
    prompt: PromptMode
    """`none`: the task only (robot state is ignored altogether); `prompt`: state as 256-bin integers in the
    text; `proj`: state as a continuous token of the language model's; `suffix`: of the action expert's (pi0)."""
    state_numbers: int
    """How many state numbers enter (prompt: written into the text, zero-padded to this; proj: width of
    state_proj)."""
    resize: Resize
    statistics: Literal["openpi", "lerobot"]
    """Where statistics come from and how they are spelt, see `normalize.py`."""
    why: str
    cleaned: bool = True
    """The task is stripped, its underscores and line ends are blanks, and its final line end is a piece of its own."""
    adds_state: bool = False
    """Actions 0-5 are relative to the state: its first six numbers, as the robot has them, are added."""

    def text(self, prompt: str, state: np.ndarray) -> tuple[str, ...]:
        """The pieces of text to encode one after the other (a tokenizer must not merge across them)."""
        if not self.cleaned:
            return (f"{prompt}\n",)
        task = prompt.strip().replace("_", " ").replace("\n", " ")
        if self.prompt == "prompt":
            # Zero padding happens after normalisation, so a padded number is written as the bin of 0.0.
            padded = np.zeros(max(self.state_numbers, len(state)), np.float32)
            padded[: len(state)] = state
            bins = np.digitize(padded, np.linspace(-1, 1, BINS + 1)[:-1]) - 1
            return (f"Task: {task}, State: {' '.join(map(str, bins))};\nAction: ",)
        return (task, "\n")

    @property
    def states(self) -> np.ndarray:
        """(n, STATE_NUMBERS) normalised states that write every number there is, the same one in all places; one
        state where the text does not depend on it. The middle of each bin, and -2, which is written as -1."""
        values = [-2.0, *(-1 + (2 * i + 1) / BINS for i in range(BINS))] if self.prompt == "prompt" else [0.0]
        return np.repeat(np.array(values, np.float32)[:, None], STATE_NUMBERS, 1)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "openpi",
            "none",
            0,
            "pil",
            "openpi",
            "openpi's pi05_libero: discrete_state_input=False, the prompt is the task alone",
        ),
        Profile(
            "openpi-state",
            "prompt",
            8,
            "pil",
            "openpi",
            "openpi configs with discrete_state_input=True: 8 state numbers in the prompt",
        ),
        Profile(
            "lerobot-0.4",
            "prompt",
            32,
            "torch",
            "lerobot",
            "LeRobot 0.4.x padded the state to 32 numbers before writing it into the prompt "
            "(checkpoints of the v044 era)",
        ),
        Profile(
            "lerobot-0.6",
            "prompt",
            8,
            "torch",
            "lerobot",
            "LeRobot 0.5.1 and 0.6.x: 8 state numbers in the prompt",
        ),
        Profile(
            "qlibero",
            "proj",
            8,
            "area",
            "openpi",
            "compact policies trained by examples/libero: a continuous state token, images averaged 2×2",
        ),
    )
}
