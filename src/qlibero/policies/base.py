"""What a policy is to the rest of qlibero: observations and noise in, a chunk of environment-ready actions out.

The flow noise is an argument, never drawn inside (contract 2), so that every backend denoises the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeGuard, cast

import numpy as np

from qlibero.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qlibero.config.policies import PolicySettings
    from qlibero.documents import JsonObject


@dataclass(frozen=True)
class Observation:
    """One moment of one episode, as LIBERO gives it (after the 180° rotation), before a policy's preprocessing."""

    image: np.ndarray
    """(256, 256, 3) uint8: agentview, upright; or in the policy's `frame_format`."""
    wrist_image: np.ndarray
    """The same of the eye-in-hand camera."""
    state: np.ndarray
    """(8,) float32: end effector position (m) 3, axis-angle (rad) 3, gripper joint positions 2."""
    prompt: str
    """The task's language instruction."""


def blank_observation(prompt: str, state: np.ndarray | None = None) -> Observation:
    """An observation of nothing, for calls before the first episode."""
    image = np.full((256, 256, 3), 127, np.uint8)
    return Observation(image, image, np.zeros(8, np.float32) if state is None else state, prompt)


@dataclass(frozen=True)
class Chunk:
    """A policy's answer to a batch of observations."""

    actions: np.ndarray
    """(B, H, 7) float32, ready for `env.step` (un-normalised; gripper -1 open, +1 close). A row that is not finite is a
    policy that has failed: it ends its own episode as a failure, and no other."""
    phases_ms: dict[str, float] = field(default_factory=dict)
    """Wall time of each phase of this call, device-synchronised: preprocess, vision, prefix, flow (ms)."""


class Begun(Protocol):
    """A policy call under way."""

    def ready(self) -> bool:
        """Whether `chunk` would not wait."""
        ...

    def chunk(self) -> Chunk:
        """The answer; waits for it."""
        ...


class Policy(Protocol):
    """Anything that turns observations and noise into action chunks: all that a run asks of one.

    It may also have `frame_format` (`frames.FrameFormat`): simulators then bring their frames to that form, so that the
    thread that calls `infer` need not; what is called without a simulator still gives (S, S, 3) uint8. And
    `begin(observations, noise) -> Begun`: `infer` without waiting for the device, for a second call to be prepared
    behind the first.
    """

    name: str
    noise_shape: tuple[int, int]
    """(H, D) of the flow noise of one observation."""
    batch_size: int
    """Most observations of a call."""

    def infer(self, observations: Sequence[Observation], noise: np.ndarray) -> Chunk:
        """`noise` is (B, H, D) float32, one slice an observation. Actions come back in the same order.

        What comes back for one observation depends on it and its noise alone, not on what it is asked with.
        """
        ...

    def warmup_observations(self, prompts: Sequence[str]) -> list[Observation]:
        """Observations that together need all a call with these prompts can need (shapes, kernels, graphs)."""
        ...

    def provenance(self) -> JsonObject:
        """JSON-ready identity. `type` and `name` always. Where they are known: `sha256` and `checkpoint` of the
        weights, `profile`, `dtype`, `device`, `parameters`, `action_horizon`; `guarantees`: {"noise": false} of one
        that draws its own noise; `remarks`: lines for people; `execution`: which implementations ran, once asked."""
        ...


class RearrangeablePolicy(Policy, Protocol):
    """A policy that can be computed in another order of its sums: what an A/A arm is."""

    def rearranged(self, replicate: int) -> Self:
        """The same policy in its `replicate`-th other arrangement (from 1): actions differ by rounding alone."""
        ...


@dataclass(frozen=True)
class Linear:
    """A linear of a policy's network that may be quantized."""

    name: str
    """In the network, dotted."""
    group: str
    """Names the input that it reads: linears of one group share transform and codes."""
    rows: str
    """Key of `token_counts`: how many rows a call puts through it."""
    executed: bool = True
    """False where no action depends on it."""
    block: str = ""
    """The layer of the network that it is part of: what sequential calibration takes one after the other."""


@dataclass(frozen=True)
class Attention:
    """One attention of a policy's network: what a correction may scale."""

    name: str
    query: str
    """The linear that makes the queries: its rows are `heads` equal parts, in order."""
    output: str
    """The linear that all heads' results go through."""
    heads: int
    """Query heads."""


