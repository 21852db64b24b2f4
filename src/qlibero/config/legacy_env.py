"""The environment variables of the fork this grew from, read as overrides of `quant`.

`openpi_duquant` was steered by `OPENPI_DUQUANT_*` alone. People have them in shell profiles and job scripts, so we
honour those that have a meaning here and say so, one line each; and say of the others why they change nothing.
Unlike the fork, setting one never turns quantization on by itself, and nothing is read at import time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlibero.config.vocabulary import did_you_mean
from qlibero.config.yaml_text import short as brief
from qlibero.config.yaml_text import shown

PREFIX = "OPENPI_DUQUANT_"
FORK_INCLUDE = r"(q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj)"
FORK_EXCLUDE = r"(?:^|\.)(norm|ln|layernorm|emb)(?:\.|$)"

NO_EFFECT = {
    "PACKDIR": (
        "the fork's packs record neither bits nor checkpoint and cannot be checked; "
        "`qlibero quantize` makes an artifact"
    ),
    "PACKROOT": "as PACKDIR: `qlibero quantize` makes an artifact",
    "LS": "the fork's smoothing changed nothing (it never alters the order of the channels); quant.alpha is DuQuant's",
    "ACT_PCT": (
        "activations are quantized per token, without a stored percentile; quant.activation_clip is the nearest key"
    ),
    "PERMUTE": "the permutation is part of the method; quant.method chooses it",
    "BLOCK_OUT": "outputs are rotated in blocks of quant.block_size",
    "INCLUDE_ACTION_HEAD": "the action head is never quantized by a layout; name it in quant.include",
    "DRYRUN": "use `qlibero plan`",
    "DEBUG": "`qlibero inspect` shows every layer",
    "PROFILE": "latency is always measured",
    "PROFILE_SYNC": "latency is always synchronised with the device",
    "PRECACHE_WEIGHTS": "weights are always quantized once, before the first episode",
    "INPUT_TRANSPOSE": "the transform is part of the method; quant.method chooses it",
}
HONOURED = (
    "WBITS_DEFAULT",
    "ABITS",
    "BLOCK",
    "CALIB_STEPS",
    "WBITS",
    "ROW_ROT",
    "INCLUDE",
    "EXCLUDE",
    "SCOPE",
    "LAYERS",
)


@dataclass(frozen=True)
class Override:
    """`variable=text` sets `quant.<key>` to `value`; a key "calibration.samples" lies one level down."""

    variable: str
    text: str
    key: str
    value: Any

    def __str__(self) -> str:
        return f"{self.variable}={brief(self.text)} sets quant.{self.key} to {shown(self.value)}"


def fork_overrides(environ: Mapping[str, str]) -> tuple[list[Override], list[str]]:
    """The overrides `environ` asks for, and one sentence for each variable that changes nothing.

    Raises ValueError, naming the variable, for a value that cannot be read: a typo must not become a default.
    """
    given = {name.removeprefix(PREFIX): value for name, value in environ.items() if name.startswith(PREFIX)}
    for name, value in given.items():
        if not f"{name}{value}".isprintable():
            raise ValueError(f"{PREFIX}{brief(ascii(name)[1:-1])} holds what cannot be printed: {brief(ascii(value))}")
    overrides: list[Override] = []
    for short, key in (
        ("WBITS_DEFAULT", "weight_bits"),
        ("ABITS", "activation_bits"),
        ("BLOCK", "block_size"),
        ("CALIB_STEPS", "calibration.samples"),
    ):
        if short in given:
            number = _number(short, given[short])
            number = 16 if number == 0 and key.endswith("_bits") else number  # the fork's 0 meant "leave as it is"
            overrides.append(Override(PREFIX + short, given[short], key, number))
    if "ROW_ROT" in given:
        if given["ROW_ROT"] not in ("0", "restore"):  # the fork rotated for any other word and never rotated back
            raise ValueError(f"{PREFIX}ROW_ROT should be 0 or restore (got {shown(given['ROW_ROT'])})")
        overrides.append(Override(PREFIX + "ROW_ROT", given["ROW_ROT"], "row_rotation", given["ROW_ROT"] == "restore"))
    if given.get("WBITS"):
        bits = dict(_layer_bits(entry) for entry in given["WBITS"].split(",") if entry.strip())
        overrides.append(Override(PREFIX + "WBITS", given["WBITS"], "per_layer_bits", bits))
    overrides += _layers(given)
    notes = [
        f"{PREFIX}{short} changes nothing here: {NO_EFFECT[short]}" for short in sorted(given) if short in NO_EFFECT
    ]
    for name in sorted(set(given) - set(NO_EFFECT) - set(HONOURED)):
        hint = did_you_mean(name, (*HONOURED, *NO_EFFECT)).replace("did you mean ", f"did you mean {PREFIX}")
        notes.append(f"{PREFIX}{brief(name)} is not known and ignored{hint}")
    return overrides, notes


def _layers(given: dict[str, str]) -> list[Override]:
    """The fork took `name.startswith(SCOPE) and INCLUDE.search(name) and not EXCLUDE.search(name)`, or LAYERS alone."""
    names = [name.strip() for name in given.get("LAYERS", "").split(",") if name.strip()]
    if names:
        include = [f"^{re.escape(name)}$" for name in names]
        return [
            Override(PREFIX + "LAYERS", given["LAYERS"], "include", include),
            _exclude("LAYERS", given["LAYERS"], []),
        ]
    asked = [short for short in ("SCOPE", "INCLUDE", "EXCLUDE") if short in given]
    if not asked or asked == ["SCOPE"] and not given["SCOPE"]:
        return []
    if asked == ["EXCLUDE"]:
        return [_exclude("EXCLUDE", given["EXCLUDE"], [given["EXCLUDE"]] if given["EXCLUDE"] else [])]
    source = "INCLUDE" if "INCLUDE" in given else "SCOPE"
    searched, scope = given.get("INCLUDE", FORK_INCLUDE), given.get("SCOPE", "")
    pattern = f"^(?={re.escape(scope)}).*?(?:{searched})" if scope else searched
    exclude = given.get("EXCLUDE", FORK_EXCLUDE)
    last = "EXCLUDE" if "EXCLUDE" in given else source
    return [
        Override(PREFIX + source, given[source], "include", [pattern]),
        _exclude(last, given[last], [exclude] if exclude else []),
    ]


def _exclude(short: str, text: str, patterns: list[str]) -> Override:
    return Override(PREFIX + short, text, "exclude", patterns)


def _number(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text.strip()):
        raise ValueError(f"{PREFIX}{name} should be a whole number (got {shown(text)})")
    return int(text)


def _layer_bits(entry: str) -> tuple[str, int]:
    name, colon, bits = entry.strip().rpartition(":")
    if not colon or not name.strip() or not re.fullmatch("[0-9]{1,2}", bits.strip()):
        raise ValueError(f"{PREFIX}WBITS should be layer:bits,layer:bits (got {shown(entry)})")
    return f"^{re.escape(name.strip())}$", int(bits) or 16
