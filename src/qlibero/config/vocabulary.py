"""Words that people bring from other tools, and what they are called here.

The nearest spelling is a bad guide where another word means another thing: LIBERO-PRO's `libero_object_swap` is not a
misspelt `libero_object`, and `bf16` is no kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from qlibero.config.yaml_text import short

OF_PYTHON = "python"  # policy.type of what `qlibero.evaluate` ran: no file says how such a policy is loaded
SUITE_ALIASES = {"libero_long": "libero_10"}  # LIBERO's paper and most policies' pages call it LIBERO-Long
UNQUANTIZED_WORDS = re.compile(
    r"(none|null|no|off|fp|bf16|fp16|fp32|f16|f32|float|float16|float32|bfloat16|half|full|full_precision|original|"
    r"unquantized|unquantised|reference|ref|base|w16a16)"
)
PERTURBED = re.compile(r"libero[_-]?(pro|plus)|libero_(spatial|object|goal|10|90)_.+")


def did_you_mean(word: Any, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean …?` with the nearest of `known`, or nothing."""
    close = get_close_matches(short(word), list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def suite_hint(word: Any, known: Iterable[str]) -> str:
    """What to write in place of a suite that is not there."""
    name = re.sub("[^a-z0-9]+", "_", short(word).lower())
    name = name if name.startswith("libero") else f"libero_{name}"
    if name == "libero_100":
        return "; that is libero_10 and libero_90: run each, or a sweep with grid: {suite: [libero_10, libero_90]}"
    if (plain := name.removesuffix("_no_noops")) != name and plain in known:
        return f"; that is the name of a training set; the suite is {plain}"
    if SUITE_ALIASES.get(name, name) in known:
        return f"; did you mean {SUITE_ALIASES.get(name, name)}?"
    if PERTURBED.match(name):
        return (
            "; of LIBERO-PRO there are libero_{spatial,object,goal,10}_{swap,object,lan,task}, of LIBERO-plus "
            "libero_plus_{spatial,object,goal,10}_{camera,robot,noise,language,level}; other variants, whose assets "
            "no package has, are not supported"
        )
    return did_you_mean(name, known, cutoff=0.85)


def backend_hint(word: str, known: Iterable[str]) -> str:
    """What to write in place of a backend that is not there."""
    if UNQUANTIZED_WORDS.fullmatch(word.lower()):
        return "; the unquantized arm is called baseline (its dtype is policy.dtype)"
    if re.fullmatch(r"(w\d+a\d+|int[248]|[uif]?int[248]|[248][-_]?bits?)(_?g\d+)?", word.lower()):
        return (
            "; an arm is called after what computes it, its bits are quant.weight_bits and quant.activation_bits: "
            "write fake or a kernel, or {name: " + short(word) + ", backend: fake} for a name of your own"
        )
    return did_you_mean(word, known)
