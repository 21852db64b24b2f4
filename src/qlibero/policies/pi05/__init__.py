"""pi0.5, from the compact embedded policy to the published 3.35 B checkpoint. This file is light: it only declares."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qlibero.policies.openpi_family import OpenpiFamily
from qlibero.policies.settings import CheckpointSettings
from qlibero.registry import PolicyPlugin

PLUGIN = PolicyPlugin(
    "pi05",
    "pi0.5: openpi's, LeRobot's and qlibero's checkpoints",
    provides="FAMILY",
    layouts=("llm", "expert", "llm+expert_mlp", "llm+expert"),
    order=1,
)


class Pi05(CheckpointSettings):
    """A pi0.5 (or compact pi0.5) run in this process."""

    type: Literal["pi05"]
    profile: Literal["auto", "openpi", "openpi-state", "lerobot-0.4", "lerobot-0.6", "qlibero"] = Field(
        "auto", description="semantics the weights were trained under; auto: what the checkpoint's own files prove"
    )


FAMILY = OpenpiFamily("pi05", Pi05)
