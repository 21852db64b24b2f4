"""A kind of network with openpi's names: all in which its checkpoints and policy differ from those of its siblings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlibero.policies.pi05.config import Pi05Config
from qlibero.policies.pi05.lerobot import SHARED_STEPS
from qlibero.policies.pi05.model import Pi05Model
from qlibero.policies.pi05.normalize import Mode
from qlibero.policies.pi05.policy import Pi05Policy
from qlibero.policies.pi05.profiles import PROFILES, Profile


@dataclass(frozen=True)
class Family:
    """`name` is the word of a config's `policy.type` and of LeRobot's config.json, `title` the one for people."""

    name: str
    title: str
    config: type[Pi05Config]
    model: type[Pi05Model]
    policy: type[Pi05Policy]
    profiles: Mapping[str, Profile]
    own_profile: str
    """Of weights that were trained here, or not at all."""
    openpi: tuple[str, str]
    """The likely profile of openpi's files, and why."""
    lerobot: Callable[[Mapping[str, Any]], tuple[str, str]]
    """The same of LeRobot's, from its config.json."""
    lerobot_proves: bool
    """Whether LeRobot's files prove it."""
    openpi_mode: tuple[Mode, str]
    """How openpi normalises, which its files do not say, and why."""
    steps: Mapping[str, Mapping[str, Any]]
    """LeRobot's processor steps, see `lerobot.py`."""
    order: tuple[str, ...]
    """Of those steps, the order that matters."""

    @property
    def format(self) -> str:
        """What config.json of our own kind of directory says."""
        return f"qlibero-{self.name}-1"


def _lerobot(raw: Mapping[str, Any]) -> tuple[str, str]:
    # Read off LeRobot's tags: 0.5.1 added `use_relative_actions` to the config, 0.5.0 stopped padding the
    # state to 32.
    new = "use_relative_actions" in raw
    reason = (
        "LeRobot's files do not record the version that trained the weights: 0.4.x wrote 32 state numbers into the "
        f"prompt, later versions 8. config.json {'has' if new else 'lacks'} use_relative_actions, so LeRobot "
        f"{'0.5.1 or later' if new else '0.5.0 or earlier'} saved it (weights may be older than the file: "
        "lerobot-0.4 or lerobot-0.6, try the other if this scores 0 %)"
    )
    return "lerobot-0.6" if new else "lerobot-0.4", reason


_STATE_IN_PROMPT = "pi05_prepare_state_tokenizer_processor_step"

FAMILY = Family(
    name="pi05",
    title="pi0.5",
    config=Pi05Config,
    model=Pi05Model,
    policy=Pi05Policy,
    profiles=PROFILES,
    own_profile="qlibero",
    openpi=(
        "openpi",
        "openpi's files do not say whether the state was in the prompt; the published pi05_libero was trained without "
        "it",
    ),
    lerobot=_lerobot,
    lerobot_proves=False,
    # Its files do not say; its training config does: use_quantile_norm = model_type != ModelType.PI0.
    openpi_mode=("quantile", "openpi normalises every pi0.5 by quantiles, and the tensors (AdaRMS) are a pi0.5's"),
    steps={**SHARED_STEPS, _STATE_IN_PROMPT: {"max_state_dim": (32,), "task_key": ("task",)}},
    order=("rename_observations_processor", "normalizer_processor", _STATE_IN_PROMPT, "tokenizer_processor"),
)
