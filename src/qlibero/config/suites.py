"""The key `suite`: a name, tasks of one's own (a directory of BDDL files, one a task), or a list of such."""

from __future__ import annotations

import contextlib
import functools
import re
import zipfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

from qlibero.config.fields import FieldError, Int, PluginName, Slug, StrictModel
from qlibero.config.vocabulary import SUITE_ALIASES
from qlibero.registry import FolderSuite, SuitePlugin, get, names

OFFICIAL_INITS = 50  # every LIBERO task ships 50 initial states


class OwnSuite(StrictModel):
    """Tasks of your own: `NAME.bddl` each, in the order of their names, and initial states to begin in."""

    bddl: Path = Field(description="directory of the tasks' BDDL files")
    name: Slug | None = Field(None, description="what the suite is called in records; null: as the directory is")
    init_states: Path | None = Field(
        None, description="directory of NAME.npz, `states` (n, 1 + nq + nv) as MuJoCo flattens them"
    )
    fresh: Int | None = Field(
        None, ge=1, le=100_000, description="instead: so many a task are drawn from its regions, as by inits: fresh(N)"
    )
    max_steps: Int = Field(ge=1, le=100_000, description="policy steps after which an episode is cut")
    instructions: Literal["bddl", "file"] = Field(
        "bddl", description="where a task's words stand: its (:language …), in lower case; or its file's name"
    )

    @model_validator(mode="after")
    def _is_there(self) -> OwnSuite:
        if not self.tasks():
            raise FieldError(("bddl",), f"no .bddl file in {self.bddl}")
        if (self.init_states is None) == (self.fresh is None):
            raise FieldError((), "write init_states: DIR, or fresh: N to have them drawn")
        if self.called in names(SuitePlugin):
            raise FieldError(("name",), f"{self.called} is a suite already; write another name")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", self.called):
            raise FieldError(("bddl",), f"a directory called {self.bddl.name!r} names no suite; write name: my-tasks")
        self.plugin().make_known()
        return self

    @property
    def called(self) -> str:
        """The suite's name in keys and records."""
        return self.name or self.bddl.name

    def tasks(self) -> tuple[Path, ...]:
        """The tasks' files, in order."""
        return tuple(sorted(self.bddl.glob("*.bddl")))

    def plugin(self) -> FolderSuite:
        """The suite as the registry knows it. Raises FieldError for initial states that are missing or none."""
        tasks = self.tasks()
        states = tuple(self._states(task) for task in tasks) if self.init_states else ()
        return FolderSuite(
            self.called,
            "tasks of your own",
            tasks=len(tasks),
            inits=min((_count(file, file.stat().st_mtime_ns) for file in states), default=0),
            max_steps=self.max_steps,
            origin=str(self.bddl),
            goals=tuple(map(str, tasks)),
            states=tuple(map(str, states)),
            instructions=self.instructions,
        )

    def _states(self, task: Path) -> Path:
        assert self.init_states is not None
        found = [self.init_states / f"{task.stem}{end}.npz" for end in ("", ".pruned_init")]
        file = next((file for file in found if file.is_file()), None)
        if file is None:
            raise FieldError(("init_states",), f"{found[0]} is missing, the initial states of {task.name}")
        return file


@functools.lru_cache(maxsize=10_000)
def _count(file: Path, changed_ns: int) -> int:
    """How many initial states a file holds."""
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as archive:
            states = archive["states"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as problem:
        raise FieldError(("init_states",), f"{file} holds no initial states: {problem}; {_HOW}") from None
    if states.ndim != 2 or not len(states) or states.dtype != np.float64 or not np.isfinite(states).all():
        what = f"finite float64 (n, 1 + nq + nv), n > 0; these are {states.dtype} {states.shape}"
        raise FieldError(("init_states",), f"{file}: states should be {what}")
    return len(states)


_HOW = "LIBERO's own pickles become one by numpy.savez(NAME, states=torch.load(PICKLE, weights_only=False))"


def _suite(name: Any) -> Any:
    return SUITE_ALIASES.get(name, name) if isinstance(name, str) else name


_Suite = Annotated[
    Annotated[str, BeforeValidator(_suite), PluginName(SuitePlugin), Tag("one")] | Annotated[OwnSuite, Tag("own")],
    Discriminator(lambda found: "own" if isinstance(found, dict | OwnSuite) else "one"),
]


def called(suite: str | OwnSuite) -> str:
    """A suite's name."""
    return suite if isinstance(suite, str) else suite.called


def _one_or_several(found: str | OwnSuite | tuple[str | OwnSuite, ...]) -> str | OwnSuite | tuple[str | OwnSuite, ...]:
    if not isinstance(found, tuple):
        return found
    if not found:
        raise ValueError("lists no suite; write e.g. [libero_spatial, libero_goal]")
    names_of = [called(suite) for suite in found]
    if twice := next((name for i, name in enumerate(names_of) if name in names_of[:i]), None):
        raise ValueError(f"lists {twice} twice")
    return found if len(found) > 1 else found[0]


Suites = Annotated[
    Annotated[_Suite, Tag("one")] | Annotated[tuple[_Suite, ...], Tag("several")],
    Discriminator(lambda found: "several" if isinstance(found, list | tuple) else "one"),
    AfterValidator(_one_or_several),
]


def said_by_own(data: dict[str, Any]) -> dict[str, Any]:
    """What suites say of the experiment: that states are drawn, or how many there are where they are few."""
    written = data.get("suite")
    found = []
    for each in written if isinstance(written, list | tuple) else (written,):
        with contextlib.suppress(ValidationError, TypeError):  # what is wrong is told where the field is read
            if isinstance(each, dict | OwnSuite):
                found.append(OwnSuite.model_validate(each))
    drawn = {suite.fresh for suite in found if suite.fresh}
    states = [suite.plugin().inits for suite in found if suite.init_states]
    for each in written if isinstance(written, list | tuple) else (written,):
        if (
            isinstance(each, str)
            and each in names(SuitePlugin)
            and (inits := get(SuitePlugin, each).inits) < OFFICIAL_INITS
        ):
            states.append(inits)
    return ({"inits": {"fresh": drawn.pop()}} if len(drawn) == 1 else {}) | (
        {"episodes_per_task": min(*states, OFFICIAL_INITS)} if states else {}
    )
