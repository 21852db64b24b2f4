"""What the full-precision policy feeds its linears: what transforms and roundings are fitted on, and measured on."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qlibero.activity import doing
from qlibero.console import count_text
from qlibero.errors import WorkFailed
from qlibero.policies.base import Observation, QuantizablePolicy
from qlibero.quant.held_out import held_out
from qlibero.quant.layout import Selection

#: tokens kept of each input: random samples, of those that fit and of those that measure, and the loudest, which
#: rotations must tame
RANDOM_TOKENS, OUTLIER_TOKENS = 384, 64


@dataclass
class ActivationStats:
    """What calibration saw of one input of K channels.

    peak, mean, rms (K,): greatest, mean and root mean square |x|; sample, loud (T, K): random and loudest tokens; held
    (T, K): random tokens of held-out observations (the sample, where there is one observation); second (K, K): mean
    of x·x^T, or None if nobody asked; tokens: how many were seen, those held out not counted. All float32.
    """

    peak: Tensor
    mean: Tensor
    rms: Tensor
    sample: Tensor
    outlier_tokens: Tensor
    held: Tensor
    second: Tensor | None
    tokens: int

    @property
    def dead(self) -> int:
        """Channels that were never other than zero."""
        return int((self.peak == 0).sum())


# ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def observe(
    policy: QuantizablePolicy,
    observations: Sequence[Observation],
    noise: np.ndarray,
    groups: Mapping[str, str],
    seed: int,
    *,
    second_moments: bool = False,
    model: nn.Module | None = None,
) -> dict[str, ActivationStats]:
    """Run the policy in full precision and collect inputs, over all flow steps. groups: input -> a linear that reads
    it.

    Observations go through one at a time and unpadded (`QuantizablePolicy.sample_eagerly`): every token seen is one
    that acts. `model` is a twin of the policy's that runs instead, with some linears already quantized.
    """
    if not observations or not groups:
        return {}
    model = policy.model if model is None else model
    listeners = {group: ActivationObserver(seed, group, second_moments) for group in groups}
    with ExitStack() as stack:
        for group, name in groups.items():
            stack.enter_context(_listen(model.get_submodule(name), listeners[group]))
        together = list(zip(observations, noise, held_out(len(observations)), strict=True))
        for index, (observation, z, held) in enumerate(together):
            doing("calibrating: observations", index, len(observations))
            for listener in listeners.values():
                listener.held = held
            policy.sample_eagerly(observation, z, model)
    if silent := [group for group, listener in listeners.items() if listener.tokens == 0]:
        raise WorkFailed(
            f"calibration never reached {len(silent)} of {count_text(len(listeners), 'input')}, first {silent[0]}: the "
            "sampler does not execute them, or runs them where they cannot be observed"
        )
    return {group: listener.result() for group, listener in listeners.items()}


def executed_groups(selection: Selection) -> dict[str, str]:
    """Each input that reaches an action, and the first executed linear that reads it."""
    groups = {group: [c.name for c in choices if c.executed] for group, choices in selection.groups().items()}
    return {group: names[0] for group, names in groups.items() if names}


class ActivationObserver:
    """Of the tokens that pass: random samples and the loudest, each channel's loudness, and second moments if asked."""

    def __init__(self, seed: int, name: str, second_moments: bool):
        self._random = torch.Generator().manual_seed(group_seed(seed, name))
        self._sample, self._held = _Sample(), _Sample()
        self._peak: Tensor | None = None
        self._sums: tuple[Tensor, Tensor] | None = None
        self._second: Tensor | None = None
        self._outlier_tokens: Tensor | None = None
        self._second_moments = second_moments
        self.held = False
        self.tokens = 0

    def hear(self, rows: Tensor) -> None:
        """rows (T, K): live tokens of one call."""
        rows = rows.detach().float()
        keys = torch.rand(len(rows), generator=self._random)
        if self.held:
            self._held.add(keys, rows)
            return
        self._sample.add(keys, rows)
        size = rows.abs()
        peak, sums = size.amax(0), (size.double().sum(0), size.double().square().sum(0))
        self._peak = peak if self._peak is None else torch.maximum(self._peak, peak)
        self._sums = sums if self._sums is None else (self._sums[0] + sums[0], self._sums[1] + sums[1])
        if self._second_moments:
            if self._second is None:
                self._second = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            self._second.addmm_(rows.t(), rows)
        pool = rows if self._outlier_tokens is None else torch.cat([self._outlier_tokens, rows])
        self._outlier_tokens = pool[pool.abs().amax(1).topk(min(OUTLIER_TOKENS, len(pool))).indices].clone()
        self.tokens += len(rows)

    def result(self) -> ActivationStats:
        """What was heard; at least one token must have been."""
        sample, held = self._sample.rows(), self._held.rows()
        assert (
            sample is not None
            and self._peak is not None
            and self._sums is not None
            and self._outlier_tokens is not None
        )
        mean, square = (total / self.tokens for total in self._sums)
        second = None if self._second is None else self._second.div_(self.tokens)
        return ActivationStats(
            self._peak,
            mean.float(),
            square.sqrt().float(),
            sample,
            self._outlier_tokens,
            sample if held is None else held,
            second,
            self.tokens,
        )


class _Sample:
    """The tokens with the smallest of as many random keys: a uniform sample of all that ever passed."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, keys: Tensor, rows: Tensor) -> None:
        self._parts.append((keys, rows.clone()))
        if sum(len(k) for k, _ in self._parts) > 8 * RANDOM_TOKENS:
            self._parts = [self._smallest()]

    def rows(self) -> Tensor | None:
        return self._smallest()[1] if self._parts else None

    def _smallest(self) -> tuple[Tensor, Tensor]:
        keys = torch.cat([k for k, _ in self._parts])
        rows = torch.cat([r for _, r in self._parts])
        chosen = keys.argsort()[:RANDOM_TOKENS]
        return keys[chosen], rows[chosen.to(rows.device)]


@contextmanager
def _listen(linear: nn.Module, listener: ActivationObserver) -> Iterator[None]:
    handle = linear.register_forward_pre_hook(lambda _, inputs: listener.hear(inputs[0].flatten(0, -2)))
    try:
        yield
    finally:
        handle.remove()


def group_seed(seed: int, name: str) -> int:
    """A seed of its own for every input, so that adding a layer does not move the draws of another."""
    return zlib.crc32(f"{seed}/{name}".encode())
