"""What an experiment may say: the pydantic models behind every YAML file, `--set` and the editors' JSON Schema.

Everything is frozen and unknown keys are refused: a misspelt key that is silently ignored becomes a wrong number
in somebody's paper. Descriptions are written for the person editing the YAML, who sees them as tooltips
(`qlibero config show --schema`). This module imports no other room, so every room can take its slice
(`Quant`, …) as plain data. Names of backends are checked by `load`, which knows the kernels; what a family of
policies is told, the family says (`policies.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from qlibero.config.arms import Arm, Entry, check_arms, completed, differences_only, resolved
from qlibero.config.execution import Execution
from qlibero.config.fields import (
    MOST,
    FieldError,
    Float,
    Int,
    Line,
    PluginName,
    Seed,
    Slug,
    StrictModel,
    one_of_pattern,
)
from qlibero.config.inits import Inits
from qlibero.config.launch import MAX_PROCESSES, Launch
from qlibero.config.policies import Policy
from qlibero.config.quantization import Quant
from qlibero.config.suites import OFFICIAL_INITS, OwnSuite, Suites, called, said_by_own
from qlibero.documents import JsonObject
from qlibero.registry import SuitePlugin, TrackerPlugin, built_in, get

TrackerName = Annotated[str, PluginName(TrackerPlugin)]


# ------------------------------------------------------------------------------------------ around the episodes
class Stop(StrictModel):
    """Sequential stopping: spend episodes on an arm's pairs only until its verdict is clear.

    A sweep runs such a cell as one shard.
    """

    margin: Float | None = Field(
        None, ge=0.0001, lt=1, description="the margin of this test; null: the experiment's `margin`"
    )
    method: Literal["group_sequential", "evalues"] = Field(
        "group_sequential",
        description="group_sequential: declared looks, fewest pairs; evalues: after every pair, and open-ended",
    )
    alpha: Float = Field(
        0.025, ge=1e-6, lt=0.5, description="error rate of each verdict over the whole run; the arms share it"
    )
    max_episodes: Int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="most pairs to spend; null: all of them; fixed under group_sequential, may be raised under evalues",
    )
    looks: Int = Field(20, ge=1, le=200, description="group_sequential: how often to look, evenly over the pairs")
    futility: Float | None = Field(
        0.1,
        ge=0,
        lt=1,
        description="group_sequential: give up when no verdict has this chance left; 0 or null: never",
    )


class Tracking(StrictModel):
    """Mirrors of the ledger. They can be rebuilt from it and never delay an episode."""

    trackers: tuple[TrackerName, ...] = Field(("wandb",), description="wandb, trackio, both, or [] for none")
    mode: Literal["offline", "online", "disabled"] = Field(
        "offline", description="online needs your own account and key"
    )
    project: Annotated[Line, one_of_pattern(r"^[^/\\#?%:]{1,128}$", "qlibero")] = Field(
        "qlibero", description="W&B project"
    )
    entity: Annotated[str, one_of_pattern(r"^[A-Za-z0-9_.-]{1,128}$", "my-team")] | None = Field(
        None, examples=["my-team"], description="W&B team or user; null: your default"
    )
    tags: tuple[Annotated[Line, Field(max_length=64)], ...] = Field(
        (), max_length=32, description="W&B tags of every arm's run, beside the arm's name"
    )
    group: Annotated[Line, Field(max_length=128)] | None = Field(
        None, description="W&B group; null: the experiment's name, which `qlibero dashboard` looks for"
    )
    notes: Annotated[str, Field(max_length=10_000)] | None = Field(None, description="W&B notes, e.g. what is new here")
    job_type: Annotated[Line, Field(max_length=64)] = Field("eval", description="W&B job type")


def _trackers_alone(value: Any) -> Any:
    if value is None or value is False:
        raise FieldError((), "write [] for no tracker (this one is neither a list nor a mapping)")
    if isinstance(value, str):
        return {"trackers": [value]}
    return {"trackers": value} if isinstance(value, list | tuple) else value


# -------------------------------------------------------------------------------------------------- experiment
class Experiment(StrictModel):
    """One cell: a policy on a suite, the same episodes under every arm."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: Slug = Field(description="names the run directory; by default the file's name")
    suite: Suites = Field(
        description="LIBERO suite (libero_long is libero_10), tasks of your own ({bddl: DIR, …}), or a list of such: "
        "one run, verdicts for each and pooled"
    )
    tasks: Literal["all"] | tuple[Int, ...] | dict[Line, tuple[Int, ...]] = Field(
        "all", description="all, or a list of task numbers; of several suites also {suite: list}, all of those unsaid"
    )
    episodes_per_task: Int = Field(
        OFFICIAL_INITS,
        ge=1,
        le=OFFICIAL_INITS,
        description="official initial states 0…N-1 of each task; LIBERO-plus has one",
    )
    inits: Inits = Field(
        "official",
        description="official: the states the suite ships; base: those of the suite it perturbs (lan and task of "
        "LIBERO-PRO), so that both pair by scene; fresh(N): N new ones a task, drawn from its placement regions",
    )
    seed: Seed = Field(7, description="seed of scenes and policy noise")
    seeds: tuple[Seed, ...] | None = Field(
        None, description="several seeds: every initial state once with each; `seed` is then the first"
    )
    protocol: Literal["pure", "openpi"] = Field(
        "pure", description="pure: an episode depends on its key only; openpi: the published evaluations' random stream"
    )
    max_steps: Int | None = Field(
        None, ge=1, le=100_000, description="replaces the suite's step cap; recorded, and not comparable"
    )
    policy: Policy = Field(description="what is evaluated")
    execution: Execution = Field(default_factory=Execution, description="whether the simulator waits for the policy")
    quant: Quant | None = Field(None, description="how arms other than baseline and aa are quantized")
    entries: tuple[Entry, ...] = Field(
        alias="arms",
        description="the arms, paired on the same episodes: backends, or what differs from the experiment",
        json_schema_extra={"minItems": 1},
    )
    on_failure: Literal["refuse", "fallback"] = Field(
        "refuse", description="when a kernel fails validation: stop, or fall back with the reason on record"
    )
    workers: Literal["auto"] | Annotated[Int, Field(ge=1, le=MAX_PROCESSES)] = Field(
        "auto",
        description="simulator processes; auto: one per core this job may use, or four batches of a policy on a GPU, "
        "as far as memory allows",
    )
    retries: Int = Field(
        2, ge=0, le=100, description="times an episode whose simulator died is run again before it is an error"
    )
    videos: Literal["all"] | Annotated[Int, Field(ge=0, le=MOST)] = Field(
        2, description="all, or of how many initial states videos are kept in every arm, flipped ones first"
    )
    margin: Float = Field(
        0.02,
        ge=0.0001,
        lt=1,
        description="largest acceptable loss of success rate, e.g. 0.02 = 2 points; every verdict is at it",
    )
    estimand: Literal["these", "new_inits", "new_tasks"] = Field(
        "new_inits",
        description="what verdicts are about: these tasks and initial states; new initial states of these tasks "
        "(clustered by initial state where there are several seeds); new tasks (clustered by task)",
    )
    primary: Literal["pooled", "per-suite"] = Field(
        "pooled", description="what is claimed of an arm, and counted by Holm: all suites together, or each suite"
    )
    compare_with: Literal["baseline", "pooled"] = Field(
        "baseline", description="verdicts are against the baseline, or against its mean with the A/A arms (sharper)"
    )
    stop: Stop | None = Field(None, description="sequential stopping; null: run everything")
    mixed_machines: bool = Field(
        False,
        description="let machines of different arithmetic share a run directory; a pair then needs both arms from one",
    )
    tracking: Annotated[
        Tracking,
        BeforeValidator(_trackers_alone, json_schema_input_type=Tracking | tuple[TrackerName, ...] | TrackerName),
    ] = Field(default_factory=Tracking, description="mirrors of the ledger: a list of trackers, or a mapping")
    launch: Launch = Field(
        default_factory=Launch, description="how a sweep is spread over machines, and a run over GPUs"
    )

    @model_validator(mode="before")
    @classmethod
    def _spelt_out(cls, data: Any) -> Any:
        """`seed` is the first of `seeds` unless it is written; arms have whole sections."""
        if not isinstance(data, dict):
            return data
        data, seeds = said_by_own(data) | completed(data), data.get("seeds")
        return {"seed": seeds[0], **data} if isinstance(seeds, list | tuple) and seeds else data

    @model_serializer(mode="wrap")
    def _arms_say_what_differs(self, handler: SerializerFunctionWrapHandler) -> JsonObject:
        return differences_only(handler(self))

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        if self.seeds is not None:
            if not self.seeds:
                raise FieldError(("seeds",), "no seed is listed; write e.g. [7, 8, 9], or seed: 7")
            if len(set(self.seeds)) < len(self.seeds):
                raise FieldError(("seeds",), f"a seed is listed twice in {list(self.seeds)}")
            if self.seed != self.seeds[0]:
                raise FieldError(("seed",), f"seeds says {list(self.seeds)}; write one of the two keys")
        self._check_inits()
        for suite in self.suites if self.inits == "base" else ():
            if suite not in built_in(SuitePlugin) or not suite.endswith(("_lan", "_task")):
                raise FieldError(("inits",), f"{suite} has no scenes of another suite; lan and task of LIBERO-PRO have")
        if self.stop is not None and len(self.suites) > 1:
            raise FieldError(("stop",), "a sequential test is over one suite; write one, or leave stop out")
        if self.inits not in ("official", "base") and self.protocol != "pure":
            raise FieldError(("inits",), "fresh initial states are drawn by the episode's key: write protocol: pure")
        self._check_tasks()
        check_arms(self)
        return self

    def _check_inits(self) -> None:
        kind, count = self.initial_states()
        for suite in self._suites():
            if isinstance(suite, OwnSuite) and suite.fresh and (kind, count) != ("fresh", suite.fresh):
                said = f"{suite.called} says fresh: {suite.fresh}"
                raise FieldError(("inits",), f"{said}; leave inits out, or write it there only")
            if kind == "official" and count > (there := self.plugin(called(suite)).inits):
                raise FieldError(
                    ("episodes_per_task",),
                    f"{called(suite)} has {there} initial state{'s' * (there != 1)} a task; more episodes come from "
                    "seeds: [7, 8, …] or inits: fresh(N)",
                )

    def _check_tasks(self) -> None:
        listed: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {}
        if isinstance(self.tasks, tuple):
            listed[()] = (min(self.suites, key=lambda suite: self.plugin(suite).tasks), self.tasks)
        elif isinstance(self.tasks, dict):
            listed |= {(suite,): (suite, tasks) for suite, tasks in self.tasks.items()}
        for place, (suite, tasks) in listed.items():
            if suite not in self.suites:
                raise FieldError(("tasks", suite), f"is no suite of this experiment; it has {', '.join(self.suites)}")
            if not tasks:
                raise FieldError(("tasks", *place), "no task is listed; write all, or some numbers")
            count = self.plugin(suite).tasks
            for i, task in enumerate(tasks):
                if not 0 <= task < count:
                    raise FieldError(("tasks", *place, i), f"{suite} has tasks 0 to {count - 1}")
                if task in tasks[:i]:
                    raise FieldError(("tasks", *place, i), f"task {task} is listed twice")

    def arms(self) -> tuple[Arm, ...]:
        """The arms in the order they are written."""
        return resolved(self.entries, self.policy, self.quant, self.execution)

    def initial_states(self) -> tuple[str, int]:
        """Kind and number of the initial states of each task, e.g. ("official", 50)."""
        return (self.inits, self.episodes_per_task) if isinstance(self.inits, str) else ("fresh", self.inits.fresh)

    def all_seeds(self) -> tuple[int, ...]:
        """`seeds`, or `seed` alone."""
        return self.seeds or (self.seed,)

    def _suites(self) -> tuple[str | OwnSuite, ...]:
        return self.suite if isinstance(self.suite, tuple) else (self.suite,)

    @property
    def suites(self) -> tuple[str, ...]:
        """Names of the suite, or of several."""
        return tuple(map(called, self._suites()))

    def plugin(self, suite: str) -> SuitePlugin:
        """One of the suites: what it declares."""
        own = next((one for one in self.own_suites() if one.called == suite), None)
        return own.plugin() if own else get(SuitePlugin, suite)

    def own_suites(self) -> tuple[OwnSuite, ...]:
        """Those of the suites that are directories of one's own."""
        return tuple(one for one in self._suites() if isinstance(one, OwnSuite))

    def task_ids(self, suite: str) -> tuple[int, ...]:
        """Task numbers of a suite, `all` spelt out."""
        tasks = self.tasks.get(suite, "all") if isinstance(self.tasks, dict) else self.tasks
        return tasks if isinstance(tasks, tuple) else tuple(range(self.plugin(suite).tasks))

    def all_tasks(self) -> tuple[tuple[str, int], ...]:
        """(suite, task) of every task."""
        return tuple((suite, task) for suite in self.suites for task in self.task_ids(suite))
