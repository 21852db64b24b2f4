"""Which initial states an experiment begins its episodes in: those the suite ships, those of the suite it perturbs, or
fresh ones."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from qlibero.config.fields import Int, StrictModel


class FreshInits(StrictModel):
    """Initial states nobody has been evaluated on: `fresh(20)`, or `{fresh: 20}`."""

    fresh: Int = Field(ge=1, le=100_000, description="how many a task")


def _inits_in_words(value: Any) -> Any:
    found = re.fullmatch(r"\s*fresh\s*\(\s*(\d{1,6})\s*\)\s*", value) if isinstance(value, str) else None
    return {"fresh": int(found[1])} if found else value


Inits = Annotated[
    Literal["official", "base"] | FreshInits,
    BeforeValidator(_inits_in_words, json_schema_input_type=Literal["official", "base"] | FreshInits | str),
]
