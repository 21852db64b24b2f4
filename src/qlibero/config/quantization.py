"""How an arm's weights and activations become integers: the settings that people write, and what identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from qlibero.config.fields import Count, FieldError, Float, Int, PluginName, Regex, Seed, StrictModel, Word
from qlibero.config.number_formats import SCALE_GROUP, NumberFormat, require_of_format
from qlibero.documents import JsonObject
from qlibero.errors import UserError
from qlibero.registry import CorrectionPlugin, MethodPlugin, get

Rounding = Literal["nearest", "search", "gptq"]
ROUNDINGS = get_args(Rounding)  # each tries those before it, too
Smoothing = Literal["max", "rms", "mean", "none"]
OLDER_CORRECTIONS = ("atm", "ohb")  # which had keys of their own before corrections were plug-ins
MAX_PATTERNS = 1_000  # of a list; the largest model here has 400 linears
WIDEST = 65_536  # channels; no model's linear is wider


class Calibration(StrictModel):
    """Demonstration observations that fit the transforms. Never evaluation episodes."""

    path: Path | None = Field(description="calibration.npz: observations, prompts and states from demonstrations")
    samples: Count = Field(96, description="observations used; a third of them only to measure errors and to choose")
    seed: Seed = Field(0, description="which observations, which noise, and the random rotations")


class Quant(StrictModel):
    """How the weights and activations become integers. The arithmetic is fixed; this chooses what goes into it."""

    method: Annotated[str, PluginName(MethodPlugin)] = Field("duquant", description="the transform before rounding")
    layout: Word | None = Field(None, description="which linears, by one of the policy's names; or give include")
    include: tuple[Regex, ...] = Field(
        (), max_length=MAX_PATTERNS, description="regexes over the policy's layer names, instead of layout"
    )
    exclude: tuple[Regex, ...] = Field(
        (), max_length=MAX_PATTERNS, description="regexes of layers to leave alone, applied after layout or include"
    )
    number_format: NumberFormat = Field(
        "int", description="what a code is: an integer, e4m3 (fp8), or e2m1 with scales by the block (nvfp4, mxfp4)"
    )
    weight_bits: Literal[2, 3, 4, 5, 6, 8] = Field(4, description="bits of a weight code")
    activation_bits: Literal[4, 6, 8, 16] = Field(
        8, description="bits of an activation code; 16: activations stay as they are"
    )
    per_layer_bits: dict[Regex, Literal[2, 3, 4, 5, 6, 8, 16]] = Field(
        default_factory=dict,
        max_length=MAX_PATTERNS,
        description="regex → weight bits of those layers, later ones win; 16 leaves them unquantized",
    )
    group_size: Int | None = Field(
        None, ge=16, le=WIDEST, description="input channels per weight scale; null: one scale a row"
    )
    weight_clip: Float = Field(
        1.0, ge=0.01, le=1, description="share of a row's largest weight that the code range spans"
    )
    symmetric: bool = Field(True, description="weight codes around 0; false: around a zero point for each scale")
    rounding: Rounding = Field(
        "search",
        description="nearest: scales from the largest weight; search: scales of least error; gptq: codes that "
        "repair one "
        "another's errors. A layer keeps what is best on held-out tokens, up to this one",
    )
    sequential: bool = Field(
        False, description="fit each decoder layer on what the layers before it feed it once they are quantized"
    )
    activation_clip: Float = Field(
        1.0, ge=0.01, le=1, description="share of a token's largest value that the code range spans"
    )
    block_size: Int = Field(64, ge=2, le=WIDEST, description="channels per rotation block")
    rotation_steps: Int = Field(256, ge=1, le=100_000, description="DuQuant: most greedy rotation steps per block")
    alpha: Float = Field(
        0.5, ge=0, le=1, description="smoothing: share of the difficulty moved from activations to weights"
    )
    smoothing: Smoothing = Field(
        "max", description="how loud a channel is: its greatest, root mean square or mean |x|; none: not smoothed"
    )
    row_rotation: bool = Field(
        False, description="weight_pca, svd_hadamard: rotate outputs too and undo it, as the scripts of both do"
    )
    corrections: tuple[Annotated[str, PluginName(CorrectionPlugin)], ...] = Field(
        (), max_length=2, description="calibrated factors on an attention's projections (`qlibero ls corrections`)"
    )
    calibration: Calibration | None = Field(None, description="the data the transforms are fitted on")
    artifact: Path | None = Field(
        None, description="a ready artifact instead of calibrating; must fit policy and settings"
    )
    artifact_dir: Path | None = Field(
        None,
        description="where artifacts are found and made; by default beside the run, in logs/artifacts, in the cache",
    )

    @model_validator(mode="before")
    @classmethod
    def _knows_its_older_words(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "weight_search" in values:
            now = "search" if values["weight_search"] is True else "nearest"
            raise FieldError(("weight_search",), f"is a choice of roundings now: write rounding: {now}")
        older = [key for key in OLDER_CORRECTIONS if isinstance(values, Mapping) and key in values]
        for key in older:
            if not isinstance(values[key], bool):
                raise FieldError((key,), f"is one of the corrections now: write corrections: [{key}]")
        named = values.get("corrections", ()) if older else ()
        if not older or not isinstance(named, list | tuple):
            return values
        rest = {key: value for key, value in values.items() if key not in older}
        return rest | {"corrections": [*(key for key in older if values[key]), *named]}

    @model_validator(mode="after")
    def _says_which_layers(self) -> Quant:
        if (self.layout is None) == (not self.include):
            if self.include:
                raise FieldError(
                    ("include",), "give layout or include, not both; `layout: null` clears an inherited one"
                )
            raise FieldError(
                ("layout",), "say which layers: layout: llm (`qlibero ls policies` has the names), or include"
            )
        require_of_format(self)
        if self.smoothing == "none" and self.transform.factors == ("scale",):
            raise FieldError(("smoothing",), f"none leaves nothing of {self.method}; write method: rtn")
        scaled = [get(CorrectionPlugin, name).scales for name in self.corrections]
        if len(set(scaled)) < len(scaled):
            raise FieldError(("corrections",), "scale one projection twice; name one for the query, one for the output")
        if self.row_rotation and not self.transform.rotates_outputs:
            raise FieldError(
                ("row_rotation",),
                f"{self.method} does not rotate outputs (weight_pca and svd_hadamard do); leave it out",
            )
        return self

    @property
    def transform(self) -> MethodPlugin:
        """What the method says of itself."""
        return get(MethodPlugin, self.method)

    @property
    def needs_data(self) -> bool:
        """Whether something is fitted on observations."""
        return not self.transform.data_free or self.rounding == "gptq" or bool(self.corrections)

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
        """`W4A8`, `fp8 W8A8`, `W4A8 g128 asym`."""
        words = [
            self.number_format if self.number_format != "int" else "",
            f"W{self.weight_bits}A{self.activation_bits}",
        ]
        words += [f"g{self.group_size}" if self.group_size else "", "" if self.symmetric else "asym"]
        return " ".join(filter(None, words))

    @property
    def scale_group(self) -> int | None:
        """Input channels that share one weight scale; None: all of a row."""
        return SCALE_GROUP.get(self.number_format, self.group_size)

    def kernel_bits(self, weight_bits: int) -> int:
        """Bits that a kernel must hold of such a weight: a zero point that is taken off widens the code by one."""
        return weight_bits if self.symmetric else weight_bits + 1

    @property
    def label(self) -> str:
        """Short name for tables, e.g. `duquant W4A8 search llm`; no rounding named: to nearest."""
        how = "" if self.rounding == "nearest" else f" {self.rounding}"
        return f"{self.method} {self.precision}{how} {self.layout or 'include'}"

    def identity(self) -> JsonObject:
        """Everything that can change a number of an artifact, and nothing about where things lie. JSON types only."""
        values = with_older_words(self.model_dump(mode="json", exclude={"calibration", "artifact", "artifact_dir"}))
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


def with_older_words(values: Mapping[str, Any]) -> JsonObject:
    """Dumped settings as they are hashed: corrections that had keys of their own still do, so no hash changed."""
    named = values["corrections"]
    other = [name for name in named if name not in OLDER_CORRECTIONS]
    rest = {key: value for key, value in values.items() if key != "corrections"}
    return rest | {key: key in named for key in OLDER_CORRECTIONS} | ({"corrections": other} if other else {})


class QuantOverrides(Quant):
    """The quant keys in which one arm differs from the experiment; only those that are written count."""

    @model_validator(mode="after")
    def _says_which_layers(self) -> QuantOverrides:
        return self  # only the merged Quant has to be whole

    @model_serializer(mode="wrap")
    def _only_what_is_said(self, handler: SerializerFunctionWrapHandler) -> JsonObject:
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
