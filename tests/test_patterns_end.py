"""Risk: a regular expression of a config that backtracks without end hangs the run in silence."""

from __future__ import annotations

import re
import time

import pytest
from pydantic import ValidationError

from qlibero.config.quantization import Quant
from qlibero.errors import UserError
from qlibero.quant.patterns import matching

pytestmark = pytest.mark.slow

NAMES = [f"paligemma_with_expert.paligemma.language_model.layers.{i}.self_attn.q_proj" for i in range(18)]
ENDLESS = [
    "(.*.*)*Z$",
    r"(?:\w|.)*Z",
    "(.+)+!",
    ".*.*.*.*.*.*.*.*Z",
    r"(\w|\.)*(\w|\.)*(\w|\.)*(\w|\.)*(\w|\.)*#",
    r"^(\w+\.?)*!",
]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_it_ends_with_a_word(pattern):
    started = time.process_time()
    with pytest.raises(UserError, match=r"quant.include: .* has not matched 18 layer names after 2 s") as said:
        matching(pattern, NAMES, "include")
    assert repr(pattern) in str(said.value) and time.process_time() - started < 1


@pytest.mark.parametrize(
    ("pattern", "escaped"),
    [
        ("[[a]", r"[\[a]"),
        ("[a--b]", r"[a\-\-b]"),
        ("[a&&b]", r"[a\&\&b]"),
        ("[a||b]", r"[a\|\|b]"),
        ("[a~~b]", r"[a\~\~b]"),
        ("x[[:alpha:]]", r"x[\[:alpha:]]"),
    ],
)
@pytest.mark.parametrize("key", ["include", "exclude", "per_layer_bits"])
def test_what_a_later_python_may_read_otherwise_is_refused(pattern, escaped, key, recwarn):
    """Such a pattern would select other layers, under the same hash, on another machine."""

    def settings(pattern):
        value = {pattern: 8} if key == "per_layer_bits" else [pattern]
        return Quant.model_validate({"layout": None if key == "include" else "llm", "method": "rtn", key: value})

    with pytest.raises(ValidationError, match="possible (nested set|set [a-z ]+).*backslash"):
        settings(pattern)
    assert settings(escaped) and not recwarn.list


USUAL = [
    r"layers\.(0|17)\.",
    "q_proj$",
    ".*",
    r"(?=.*q_proj).*layers\.1\d\b",
    "(.*.*)*",
    r"^(?!.*layers\.3\.)",
    "nothing",
    "(a*)*p",
]


@pytest.mark.parametrize("pattern", USUAL)
def test_what_ends_is_matched_as_re_does(pattern):
    assert matching(pattern, NAMES, "include") == [name for name in NAMES if re.search(pattern, name)]
