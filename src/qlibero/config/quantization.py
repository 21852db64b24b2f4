"""How an arm's weights and activations become integers: the settings that people write, and what identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from qlibero.config.fields import Count, Float, Frozen, Int, Misplaced, PluginName, Regex, Seed, Word
from qlibero.errors import UserError
from qlibero.registry import MethodPlugin, get

MOST_PATTERNS = 1_000  # of a list; the largest model here has 400 linears
WIDEST = 65_536  # channels; no model's linear is wider


class Calibration(Frozen):
    """Demonstration observations that fit the transforms. Never evaluation episodes."""

    path: Path | None = Field(description="calibration.npz: observations, prompts and states from demonstrations")
    samples: Count = Field(64, description="observations used")
    seed: Seed = Field(0, description="which observations, which noise, and the random rotations")


class Quant(Frozen):
    """How the weights and activations become integers. The arithmetic is fixed; this chooses what goes into it."""

    method: Annotated[str, PluginName(MethodPlugin)] = Field("duquant", description="the transform before rounding")
    layout: Word | None = Field(None, description="which linears, by one of the policy's names; or give include")
    include: tuple[Regex, ...] = Field(
        (), max_length=MOST_PATTERNS, description="regexes over openpi layer names, instead of layout"
    )
    exclude: tuple[Regex, ...] = Field(
        (), max_length=MOST_PATTERNS, description="regexes of layers to leave alone, applied after layout or include"
    )
    weight_bits: Literal[4, 8] = Field(4, description="bits of a weight code")
    activation_bits: Literal[4, 8, 16] = Field(
        8, description="bits of an activation code; 16: activations stay as they are"
    )
    per_layer_bits: dict[Regex, Literal[4, 8, 16]] = Field(
        default_factory=dict,
        max_length=MOST_PATTERNS,
        description="regex → weight bits of those layers, later ones win; 16 leaves them unquantized",
    )
    group_size: Int | None = Field(
        None, ge=16, le=WIDEST, description="input channels per weight scale; null: one scale a row"
    )
    weight_clip: Float = Field(
        1.0, ge=0.01, le=1, description="share of a row's largest weight that the code range spans"
    )
    weight_search: bool = Field(False, description="choose each weight scale by least squared error instead of absmax")
    activation_clip: Float = Field(
        1.0, ge=0.01, le=1, description="share of a token's largest value that the code range spans"
    )
    block_size: Int = Field(64, ge=2, le=WIDEST, description="channels per rotation block")
    rotation_steps: Int = Field(256, ge=1, le=100_000, description="DuQuant: most greedy rotation steps per block")
    alpha: Float = Field(
        0.5, ge=0, le=1, description="smoothing: share of the difficulty moved from activations to weights"
    )
    row_rotation: bool = Field(
        False, description="weight_pca: rotate outputs too and undo it, as the fork's script did"
    )
    atm: bool = Field(False, description="QuantVLA's attention temperature matching")
    ohb: bool = Field(False, description="QuantVLA's output head balancing")
    calibration: Calibration | None = Field(None, description="the data the transforms are fitted on")
    artifact: Path | None = Field(
        None, description="a ready artifact instead of calibrating; must fit policy and settings"
    )
    artifact_dir: Path | None = Field(
        None,
        description="where artifacts are found and made; by default beside the run, in logs/artifacts, in the cache",
    )

    @model_validator(mode="after")
    def _says_which_layers(self) -> Quant:
        if (self.layout is None) == (not self.include):
            if self.include:
                raise Misplaced(
                    ("include",), "give layout or include, not both; `layout: null` clears an inherited one"
                )
            raise Misplaced(
                ("layout",), "say which layers: layout: llm (`qlibero ls policies` has the names), or include"
            )
        if (self.weight_bits, self.activation_bits) == (8, 4):
            raise Misplaced(("activation_bits",), "W8A4 has no kernel; supported are W4A8, W8A8, W4A4, W4A16 and W8A16")
        if self.row_rotation and not self.transform.rotates_outputs:
            raise Misplaced(("row_rotation",), f"{self.method} does not rotate outputs (weight_pca does); leave it out")
        return self

    @property
    def transform(self) -> MethodPlugin:
        """What the method says of itself."""
        return get(MethodPlugin, self.method)

    @property
    def needs_data(self) -> bool:
        """Whether something is fitted on observations."""
        return not self.transform.data_free or self.atm or self.ohb

    @property
    def lacks_data(self) -> bool:
        """Whether that is so and neither data nor a ready artifact is named."""
        return self.needs_data and self.artifact is None and (self.calibration is None or self.calibration.path is None)

    @property
    def calibration_samples(self) -> int:
        """How many demonstration observations."""
        return self.calibration.samples if self.calibration else Calibration.model_fields["samples"].default

    @property
    def calibration_seed(self) -> int:
        """Seed of every random draw: observations, noise, rotations."""
        return self.calibration.seed if self.calibration else Calibration.model_fields["seed"].default

    @property
    def precision(self) -> str:
        """`W4A8` and the like."""
        return f"W{self.weight_bits}A{self.activation_bits}"

    @property
    def label(self) -> str:
        """Short name for tables, e.g. `duquant W4A8 llm`."""
        group = f" g{self.group_size}" if self.group_size else ""
        return f"{self.method} {self.precision}{group} {self.layout or 'include'}"

    def identity(self) -> dict[str, Any]:
        """Everything that can change a number of an artifact, and nothing about where things lie. JSON types only."""
        values = self.model_dump(mode="json", exclude={"calibration", "artifact", "artifact_dir"})
        return values | {"calibration_samples": self.calibration_samples, "calibration_seed": self.calibration_seed}

    @classmethod
    def of_identity(cls, values: Mapping[str, Any]) -> Quant:
        """The inverse of `identity`, as an artifact holds it. UserError names what cannot be."""
        own = dict(values)
        drawn = {key: own.pop(f"calibration_{key}", None) for key in ("samples", "seed")}
        try:
            return cls.model_validate({**own, "calibration": {"path": None, **drawn}})
        except ValidationError as error:
            told = (f"quant.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise UserError("; ".join(list(told)[:3])) from None

    @property
    def hash(self) -> str:
        """sha256 hex over the canonical JSON of the identity (patterns of per_layer_bits in their order).

        It is half of an artifact's identity (the checkpoint and the data are the rest): two experiments that ask for
        the same thing share an artifact, and any change that could alter one number makes another.
        """
        values = self.identity() | {"per_layer_bits": [list(item) for item in self.per_layer_bits.items()]}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class QuantOverrides(Quant):
    """The quant keys in which one arm differs from the experiment; only those that are written count."""

    @model_validator(mode="after")
    def _says_which_layers(self) -> QuantOverrides:
        return self  # only the merged Quant has to be whole

    @model_serializer(mode="wrap")
    def _only_what_is_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key in self.model_fields_set}


def quant_of_arm(base: Quant | None, overrides: QuantOverrides | None) -> Quant:
    """The experiment's quant with an arm's overrides on top. An overriding `include` replaces an inherited layout."""
    said = overrides.model_dump(exclude_unset=True) if overrides else {}
    merged = base.model_dump() if base else {}
    if said.get("include") and "layout" not in said:
        merged["layout"] = None
    if said.get("layout") and "include" not in said:
        merged["include"] = ()
    return Quant.model_validate({**merged, **said})
