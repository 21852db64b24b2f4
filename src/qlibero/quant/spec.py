"""What an experiment can ask of quantization, as one frozen value with one hash.

The hash is half of an artifact's identity (the checkpoint and the data are the rest): two experiments that
ask for the same thing share an artifact, and any change that could alter one number makes another. The keys
are those of `quant:` in an experiment; `config/schema.py` explains them to the person who writes the YAML.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qlibero.errors import UserError

METHODS = ("rtn", "smoothquant", "duquant", "weight_pca", "hadamard", "smooth_hadamard")
LAYOUTS = ("llm", "expert", "llm+expert_mlp", "llm+expert")
#: (weight bits, activation bits) that mean something; 16-bit activations are weight-only quantization
BITS = ((4, 8), (8, 8), (4, 4), (4, 16), (8, 16))


@dataclass(frozen=True)
class QuantSpec:
    """One way of quantizing a policy. Every field can change numbers; nothing here is about where or how fast it runs.

    Attributes:
        method: how the layer's input is transformed before rounding, one of METHODS.
        layout: which linears, one of LAYOUTS; None: those that `include` names.
        include, exclude: regexes, searched in the full dotted name.
        per_layer_bits: regex -> weight bits of those layers, later patterns win; 16 leaves a layer in full
            precision.
        group_size: input channels that share one weight scale; None is one scale per output row.
        block_size: width of the rotation blocks (duquant, hadamard, weight_pca).
        alpha: smoothing strength (smoothquant, duquant, smooth_hadamard), 0 to 1.
        weight_clip, activation_clip: fraction of the absolute maximum that the largest code stands for.
        weight_search: choose each weight scale by least squared rounding error instead of its maximum.
        rotation_steps: most greedy steps per rotation (duquant).
        row_rotation: rotate the outputs too and undo it after the product (weight_pca, as its original script
            did).
        atm, ohb: attention temperature matching and output head balancing (QuantVLA).
        calibration_samples, calibration_seed: how many demonstration observations, and the seed of every
            random draw.
    """

    method: str = "duquant"
    layout: str | None = "llm"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    weight_bits: int = 4
    activation_bits: int = 8
    per_layer_bits: tuple[tuple[str, int], ...] = ()
    group_size: int | None = None
    block_size: int = 64
    alpha: float = 0.5
    weight_clip: float = 1.0
    activation_clip: float = 1.0
    weight_search: bool = False
    rotation_steps: int = 256
    row_rotation: bool = False
    atm: bool = False
    ohb: bool = False
    calibration_samples: int = 64
    calibration_seed: int = 0

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        if self.layout is not None:
            _one_of("layout", self.layout, LAYOUTS)
        elif not self.include:
            raise UserError(
                "quant: neither layout nor include is given, so nothing would be quantized; "
                f"write layout: {' | '.join(LAYOUTS)}, or include: [REGEX]"
            )
        if (self.weight_bits, self.activation_bits) not in BITS:
            known = ", ".join(f"W{w}A{a}" for w, a in BITS)
            raise UserError(f"quant: W{self.weight_bits}A{self.activation_bits} is not supported; write one of {known}")
        for pattern in (*self.include, *self.exclude, *(pattern for pattern, _ in self.per_layer_bits)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"quant: {pattern!r} is not a regular expression ({error})") from None
        for pattern, bits in self.per_layer_bits:
            _one_of(f"per_layer_bits[{pattern!r}]", bits, (4, 8, 16))
        if self.row_rotation and self.method != "weight_pca":
            raise UserError(f"quant.row_rotation belongs to weight_pca; with method {self.method} leave it out")
        for name in ("weight_clip", "activation_clip"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise UserError(f"quant.{name} is {getattr(self, name)}; write a fraction above 0 and at most 1")
        if not 0.0 <= self.alpha <= 1.0:
            raise UserError(f"quant.alpha is {self.alpha}; write a number from 0 to 1")
        for name, least in (("block_size", 2), ("rotation_steps", 1), ("calibration_samples", 1)):
            if getattr(self, name) < least:
                raise UserError(f"quant.{name} is {getattr(self, name)}; write at least {least}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> QuantSpec:
        """From an experiment's `quant:` as plain values (lists, dicts; `calibration: {samples, seed}`), or from
        `to_mapping`. Where data and artifacts lie (`calibration.path`, `artifact`, `artifact_dir`) is not in a spec.
        """
        clean = dict(values)
        for place in ("artifact", "artifact_dir"):
            clean.pop(place, None)
        calibration = dict(clean.pop("calibration", None) or {})
        clean.update({f"calibration_{key}": calibration[key] for key in ("samples", "seed") if key in calibration})
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(clean) - known):
            raise UserError(f"quant: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        for name in ("include", "exclude"):
            clean[name] = tuple(clean.get(name) or ())
        clean["per_layer_bits"] = tuple(dict(clean.get("per_layer_bits") or {}).items())
        return cls(**clean)

    def to_mapping(self) -> dict[str, Any]:
        """JSON types only; the inverse of `from_mapping`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values.update(include=list(self.include), exclude=list(self.exclude), per_layer_bits=dict(self.per_layer_bits))
        return values

    @property
    def hash(self) -> str:
        """sha256 hex over the canonical JSON of every field (patterns of per_layer_bits in their order)."""
        values = self.to_mapping() | {"per_layer_bits": [list(item) for item in self.per_layer_bits]}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def label(self) -> str:
        """Short name for tables, e.g. `duquant W4A8 llm`."""
        group = f" g{self.group_size}" if self.group_size else ""
        return f"{self.method} W{self.weight_bits}A{self.activation_bits}{group} {self.layout or 'include'}"


def _one_of(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise UserError(f"quant.{name} is {value!r}; write one of {', '.join(map(str, allowed))}")
