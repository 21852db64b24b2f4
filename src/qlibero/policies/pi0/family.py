"""How checkpoints of pi0 are read and fed: profiles, LeRobot's steps, openpi's normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlibero.policies.pi0.model import Pi0Config, Pi0Model
from qlibero.policies.pi0.policy import Pi0Policy
from qlibero.policies.pi05.family import Family
from qlibero.policies.pi05.lerobot import SHARED_STEPS
from qlibero.policies.pi05.profiles import Profile

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "openpi-pi0",
            "suffix",
            8,
            "pil",
            "openpi",
            "openpi's pi0 with actions as the robot takes them: the prompt is the task, the state a token",
        ),
        Profile(
            "openpi-pi0-delta",
            "suffix",
            8,
            "pil",
            "openpi",
            "openpi's pi0_libero: extra_delta_transform=True, trained on actions minus state, so the state is added",
            adds_state=True,
        ),
        Profile(
            "lerobot-pi0",
            "suffix",
            8,
            "torch",
            "lerobot",
            "LeRobot 0.4.x to 0.6.x: the task as it is with a line end, the state a token",
            cleaned=False,
        ),
    )
}
_NEW_LINE = "pi0_new_line_processor"


def _lerobot(raw: Mapping[str, Any]) -> tuple[str, str]:
    return "lerobot-pi0", "LeRobot's pi0 has been fed alike in every version"


FAMILY = Family(
    name="pi0",
    title="pi0",
    config=Pi0Config,
    model=Pi0Model,
    policy=Pi0Policy,
    profiles=PROFILES,
    own_profile="openpi-pi0",
    openpi=(
        "openpi-pi0-delta",
        "openpi's files do not say whether actions were trained relative to the state; its pi0_libero configs do that "
        "(extra_delta_transform). The wrong one of openpi-pi0 and openpi-pi0-delta scores about 0 %",
    ),
    lerobot=_lerobot,
    lerobot_proves=True,
    # use_quantile_norm = model_type != ModelType.PI0
    openpi_mode=("mean_std", "openpi normalises every pi0 by mean and standard deviation"),
    steps={**SHARED_STEPS, _NEW_LINE: {}},
    order=("rename_observations_processor", _NEW_LINE, "tokenizer_processor"),
)
