"""The name of an episode: everything its scene and its noise depend on, and nothing else (contracts 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class EpisodeKey:
    """`suite` is a LIBERO suite name, `task` its index, `init` an official initial state, `seed` any integer."""

    suite: str
    task: int
    init: int
    seed: int

    def __str__(self) -> str:
        return f"{self.suite}/{self.task}/{self.init}/{self.seed}"
