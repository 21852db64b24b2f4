"""The architecture of a pi0.5 network as plain data: one config class, from a few million parameters to 3.35 billion.

It is what `config.json` of a checkpoint directory stores under "architecture". Everything that gives the same
weights another *meaning* (prompt mode, normalisation, resize) is the semantics profile's business, see
`profiles.py`. The bounds are those of files that somebody else wrote: no number of theirs makes this machine count
to 2^70 or allocate what it has not.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field

from qlibero.documents import JsonObject
from qlibero.errors import UserError
from qlibero.policies.structured import fit

Width = Annotated[int, Field(ge=1, le=2**17)]
Depth = Annotated[int, Field(ge=1, le=256)]
Few = Annotated[int, Field(ge=1, le=1024)]
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class GemmaConfig:
    """A Gemma stack: the language model or the action expert. All query heads share one K/V head."""

    __pydantic_config__ = _STRICT

    width: Width
    depth: Depth
    mlp_dim: Width
    num_heads: Few = 8
    head_dim: Few = 256

    def __post_init__(self) -> None:
        _divides("width", self.width, 2)
        _divides("head_dim", self.head_dim, 2)


@dataclass(frozen=True)
class SiglipConfig:
    """The vision transformer of PaliGemma (SigLIP So400m/14 at 224 px by default): 256 tokens a camera."""

    __pydantic_config__ = _STRICT

    width: Width = 1152
    depth: Depth = 27
    mlp_dim: Width = 4304
    num_heads: Few = 16
    patch: Few = 14
    image_size: Annotated[int, Field(ge=1, le=4096)] = 224
    type: Literal["siglip"] = "siglip"

    def __post_init__(self) -> None:
        _divides("vision.width", self.width, self.num_heads)
        _divides("vision.image_size", self.image_size, self.patch)

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

    __pydantic_config__ = _STRICT

    channels: tuple[Width, Width, Width] = (32, 64, 96)
    """Channels after strides 2, 4 and 8; every stage after the first has one more stride-1 layer at stride
    8."""
    width: Width = 192
    """Channels at stride 16. The tower's output has `width + channels[2]` channels (stride 8, pooled, is
    handed on)."""
    image_size: Annotated[int, Field(ge=16, le=4096)] = 128
    cameras: Annotated[int, Field(ge=1, le=16)] = 2
    """Each camera has its own tower and position embedding: the agent and the wrist view share little at this
    size."""
    keypoints: Annotated[int, Field(ge=0, le=4096)] = 0
    """K > 0: K heat maps at stride 8 a camera, whose soft-argmax coordinates become one more token a camera.
    Training may supervise the heat maps with projected object positions."""
    type: Literal["conv"] = "conv"

    def __post_init__(self) -> None:
        for channels in (*self.channels, self.width):
            _divides("vision.channels and vision.width", channels, 8)
        _divides("vision.image_size", self.image_size, 16)

    @property
    def tokens(self) -> int:
        """Tokens of one camera."""
        return (self.image_size // 16) ** 2 + (1 if self.keypoints else 0)


@dataclass(frozen=True)
class Pi05Config:
    """A whole network. `state_dim > 0` adds a continuous state token (prompt mode `proj`) to the prefix."""

    __pydantic_config__ = _STRICT
    suffix_state_tokens: ClassVar[int] = 0
    """State tokens among the action expert's."""

    llm: GemmaConfig
    expert: GemmaConfig
    vision: Annotated[SiglipConfig | ConvConfig, Field(discriminator="type")]
    vocab_size: Annotated[int, Field(ge=2, le=2**22)]
    action_dim: Few = 32
    action_horizon: Annotated[int, Field(ge=0, le=1000)] = 10
    """0: no file of the checkpoint says it, and whoever loads it has to (the weights do not depend on it)."""
    flow_steps: Annotated[int, Field(ge=1, le=1000)] = 10
    max_token_len: Annotated[int, Field(ge=2, le=4096)] = 200
    state_dim: Annotated[int, Field(ge=0, le=1024)] = 0
    min_period: Annotated[float, Field(gt=0, le=1e6)] = 4e-3
    max_period: Annotated[float, Field(gt=0, le=1e6)] = 4.0

    @property
    def prefix_state_tokens(self) -> int:
        """State tokens among the language model's."""
        return 1 if self.state_dim else 0

    def __post_init__(self) -> None:
        for field in ("depth", "num_heads", "head_dim"):
            ours, theirs = getattr(self.llm, field), getattr(self.expert, field)
            if ours != theirs:
                raise UserError(
                    f"architecture: llm.{field} is {ours} but expert.{field} is {theirs}; "
                    "layer i of the expert attends to the keys of layer i of the language model"
                )

    def to_dict(self) -> JsonObject:
        """JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any, where: str = "the file") -> Self:
        """Inverse of `to_dict`; a `UserError` names the file (`where`) and every key that is unknown, missing, of
        another type or out of bounds."""
        if isinstance(data, dict) and isinstance(data.get("vision"), dict):
            data = data | {"vision": {"type": "siglip"} | data["vision"]}
        try:
            return fit(cls, data, where, at="architecture")
        except UserError as error:
            said = re.sub(r"\bvision\.(siglip|conv)\b", "vision", str(error).removeprefix(f"{where}: "))
            raise UserError(f"{where}: {said}") from None


def _divides(name: str, value: int, by: int) -> None:
    if value % by:
        raise UserError(f"architecture: {name} is {value}, which {by} does not divide")


PI05_FULL = Pi05Config(
    llm=GemmaConfig(2048, 18, 16384),
    expert=GemmaConfig(1024, 18, 4096),
    vision=SiglipConfig(),
    vocab_size=257152,
)
"""The published pi0.5: 3,353.4 M parameters, 811 tensors, 456 linear layers."""
