"""The architecture of a pi0.5 network as plain data: one config class, from a few million parameters to 3.35 billion.

It is what `config.json` of a checkpoint directory stores under "architecture". Everything that gives the same
weights another *meaning* (prompt mode, normalisation, resize) is the semantics profile's business, see
`profiles.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from qlibero.errors import UserError


@dataclass(frozen=True)
class GemmaConfig:
    """A Gemma stack: the language model or the action expert. All query heads share one K/V head."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int = 8
    head_dim: int = 256


@dataclass(frozen=True)
class SiglipConfig:
    """The vision transformer of PaliGemma (SigLIP So400m/14 at 224 px by default): 256 tokens a camera."""

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    patch: int = 14
    image_size: int = 224
    type: str = "siglip"

    @property
    def tokens(self) -> int:
        """Tokens of one camera."""
        return (self.image_size // self.patch) ** 2


@dataclass(frozen=True)
class ConvConfig:
    """A small convolutional tower (GroupNorm, SiLU, stride 16), for policies trained from scratch on a CPU.

    A vision transformer of this size gets almost no localisation signal within 10⁵ samples; this learns in
    minutes.
    """

    channels: tuple[int, int, int] = (32, 64, 96)
    """Channels after strides 2, 4 and 8; every stage after the first has one more stride-1 layer at stride
    8."""
    width: int = 192
    """Channels at stride 16. The tower's output has `width + channels[2]` channels (stride 8, pooled, is
    handed on)."""
    image_size: int = 128
    cameras: int = 2
    """Each camera has its own tower and position embedding: the agent and the wrist view share little at this
    size."""
    keypoints: int = 0
    """K > 0: K heat maps at stride 8 a camera, whose soft-argmax coordinates become one more token a camera.
    Training may supervise the heat maps with projected object positions."""
    type: str = "conv"

    @property
    def tokens(self) -> int:
        """Tokens of one camera."""
        return (self.image_size // 16) ** 2 + (1 if self.keypoints else 0)


@dataclass(frozen=True)
class Pi05Config:
    """A whole network. `state_dim > 0` adds a continuous state token (prompt mode `proj`) to the prefix."""

    llm: GemmaConfig
    expert: GemmaConfig
    vision: SiglipConfig | ConvConfig
    vocab_size: int
    action_dim: int = 32
    action_horizon: int = 10
    flow_steps: int = 10
    max_token_len: int = 200
    state_dim: int = 0
    min_period: float = 4e-3
    max_period: float = 4.0

    def __post_init__(self) -> None:
        for field in ("depth", "num_heads", "head_dim"):
            ours, theirs = getattr(self.llm, field), getattr(self.expert, field)
            if ours != theirs:
                raise UserError(
                    f"architecture: llm.{field} is {ours} but expert.{field} is {theirs}; "
                    "layer i of the expert attends to the keys of layer i of the language model"
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Pi05Config:
        """Inverse of `to_dict`; unknown and missing keys are a `UserError` that names them."""
        data = dict(data)
        vision = dict(data.pop("vision", {}))
        kinds = {"siglip": SiglipConfig, "conv": ConvConfig}
        kind = vision.get("type", "siglip")
        if kind not in kinds:
            raise UserError(f"architecture.vision.type is {kind!r}; known: {', '.join(kinds)}")
        if "channels" in vision:
            vision["channels"] = tuple(vision["channels"])
        try:
            return Pi05Config(
                llm=GemmaConfig(**data.pop("llm", {})),
                expert=GemmaConfig(**data.pop("expert", {})),
                vision=kinds[kind](**vision),
                **data,
            )
        except TypeError as error:
            raise UserError(f"architecture: {error}".replace("__init__() ", "")) from None


PI05_FULL = Pi05Config(
    llm=GemmaConfig(2048, 18, 16384),
    expert=GemmaConfig(1024, 18, 4096),
    vision=SiglipConfig(),
    vocab_size=257152,
)
"""The published pi0.5: 3,353.4 M parameters, 811 tensors, 456 linear layers."""
