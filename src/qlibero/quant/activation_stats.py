"""What the full-precision policy feeds its linears: what transforms are fitted on."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from qlibero.activity import doing
from qlibero.errors import WorkFailed
from qlibero.policies.base import Observation
from qlibero.quant.eager import sample_eagerly
from qlibero.quant.layout import Choice, Selection

if TYPE_CHECKING:
    from qlibero.policies.pi05.policy import Pi05Policy

#: tokens kept of each input: a random sample, on which errors are measured, and the loudest ones, which
#: rotations must tame
RANDOM_TOKENS, LOUD_TOKENS = 384, 64


@dataclass
class Seen:
    """What calibration saw of one input: greatest |x| per channel (K,), random and loudest tokens (T, K)."""

    peak: Tensor
    sample: Tensor
    loud: Tensor
    tokens: int


# ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def observe(
    policy: Pi05Policy,
    observations: Sequence[Observation],
    noise: np.ndarray,
    selection: Selection,
    seed: int,
) -> dict[str, Seen]:
    """Run the policy in full precision and collect the inputs of every executed group, over all flow steps.

    Observations go through one at a time and unpadded (see `eager`): every token seen is one that acts.
    """
    if not observations:
        return {}
    executed = {group: choices[0].name for group, choices in _executed_groups(selection).items()}
    listeners = {group: Listener(seed, group) for group in executed}
    with ExitStack() as stack:
        for group, name in executed.items():
            stack.enter_context(_listen(policy.model.get_submodule(name), listeners[group]))
        for index, (observation, z) in enumerate(zip(observations, noise, strict=True)):
            doing("calibrating: observations", index, len(observations))
            sample_eagerly(policy, policy.model, observation, z)
    if silent := [group for group, listener in listeners.items() if listener.tokens == 0]:
        raise WorkFailed(
            f"calibration never reached {len(silent)} of {len(listeners)} inputs, first {silent[0]}: the "
            "sampler does not execute them, or runs them where they cannot be observed"
        )
    return {group: listener.result() for group, listener in listeners.items()}


def _executed_groups(selection: Selection) -> dict[str, list[Choice]]:
    groups = {group: [c for c in choices if c.executed] for group, choices in selection.groups().items()}
    return {group: choices for group, choices in groups.items() if choices}


class Listener:
    """Keeps a uniform random sample and the loudest of the tokens that pass, and the peak of every channel."""

    def __init__(self, seed: int, name: str):
        self._random = torch.Generator().manual_seed(group_seed(seed, name))
        self._peak: Tensor | None = None
        self._sample: list[tuple[Tensor, Tensor]] = []
        self._loud: Tensor | None = None
        self.tokens = 0

    def hear(self, rows: Tensor) -> None:
        """rows (T, K): live tokens of one call."""
        rows = rows.detach().float()
        peak = rows.abs().amax(0)
        self._peak = peak if self._peak is None else torch.maximum(self._peak, peak)
        keys = torch.rand(len(rows), generator=self._random)
        # the tokens with the smallest of as many random keys are a uniform sample of all that ever passed
        self._sample.append((keys, rows.clone()))
        if sum(len(k) for k, _ in self._sample) > 8 * RANDOM_TOKENS:
            self._sample = [self._smallest()]
        pool = rows if self._loud is None else torch.cat([self._loud, rows])
        self._loud = pool[pool.abs().amax(1).topk(min(LOUD_TOKENS, len(pool))).indices].clone()
        self.tokens += len(rows)

    def result(self) -> Seen:
        return Seen(self._peak, self._smallest()[1], self._loud, self.tokens)

    def _smallest(self) -> tuple[Tensor, Tensor]:
        keys = torch.cat([k for k, _ in self._sample])
        rows = torch.cat([r for _, r in self._sample])
        chosen = keys.argsort()[:RANDOM_TOKENS]
        return keys[chosen], rows[chosen.to(rows.device)]


@contextmanager
def _listen(linear: nn.Module, listener: Listener) -> Iterator[None]:
    handle = linear.register_forward_pre_hook(lambda _, inputs: listener.hear(inputs[0].flatten(0, -2)))
    try:
        yield
    finally:
        handle.remove()


def group_seed(seed: int, name: str) -> int:
    """A seed of its own for every input, so that adding a layer does not move the draws of another."""
    return zlib.crc32(f"{seed}/{name}".encode())