class SharingLinear(Protocol):
    """What a quantized linear may have beside `forward`: linears of one group compute their input's codes once."""

    def prepare(self, x: Tensor) -> Any:
        """x (..., K) -> what `from_prepared` of every quantized linear of the group takes."""
        ...

    def from_prepared(self, prepared: Any) -> Tensor:
        """(..., N)"""
        ...

    def precedes(self, *others: nn.Module) -> bool:
        """Whether `joined` gives the outputs of this linear and of `others` without a copy."""
        ...

    def joined(self, x: Tensor, last: Any) -> Tensor:
        """x (..., K) -> the outputs of this linear to `last` side by side."""
        ...

    def takes_gated(self, device: torch.device) -> bool:
        """Whether `of_gated` saves a pass over the input there; else it is not to be called."""
        ...

    def of_gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """This linear of gelu_tanh(gate)·up, each (..., K)."""
        ...


def shares_input(linear: nn.Module) -> TypeGuard[SharingLinear]:
    """Whether it is quantized so that linears with one input share its codes; else it is only ever called."""
    return hasattr(linear, "prepare")


class Quantizable(Protocol):
    """A network that says of itself what can be quantized."""

    model: torch.nn.Module

    def linears(self) -> dict[str, Linear]:
        """Every linear that may be quantized, by name, in the network's order."""
        ...

    def layout(self, name: str) -> list[str]:
        """The linears of a named layout. UserError for a name it has not, or a network that lacks some of them."""
        ...


class QuantizablePolicy(Quantizable, RearrangeablePolicy, Protocol):
    """A policy whose network is here: all that calibration, kernel check and recheck ask of one.

    Its linears are `torch.nn.Linear` and are called by forward, or as `SharingLinear` says where `shares_input`.

    It may also have `calibration_inputs() -> {name: text or hash}`: all that decides, beside weights and data, what its
    linears see in calibration, no paths. Without it two arms that differ in more than `provenance` says share one
    artifact.
    """

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        ...

    def with_model(self, model: torch.nn.Module) -> Self:
        """The same policy around a twin of its network (`surgery.swap_modules`)."""
        ...

    def for_calibration(self) -> Self:
        """The same policy as it is calibrated, whatever its settings say of flow steps and batch: an artifact's key
        knows weights, settings, data and `calibration_inputs`, so nothing else may decide what is in it."""
        ...

    def token_counts(self, prompts: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Rows that one call puts through a linear, for these prompts in every state, by `Linear.rows`."""
        ...

    def sample_eagerly(
        self,
        observation: Observation,
        noise: np.ndarray,
        model: torch.nn.Module | None = None,
        hear: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """The network's own action chunk (H, D) float32 for one observation and its noise (H, D), by the plain network:
        nothing fused, replayed or padded, every linear called by itself, so that hooks see what acts.

        `model` is a twin to be asked instead. `hear(name, q, k)` is told of each attention (see `attentions`) as it is
        computed: rotated queries (1, T, heads, d) and keys, (1, P, d) where all heads share them, else (1, P, groups,
        d) of as many consecutive heads each; all of them live.
        """
        ...

    def attentions(self) -> list[Attention]:
        """Every attention that a chunk of actions depends on."""
        ...


def quantizable(policy: Policy) -> QuantizablePolicy:
    """The same policy, as one that can be quantized. UserError where its network is not here."""
    if getattr(policy, "model", None) is None:
        raise UserError(f"policy {policy.name} does not run its network here, so it cannot be quantized from here")
    return cast(QuantizablePolicy, policy)


class PolicyFamily(Protocol):
    """A module that declares a `PolicyPlugin`. Importing it is cheap: what is heavy is imported inside the functions.

    It may also have `files(settings)`: every file that is read, in a fixed order; `weights_sha256(settings)`: what the
    policy's provenance will name, without loading it; `calibration_inputs(settings)`, likewise, what the policy will
    say under that name, or None; and `claims(path)` with `verify(path)`: whether a checkpoint is
    of this family, and a report on it (see `pi05/verify.py`). So that arms share what they have in common:
    `shares_weights(one, other)`, whether one loaded network serves both settings, and `with_weights_of(loaded,
    settings)`, the policy of `settings` around the network of another policy.
    """

    Settings: type[PolicySettings]

    def load(self, settings: Any, skip: frozenset[str] = frozenset()) -> Policy:
        """The policy that `settings` describes, without the weights named in `skip` (an artifact brings them)."""
        ...
