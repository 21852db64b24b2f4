"""A pi0 as a `Policy`: as a pi0.5, with a padded state and, under one profile, actions relative to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from qlibero.policies.base import Observation
from qlibero.policies.pi05.policy import Pi05Policy

RELATIVE = 6
"""Numbers of an action that are relative to the state under `adds_state`: position and axis-angle, not the gripper."""


class Pi0Policy(Pi05Policy):
    """See `Pi05Policy`."""

    type = "pi0"

    def preprocess(self, observation: Observation) -> tuple[list[Tensor], list[int], np.ndarray]:
        """As a pi0.5's; the state is padded with zeros after it was normalised."""
        images, tokens, state = super().preprocess(observation)
        padded = np.zeros(self.model.config.state_dim, np.float32)
        padded[: len(state)] = state
        return images, tokens, padded

    def environment_units(self, actions: np.ndarray, observations: Sequence[Observation]) -> np.ndarray:
        """See `Pi05Policy.environment_units`."""
        made = super().environment_units(actions, observations)
        if self.profile.adds_state:
            for chunk, observation in zip(made, observations, strict=True):
                chunk[:, :RELATIVE] += observation.state[:RELATIVE]
        return made

    def token_counts(self, prompts: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """See `QuantizablePolicy.token_counts`: the expert sees a chunk's actions, and once a chunk the state alone."""
        counts = super().token_counts(prompts)
        return counts | {"expert": (self.batch_size, *counts["expert"])}

    def _attentions_in_order(self) -> list[str]:
        """The state's pass through the expert, which has no attention in the last layer, comes between."""
        names = [each.name for each in self.attentions()]
        first = self.model.config.llm.depth - 1
        return names[:first] + names[first:-1] + names[first:] * self.flow_steps
