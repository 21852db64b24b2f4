"""What is said of a policy that is loaded from a checkpoint on disk. Light: read whenever a configuration is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qlibero.config.fields import FieldError, Int, Seed, StrictModel, Word, one_of_pattern
from qlibero.config.policies import PolicySettings


class Untrained(StrictModel):
    """Seeded random weights: for tests and timings. Its name says so wherever a number of it is shown."""

    config: Path = Field(description="config.json of the architecture (widths, depths, vision tower)")
    seed: Seed = Field(0, description="seed of the random weights")


class CheckpointSettings(PolicySettings):
    """A policy whose checkpoint has openpi's names, run in this process."""

    checkpoint: Path | None = Field(None, description="directory with model.safetensors, config.json and statistics")
    untrained: Untrained | None = Field(None, description="instead of a checkpoint: seeded random weights")
    sha256: Annotated[str, one_of_pattern(r"^[0-9a-f]{64}$")] | None = Field(
        None,
        examples=["what sha256sum model.safetensors prints"],
        description="SHA-256 of model.safetensors; checked when it is loaded",
    )
    tokenizer: Path | None = Field(
        None, description="tokenizer.json or sentencepiece .model; by default the one inside the checkpoint"
    )
    profile: Any = Field("auto", description="semantics the weights were trained under")
    action_horizon: Int | None = Field(
        None,
        ge=1,
        le=1000,
        description="actions of a chunk, where no file of the checkpoint says it (openpi's trainer)",
    )
    asset_id: Word | None = Field(
        None, description="which statistics, where the checkpoint has several: physical-intelligence/libero"
    )
    norm_stats: Path | None = Field(None, description="norm_stats.json to use, where the checkpoint has none")
    device: Annotated[str, one_of_pattern(r"^(auto|cpu|cuda(:[0-9]{1,3})?)$", "auto", "cpu", "cuda:0")] = Field(
        "auto", description="auto: a GPU if there is one"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    flow_steps: Int = Field(10, ge=1, le=1000, description="Euler steps from noise to action chunk")
    batch_size: Literal["auto"] | Annotated[Int, Field(ge=1, le=1024)] = Field(
        "auto", description="rows of a policy call, to which batches are padded; auto: 1 on a CPU, 8 on a GPU"
    )

    @model_validator(mode="after")
    def _one_source(self) -> CheckpointSettings:
        if (self.checkpoint is None) == (self.untrained is None):
            both = self.checkpoint is not None
            raise FieldError(
                ("untrained",) if both else ("checkpoint",),
                "give either checkpoint or untrained, not both"
                if both
                else "give checkpoint: DIRECTORY (or untrained: …)",
            )
        return self

    @property
    def folder(self) -> Path:
        """The checkpoint's, where it is not `untrained`."""
        if self.checkpoint is None:
            raise ValueError("an untrained policy has no checkpoint")
        return self.checkpoint
