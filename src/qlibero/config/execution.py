"""Whether the simulator waits for the policy: without a latency that costs something, a faster policy gains nothing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlibero.config.fields import FieldError, Float, StrictModel


class Execution(StrictModel):
    """Whether the simulator waits for the policy's answers, or the robot goes on meanwhile."""

    mode: Literal["sync", "async"] = Field(
        "sync",
        description="sync: the simulator waits for every answer; async: the robot goes on with the chunk it has, and "
        "enters the new one at the action of the moment at which it arrives",
    )
    latency_ms: Literal["measured"] | Annotated[Float, Field(ge=0, le=60_000)] = Field(
        "measured",
        description="async: how long an answer takes, counted in whole control steps of 50 ms; measured: the arm's own "
        "median here, taken before the first episode and kept",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Execution:
        if self.mode == "sync" and self.latency_ms != "measured":
            raise FieldError(("latency_ms",), "belongs to mode: async; the simulator waits as long as it takes")
        return self

    @property
    def label(self) -> str:
        """`async 100 ms` and the like."""
        if self.mode == "sync":
            return "sync"
        return "async at its measured latency" if self.latency_ms == "measured" else f"async {self.latency_ms:g} ms"
