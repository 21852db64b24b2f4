"""A pi0.5 as a `Policy`: preprocessing, batching that nobody can notice, the sampler, and back to environment units.

An episode's actions must not depend on who shares its batch, so a call always runs at exactly `batch_size`
rows (padded by repetition) and at a text length that depends on the row's own prompt and state alone. On a CPU
the default is one row at a time, and unless the state is part of the text, at the prompt's exact length: nothing
is padded at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from qlibero.documents import JsonObject
from qlibero.errors import UserError
from qlibero.frames import FrameFormat
from qlibero.policies.base import Attention, Chunk, Linear, Observation, blank_observation
from qlibero.policies.pi05.declared import AGENT, WRIST
from qlibero.policies.pi05.images import as_floats, to_network
from qlibero.policies.pi05.inputs import calibration_inputs
from qlibero.policies.pi05.layers import attend
from qlibero.policies.pi05.linears import attentions, layout, linears
from qlibero.policies.pi05.match import ACTION_NUMBERS, require_match
from qlibero.policies.pi05.model import Pi05Model
from qlibero.policies.pi05.normalize import Statistics
from qlibero.policies.pi05.profiles import Profile
from qlibero.policies.pi05.rearrange import MLP, rearranged
from qlibero.policies.pi05.sampler import Sampler, Sampling
from qlibero.policies.pi05.tokenizer import Tokenizer
from qlibero.policies.surgery import swap_modules

CAMERAS = 2
CALIBRATION_STEPS = 10
"""Flow steps at which activations are recorded, however many an arm takes."""
BUCKET = 16
"""Padded text lengths are multiples of this: few shapes (and CUDA graphs), little padding."""


class Pi05Policy:
    """See the module's docstring.

    `model` must be in its final dtype and device; its quantized linears may be of any backend. `identity` is
    what the loader knows of the weights (sha256, checkpoint, kind, …) and becomes part of `provenance()`. `cameras` is
    the order in which the network sees LIBERO's two.
    """

    type = "pi05"

    def __init__(
        self,
        name: str,
        model: Pi05Model,
        profile: Profile,
        statistics: dict[str, Statistics],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        flow_steps: int,
        identity: JsonObject,
        cameras: tuple[int, ...] = (AGENT, WRIST),
    ):
        require_match(model.config, profile, tokenizer)
        config = model.config
        self.name = name
        self.model = model
        self.noise_shape = (config.action_horizon, config.action_dim)
        self.batch_size = batch_size
        self.flow_steps = flow_steps
        self.profile = profile
        self.frame_format = FrameFormat(config.vision.image_size, profile.resize)
        self._cameras = cameras
        self._statistics = statistics
        self._tokenizer_sha256 = tokenizer.sha256
        self._encode = lru_cache(1024)(tokenizer.encode)
        self._identity = identity
        self._sampler: Sampler | None = None
        self._padding = 0  # buckets of masked text beyond what a text needs
        self._arrangement = ""  # what of the arithmetic's order is not as in the checkpoint

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.model.action_in_proj.weight.device

    @property
    def sampler(self) -> Sampler:
        """Made at the first call: until then linears may still be placed or exchanged."""
        if self._sampler is None:
            self._sampler = Sampler(self.model, self.flow_steps, graphs=self.device.type == "cuda")
        return self._sampler

    def with_model(self, model: Pi05Model) -> Pi05Policy:
        """The same preprocessing around another network (the quantized arms)."""
        twin = copy(self)
        twin.model, twin._sampler = model, None
        return twin

    def for_calibration(self) -> Pi05Policy:
        """See `QuantizablePolicy.for_calibration`: at `CALIBRATION_STEPS` flow steps, by single rows."""
        if self.flow_steps == CALIBRATION_STEPS:
            return self if self.batch_size == 1 else self.with_batch_size(1)
        twin = self.with_model(self.model)
        twin.flow_steps, twin.batch_size = CALIBRATION_STEPS, 1
        return twin

    def calibration_inputs(self) -> dict[str, str]:
        """See `QuantizablePolicy.calibration_inputs`."""
        return calibration_inputs(
            self.type,
            self.model.config,
            self.profile,
            self._statistics,
            self._tokenizer_sha256,
            self._cameras,
            self.model.stream_dtype,
            self.device,
        )

    def with_batch_size(self, batch_size: int) -> Pi05Policy:
        """The same policy run at another number of rows."""
        twin = copy(self)
        twin.batch_size = batch_size
        return twin

    def rearranged(self, replicate: int) -> Pi05Policy:
        """The same policy computed in another arrangement, the `replicate`-th (from 1): the channels of one MLP in an
        order drawn from that number, more rows, longer padding. Its actions differ by rounding alone.

        Rows and padding touch the rounding of every layer, but have few arrangements: on an x86 CPU rows by twos and
        threes give the same bits, as do four and all that was tried above. The order of channels is what makes every
        replicate another one.
        """
        twin = self.with_model(rearranged(self.model, replicate))
        twin.batch_size += (0, 1, 3)[replicate % 3]
        twin._padding = replicate // 3
        twin._arrangement = f"{MLP}: channels in order {replicate}; text padded by {twin._padding} buckets more"
        return twin

    def provenance(self) -> JsonObject:
        """See `Policy.provenance`. Once it has been asked, `execution` says what ran (`Sampler.execution`)."""
        config = self.model.config
        return {
            "type": self.type,
            "name": self.name,
            **self._identity,
            "profile": self.profile.name,
            "dtype": str(self.model.stream_dtype).removeprefix("torch."),
            "device": self.device.type,
            "flow_steps": self.flow_steps,
            "batch_size": self.batch_size,
            "action_horizon": config.action_horizon,
            "action_dim": config.action_dim,
            **({"arrangement": self._arrangement} if self._arrangement else {}),
            **({} if self._sampler is None else {"execution": self._sampler.execution()}),
        }

    def token_counts(self, prompts: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Rows that one call puts through a linear of the language model ("llm"), of the action expert ("expert") and
        of the vision tower ("vision"), for these prompts in every state: what a kernel must be tried on."""
        config = self.model.config
        images = CAMERAS * config.vision.tokens
        prefix = images + config.prefix_state_tokens
        return {
            "vision": (self.batch_size * images,),
            "llm": tuple(self.batch_size * (prefix + length) for length in self._observations_by_length(prompts)),
            "expert": (self.batch_size * config.action_horizon,),
        }

    def linears(self) -> dict[str, Linear]:
        """See `QuantizablePolicy.linears`."""
        return linears(self.model)

    def layout(self, name: str) -> list[str]:
        """See `QuantizablePolicy.layout`."""
        return layout(self.model, name)

    def attentions(self) -> list[Attention]:
        """See `QuantizablePolicy.attentions`."""
        return attentions(self.model.config)

    def _attentions_in_order(self) -> list[str]:
        """Names of all that a chunk computes, as it meets them: the expert's in every flow step."""
        names = [each.name for each in self.attentions()]
        first = self.model.config.llm.depth - 1
        return names[:first] + names[first:] * self.flow_steps

    @torch.no_grad()
    def sample_eagerly(
        self,
        observation: Observation,
        noise: np.ndarray,
        model: nn.Module | None = None,
        hear: Callable[[str, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """See `QuantizablePolicy.sample_eagerly`."""
        self.sampler  # noqa: B018 (making it lays plain linears out together, which can move last bits: always, or never)
        asked = cast(Pi05Model, model or self.model)
        if hear is not None:
            order = iter(self._attentions_in_order())
            asked = swap_modules(asked, {})

            def attend_and_tell(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
                hear(next(order), q, k)
                return attend(q, k, v, mask)

            asked.attend = attend_and_tell
        images, tokens, state = self.preprocess(observation)
        given = torch.from_numpy(np.asarray(state))[None].to(self.device) if self.model.config.state_dim else None
        seen = as_floats(torch.stack(images)[None].to(self.device))
        prefix = asked.prefix(seen, torch.tensor([tokens], device=self.device), state=given)
        x = torch.from_numpy(np.asarray(noise))[None].to(self.device)
        for step in range(self.flow_steps):
            t = torch.full((1,), 1.0 - step / self.flow_steps, device=self.device)
            x = x - asked.velocity(prefix, x, t) / self.flow_steps
        return x[0]

    def warmup_observations(self, prompts: Sequence[str]) -> list[Observation]:
        """See `Policy.warmup_observations`."""
        return list(self._observations_by_length(prompts).values())

    def _observations_by_length(self, prompts: Sequence[str]) -> dict[int, Observation]:
        """Every text length that a call with these prompts can have, ascending, and an observation that has it.

        Where the state is written into the text, its numbers decide the length. Tokenizers do not join numbers
        across the blank between them, so the shortest and the longest text repeat one number, and exchanging one
        place after the other passes through every bucket between them.
        """
        found: dict[int, Observation] = {}
        for prompt in prompts:
            states = self.profile.states
            lengths = [len(self._tokens(prompt, state)) for state in states]
            short, long = states[int(np.argmin(lengths))], states[int(np.argmax(lengths))]
            for exchanged in range(len(short) + 1):
                state = np.concatenate([long[:exchanged], short[exchanged:]])
                tokens = len(self._tokens(prompt, state))
                found[self._bucket(tokens) or tokens] = blank_observation(
                    prompt, self._statistics["state"].denormalize(state)
                )
        return dict(sorted(found.items()))

    def infer(self, observations: Sequence[Observation], noise: np.ndarray) -> Chunk:
        """See `Policy.infer`."""
        return self.begin(observations, noise).chunk()

    def begin(self, observations: Sequence[Observation], noise: np.ndarray) -> BegunCall:
        """See `Policy`."""
        expected = (len(observations), *self.noise_shape)
        if noise.shape != expected:
            raise ValueError(f"noise has shape {noise.shape}, expected {expected}")
        started = time.perf_counter()
        rows = [self.preprocess(observation) for observation in observations]
        phases = {"preprocess": (time.perf_counter() - started) * 1e3}
        parts = [
            (batch, self._run([rows[i] for i in batch], length, noise[batch]))
            for batch, length in self._batches([len(tokens) for _, tokens, _ in rows])
        ]
        return BegunCall(self, observations, phases, parts)

    def environment_units(self, actions: np.ndarray, observations: Sequence[Observation]) -> np.ndarray:
        """(B, H, 7) float32 for the robot, of the network's (B, H, D)."""
        return self._statistics["actions"].denormalize(actions)[..., :ACTION_NUMBERS].copy()

    def preprocess(self, observation: Observation) -> tuple[list[Tensor], list[int], np.ndarray]:
        """An image a camera as `to_network` has them, token ids, normalised state, all on the CPU."""
        views = {AGENT: observation.image, WRIST: observation.wrist_image}
        images = [to_network(views[camera], self.frame_format) for camera in self._cameras]
        state = self._statistics["state"].normalize(observation.state)
        return images, self._tokens(observation.prompt, state), state

    def _tokens(self, prompt: str, state: np.ndarray) -> list[int]:
        tokens = self._encode(self.profile.text(prompt, state))
        if len(tokens) > (limit := self.model.config.max_token_len):
            raise UserError(
                f"the instruction {prompt[:80]!r} takes {len(tokens)} tokens, the checkpoint's limit is {limit}: "
                "it would be cut off"
            )
        return tokens

    def _bucket(self, length: int) -> int | None:
        """To what a text of `length` tokens is padded; None: not at all. Only where a row has a call of its own
        and its prompt alone decides the length are there few enough lengths to leave them as they are."""
        if self.batch_size == 1 and not self._padding and self.device.type == "cpu" and self.profile.prompt != "prompt":
            return None
        return min((-(-length // BUCKET) + self._padding) * BUCKET, self.model.config.max_token_len)

    def _batches(self, lengths: list[int]) -> list[tuple[list[int], int | None]]:
        """Row indices of each call and the padded text length (None: as it is), from the rows' own lengths only."""
        buckets: dict[int | None, list[int]] = {}
        for i, length in enumerate(lengths):
            buckets.setdefault(self._bucket(length), []).append(i)
        size = self.batch_size
        return [
            (rows[i : i + size], bucket)
            for bucket, rows in sorted(buckets.items(), key=lambda item: item[0] or 0)
            for i in range(0, len(rows), size)
        ]

    def _run(
        self, rows: list[tuple[list[Tensor], list[int], np.ndarray]], length: int | None, noise: np.ndarray
    ) -> Sampling:
        count = len(rows)
        padded = [rows[i] if i < count else rows[0] for i in range(self.batch_size)]
        z = torch.from_numpy(np.stack([noise[i] if i < count else noise[0] for i in range(self.batch_size)]))
        texts = [tokens + [0] * ((length or len(tokens)) - len(tokens)) for _, tokens, _ in padded]
        mask = None
        if length is not None:
            mask = torch.arange(length) < torch.tensor([[len(tokens)] for _, tokens, _ in padded])
        state = torch.from_numpy(np.stack([state for _, _, state in padded])) if self.model.config.state_dim else None
        return self.sampler.begin(
            torch.stack([image for images, _, _ in padded for image in images]).unflatten(0, (self.batch_size, -1)),
            torch.tensor(texts),
            z,
            token_mask=mask,
            state=state,
        )


@dataclass(frozen=True)
class BegunCall:
    """See `policies.base.Begun`: the samplings of one call, each of the rows that it is for."""

    policy: Pi05Policy
    observations: Sequence[Observation]
    phases: dict[str, float]
    parts: list[tuple[list[int], Sampling]]

    def ready(self) -> bool:
        """See `Begun.ready`."""
        return all(sampling.ready() for _, sampling in self.parts)

    def chunk(self) -> Chunk:
        """See `Begun.chunk`."""
        actions = np.empty((len(self.observations), *self.policy.noise_shape), np.float32)
        phases = dict(self.phases)
        for rows, sampling in self.parts:
            found, times = sampling.result()
            actions[rows] = found[: len(rows)].numpy()
            for phase, ms in times.items():
                phases[phase] = phases.get(phase, 0.0) + ms
        return Chunk(self.policy.environment_units(actions, self.observations), phases)
