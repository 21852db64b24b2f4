"""pi0: openpi's and LeRobot's checkpoints, run by pi0.5's own parts. This file is light: it only declares.

What differs from a pi0.5: the state is a token of the action expert's, the flow time enters with the actions through an
MLP, no norm is adaptive, chunks have 50 actions, states and actions are normalised by mean and standard deviation.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qlibero.policies.openpi_family import OpenpiFamily
from qlibero.policies.settings import CheckpointSettings
from qlibero.registry import PolicyPlugin

PLUGIN = PolicyPlugin(
    "pi0",
    "pi0: openpi's and LeRobot's checkpoints",
    provides="FAMILY",
    layouts=("llm", "expert", "llm+expert_mlp", "llm+expert"),
    order=2,
)


class Pi0(CheckpointSettings):
    """A pi0 run in this process."""

    type: Literal["pi0"]
    profile: Literal["auto", "openpi-pi0", "openpi-pi0-delta", "lerobot-pi0"] = Field(
        "auto", description="semantics the weights were trained under; auto: what the checkpoint's own files prove"
    )


FAMILY = OpenpiFamily("pi0", Pi0)
