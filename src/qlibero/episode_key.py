"""The name of an episode: everything its scene and its noise depend on, and nothing else (contracts 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass

OFFICIAL, FRESH, BASE = "official", "fresh", "base"


@dataclass(frozen=True, order=True)
class EpisodeKey:
    """`suite` is a LIBERO suite name, `task` its index, `seed` any integer.

    `init` counts the initial states of the kind `inits`: "official" ones come with the suite, "fresh" ones are drawn
    from its placement regions by the whole key, "base" ones are those of the suite that it perturbs. They are other
    scenes under other names: `fresh-3` is not `3`.
    """

    suite: str
    task: int
    init: int
    seed: int
    inits: str = OFFICIAL

    def __str__(self) -> str:
        return f"{self.suite}/{self.task}/{self.init_name}/{self.seed}"

    @property
    def init_name(self) -> str:
        """The initial state within its task: `3`, or `fresh-3`."""
        return str(self.init) if self.inits == OFFICIAL else f"{self.inits}-{self.init}"

    @property
    def initial_state(self) -> tuple[str | int, ...]:
        """What episodes in the same initial state share: a fresh one is another with every seed."""
        state = (self.suite, self.task, self.inits, self.init)
        return (*state, self.seed) if self.inits == FRESH else state

    @classmethod
    def parse(cls, text: str) -> EpisodeKey:
        """The inverse of `str`. Raises ValueError for anything else."""
        try:
            suite, task, init, seed = text.split("/")
            kind, dash, number = init.rpartition("-")
            if (kind, dash) not in ((FRESH, "-"), (BASE, "-"), ("", "")):
                raise ValueError
            return cls(suite, int(task), int(number), int(seed), kind or OFFICIAL)
        except ValueError:
            raise ValueError(f"{text!r} is no episode key: SUITE/TASK/INIT/SEED") from None
