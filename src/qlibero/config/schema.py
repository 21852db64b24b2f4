"""What an experiment may say: the pydantic models behind every YAML file, `--set` and the editors' JSON Schema.

Everything is frozen and unknown keys are refused: a misspelt key that is silently ignored becomes a wrong number
in somebody's paper. Descriptions are written for the person editing the YAML, who sees them as tooltips
(`qlibero config show --schema`). This module imports no other room, so every room can take its slice
(`Quant`, `Pi05`, …) as plain data. Names of backends are checked by `load`, which knows the kernels.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    model_serializer,
    model_validator,
)

from qlibero.places import REPOSITORY

SuiteName = Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]
Method = Literal["rtn", "smoothquant", "duquant", "weight_pca", "hadamard"]
Layout = Literal["llm", "expert", "llm+expert_mlp", "llm+expert"]
Profile = Literal["auto", "openpi", "openpi-state", "lerobot-0.4", "lerobot-0.6", "qlibero"]
TrackerName = Literal["wandb", "trackio"]

UNQUANTIZED_BACKENDS = ("baseline", "aa")  # the policy as it is; the same again with another batch composition
OFFICIAL_INITS = 50  # every LIBERO task ships 50 initial states
TASKS_OF_SUITE = {"libero_spatial": 10, "libero_object": 10, "libero_goal": 10, "libero_10": 10, "libero_90": 90}

Int = Annotated[int, Strict()]  # lax integers would take `true` for 1
Float = Annotated[float, Strict()]
Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=120)]


class Misplaced(ValueError):
    """A cross-field error that knows which key is to blame; `path` is relative to the model that raises it."""

    def __init__(self, path: tuple[str | int, ...], message: str):
        super().__init__(message)
        self.path = path


class Frozen(BaseModel):
    """Unknown keys are refused, values never change after validation, NaN and infinity are no numbers here."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


Regex = Annotated[str, AfterValidator(_regex)]


# ----------------------------------------------------------------------------------------------------- policy
class Untrained(Frozen):
    """Seeded random weights: for tests and timings. Its name says so wherever a number of it is shown."""

    config: Path = Field(description="config.json of the architecture (widths, depths, vision tower)")
    seed: Int = Field(0, ge=0, description="seed of the random weights")


class Pi05(Frozen):
    """A pi0.5 (or compact pi0.5) run in this process."""

    type: Literal["pi05"]
    checkpoint: Path | None = Field(None, description="directory with model.safetensors, config.json and statistics")
    untrained: Untrained | None = Field(None, description="instead of a checkpoint: seeded random weights")
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of model.safetensors; checked when it is loaded"
    )
    tokenizer: Path | None = Field(
        None, description="tokenizer.json or sentencepiece .model; by default the one inside the checkpoint"
    )
    profile: Profile = Field(
        "auto", description="semantics the weights were trained under; auto: what the checkpoint's own files prove"
    )
    action_horizon: Int | None = Field(
        None,
        ge=1,
        le=1000,
        description="actions of a chunk, where no file of the checkpoint says it (openpi's trainer)",
    )
    asset_id: str | None = Field(
        None,
        min_length=1,
        description="which statistics, where the checkpoint has several: physical-intelligence/libero",
    )
    norm_stats: Path | None = Field(None, description="norm_stats.json to use, where the checkpoint has none")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    flow_steps: Int = Field(10, ge=1, le=1000, description="Euler steps from noise to action chunk")
    batch_size: Literal["auto"] | Annotated[Int, Field(ge=1, le=1024)] = Field(
        "auto", description="rows of a policy call, to which batches are padded; auto: 1 on a CPU, 4 on a GPU"
    )
    replan_steps: Int = Field(5, ge=1, description="actions executed of every chunk before the policy is asked again")

    @model_validator(mode="after")
    def _one_source(self) -> Pi05:
        if (self.checkpoint is None) == (self.untrained is None):
            both = self.checkpoint is not None
            raise Misplaced(
                ("untrained",) if both else ("checkpoint",),
                "give either checkpoint or untrained, not both"
                if both
                else "give checkpoint: DIRECTORY (or untrained: …)",
            )
        return self


class Remote(Frozen):
    """Any server that speaks openpi's websocket protocol. It cannot be quantized or attested from here."""

    type: Literal["remote"]
    url: str = Field(pattern=r"^wss?://", description="ws://host:port of the policy server")
    replan_steps: Int = Field(5, ge=1, description="actions executed of every chunk before the server is asked again")
    batch_size: Int = Field(4, ge=1, le=1024, description="requests in flight at once")
    timeout_s: Float = Field(60.0, gt=0, description="seconds to wait for one answer, and for a reconnect")
    api_key_env: str | None = Field(None, description="environment variable that holds the server's API key")


Policy = Annotated[Pi05 | Remote, Field(discriminator="type")]


# --------------------------------------------------------------------------------------------- quantization
class Calibration(Frozen):
    """Demonstration observations that fit the transforms. Never evaluation episodes."""

    path: Path = Field(description="calibration.npz: observations, prompts and states from demonstrations")
    samples: Int = Field(64, ge=1, description="observations used")
    seed: Int = Field(0, ge=0, description="which observations, which noise, and the random rotations")


class Quant(Frozen):
    """How the weights and activations become integers. The arithmetic is fixed; this chooses what goes into it."""

    method: Method = Field("duquant", description="the transform before rounding")
    layout: Layout | None = Field(None, description="which linears, by name; or give include")
    include: tuple[Regex, ...] = Field((), description="regexes over openpi layer names, instead of layout")
    exclude: tuple[Regex, ...] = Field(
        (), description="regexes of layers to leave alone, applied after layout or include"
    )
    weight_bits: Literal[4, 8] = Field(4, description="bits of a weight code")
    activation_bits: Literal[4, 8, 16] = Field(
        8, description="bits of an activation code; 16: activations stay as they are"
    )
    per_layer_bits: dict[Regex, Literal[4, 8, 16]] = Field(
        default_factory=dict,
        description="regex → weight bits of those layers, later ones win; 16 leaves them unquantized",
    )
    group_size: Int | None = Field(None, ge=16, description="input channels per weight scale; null: one scale a row")
    weight_clip: Float = Field(1.0, gt=0, le=1, description="share of a row's largest weight that the code range spans")
    weight_search: bool = Field(False, description="choose each weight scale by least squared error instead of absmax")
    activation_clip: Float = Field(
        1.0, gt=0, le=1, description="share of a token's largest value that the code range spans"
    )
    block_size: Int = Field(64, ge=2, description="channels per rotation block")
    rotation_steps: Int = Field(256, ge=1, description="DuQuant: most greedy rotation steps per block")
    alpha: Float = Field(
        0.5, ge=0, le=1, description="smoothing: share of the difficulty moved from activations to weights"
    )
    row_rotation: bool = Field(
        False, description="weight_pca: rotate outputs too and undo it, as the fork's script did"
    )
    atm: bool = Field(False, description="QuantVLA's attention temperature matching")
    ohb: bool = Field(False, description="QuantVLA's output head balancing")
    calibration: Calibration | None = Field(None, description="the data the transforms are fitted on")
    artifact: Path | None = Field(
        None, description="a ready artifact instead of calibrating; must fit policy and settings"
    )

    @model_validator(mode="after")
    def _says_which_layers(self) -> Quant:
        if (self.layout is None) == (not self.include):
            if self.include:
                raise Misplaced(
                    ("include",), "give layout or include, not both; `layout: null` clears an inherited one"
                )
            raise Misplaced(
                ("layout",), "say which layers: layout: llm | expert | llm+expert_mlp | llm+expert, or include"
            )
        if (self.weight_bits, self.activation_bits) == (8, 4):
            raise Misplaced(("activation_bits",), "W8A4 has no kernel; supported are W4A8, W8A8, W4A4, W4A16 and W8A16")
        if self.row_rotation and self.method != "weight_pca":
            raise Misplaced(("row_rotation",), f"belongs to weight_pca; leave it out with {self.method}")
        data_free = self.method in ("rtn", "weight_pca", "hadamard") and not (self.atm or self.ohb)
        if not data_free and self.calibration is None and self.artifact is None:
            raise Misplaced(("calibration",), f"{self.method} is fitted on data: give calibration.path, or artifact")
        return self

    @property
    def precision(self) -> str:
        """`W4A8` and the like."""
        return f"W{self.weight_bits}A{self.activation_bits}"


class QuantOverrides(Quant):
    """The quant keys in which one arm differs from the experiment; only those that are written count."""

    @model_validator(mode="after")
    def _says_which_layers(self) -> QuantOverrides:
        return self  # only the merged Quant has to be whole

    @model_serializer(mode="wrap")
    def _only_what_is_said(self, handler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key in self.model_fields_set}


def quant_of_arm(base: Quant | None, overrides: QuantOverrides | None) -> Quant:
    """The experiment's quant with an arm's overrides on top. An overriding `include` replaces an inherited layout."""
    said = overrides.model_dump(exclude_unset=True) if overrides else {}
    merged = base.model_dump() if base else {}
    if said.get("include") and "layout" not in said:
        merged["layout"] = None
    if said.get("layout") and "include" not in said:
        merged["include"] = ()
    return Quant.model_validate({**merged, **said})


# --------------------------------------------------------------------------------------------------- the arms
def _spell_out(entry: Any) -> Any:
    if isinstance(entry, str):
        return {"name": entry, "backend": entry}
    if isinstance(entry, dict) and "name" not in entry and "backend" in entry:
        return {"name": entry["backend"], **entry}
    return entry


class Backend(Frozen):
    """One arm: a backend, under a name of its own when one backend appears several times."""

    name: Slug = Field(description="the arm's name in tables and directories; by default the backend's")
    backend: str = Field(description="baseline (unquantized), aa (baseline again), auto, or a kernel's name")
    quant: QuantOverrides | None = Field(None, description="quant keys in which this arm differs")

    @model_serializer(mode="wrap")
    def _short_when_plain(self, handler) -> Any:
        return self.backend if self.name == self.backend and self.quant is None else handler(self)


BackendEntry = Annotated[Backend, BeforeValidator(_spell_out, json_schema_input_type=str | Backend)]


@dataclass(frozen=True)
class Arm:
    """What one column of the comparison runs. `quant` is None for an unquantized arm."""

    name: str
    backend: str
    quant: Quant | None


# ------------------------------------------------------------------------------------------ around the episodes
class Stop(Frozen):
    """Sequential stopping: spend episodes on pairs only until the verdict is clear.

    A sweep runs such a cell as one shard.
    """

    margin: Float | None = Field(
        None, gt=0, lt=1, description="the margin of this test; null: the experiment's `margin`"
    )
    alpha: Float = Field(0.025, gt=0, lt=0.5, description="one-sided error rate of the anytime-valid test")
    max_episodes: Int | None = Field(
        None, ge=1, description="pairs after which to stop undecided; null: all of them; may be raised later"
    )


class Tracking(Frozen):
    """Mirrors of the ledger. They can be rebuilt from it and never delay an episode."""

    trackers: tuple[TrackerName, ...] = Field(("wandb",), description="wandb, trackio, both, or [] for none")
    mode: Literal["offline", "online", "disabled"] = Field(
        "offline", description="online needs your own account and key"
    )
    project: str = Field("qlibero", min_length=1, description="W&B project")
    entity: str | None = Field(None, description="W&B team or user; null: your default")


def _trackers_alone(value: Any) -> Any:
    return (
        {"trackers": [value]}
        if isinstance(value, str)
        else {"trackers": value}
        if isinstance(value, list | tuple)
        else value
    )


class Slurm(Frozen):
    """What `sweep --engine slurm` writes into submit.sbatch."""

    partition: str | None = Field(None, description="--partition")
    account: str | None = Field(None, description="--account")
    qos: str | None = Field(None, description="--qos")
    gres: str | None = Field(None, description="--gres, e.g. gpu:1")
    time: str = Field("04:00:00", pattern=r"^(\d+-)?\d+(:\d\d){0,2}$", description="--time of one array task")
    cpus_per_task: Int = Field(8, ge=1, description="--cpus-per-task; simulator workers share them")
    mem: str | None = Field(
        None, pattern=r"^\d+[KMGT]?$", description="--mem, e.g. 48G; 2.5 GB per simulator, and the policy's own"
    )
    array_limit: Int | None = Field(None, ge=1, description="most array tasks at once (`--array=0-99%N`)")
    signal_s: Int = Field(120, ge=30, description="seconds before the time limit at which a task saves and requeues")
    setup: tuple[str, ...] = Field((), description="shell lines before the work, e.g. `module load cuda`")
    container: str | None = Field(None, description="command prefix, e.g. `apptainer exec --nv qlibero.sif`")
    extra: tuple[str, ...] = Field((), description="further #SBATCH options, e.g. --constraint=h100")


class Ray(Frozen):
    """Where `sweep --engine ray` finds its cluster."""

    address: str = Field("auto", description="address of a running cluster, or `local` to start one here")
    cpus: Float = Field(2, gt=0, description="CPUs reserved per shard")
    gpus: Float = Field(0, ge=0, description="GPUs reserved per shard")


class Launch(Frozen):
    """How a sweep is spread over machines. Changes nothing in the results."""

    engine: Literal["local", "slurm", "ray"] = Field("local", description="default of `sweep --engine`")
    shard_episodes: Int = Field(100, ge=1, description="episodes per shard and arm; aim at ten minutes or more")
    processes: Int = Field(1, ge=1, description="local: shards at once")
    slurm: Slurm = Field(default_factory=Slurm, description="Slurm's options")
    ray: Ray = Field(default_factory=Ray, description="Ray's options")


# -------------------------------------------------------------------------------------------------- experiment
class Experiment(Frozen):
    """One cell: a policy on a suite, the same episodes under every backend."""

    name: Slug = Field(description="names the run directory; by default the file's name")
    suite: SuiteName = Field(description="LIBERO suite")
    tasks: Literal["all"] | tuple[Int, ...] = Field("all", description="all, or a list of task numbers")
    episodes_per_task: Int = Field(OFFICIAL_INITS, ge=1, le=OFFICIAL_INITS, description="official initial states 0…N-1")
    seed: Int = Field(7, ge=0, le=2**32 - 1, description="seed of scenes and policy noise")
    protocol: Literal["pure", "openpi"] = Field(
        "pure", description="pure: an episode depends on its key only; openpi: the published evaluations' random stream"
    )
    max_steps: Int | None = Field(None, ge=1, description="replaces the suite's step cap; recorded, and not comparable")
    policy: Policy = Field(description="what is evaluated")
    quant: Quant | None = Field(None, description="how arms other than baseline and aa are quantized")
    backends: tuple[BackendEntry, ...] = Field(
        description="the arms, paired on the same episodes", json_schema_extra={"minItems": 1}
    )
    on_failure: Literal["refuse", "fallback"] = Field(
        "refuse", description="when a kernel fails its trial: stop, or fall back with the reason on record"
    )
    workers: Literal["auto"] | Annotated[Int, Field(ge=1)] = Field(
        "auto", description="simulator processes; auto: one per core this job may use, as far as its memory allows"
    )
    retries: Int = Field(
        2, ge=0, description="times an episode whose simulator died is run again before it is an error"
    )
    videos: Literal["all"] | Annotated[Int, Field(ge=0)] = Field(
        2, description="all, or how many initial states are filmed in every arm, flipped ones first (after the run)"
    )
    margin: Float = Field(
        0.02,
        gt=0,
        lt=1,
        description="largest acceptable loss of success rate, e.g. 0.02 = 2 points; every verdict is at it",
    )
    stop: Stop | None = Field(None, description="sequential stopping; null: run everything")
    tracking: Annotated[
        Tracking,
        BeforeValidator(_trackers_alone, json_schema_input_type=Tracking | tuple[TrackerName, ...] | TrackerName),
    ] = Field(default_factory=Tracking, description="mirrors of the ledger: a list of trackers, or a mapping")
    launch: Launch = Field(default_factory=Launch, description="how sweeps are spread over machines")

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        if self.tasks != "all":
            count = TASKS_OF_SUITE[self.suite]
            for i, task in enumerate(self.tasks):
                if not 0 <= task < count:
                    raise Misplaced(("tasks", i), f"{self.suite} has tasks 0 to {count - 1}")
                if task in self.tasks[:i]:
                    raise Misplaced(("tasks", i), f"task {task} is listed twice")
            if not self.tasks:
                raise Misplaced(("tasks",), "no task is listed; write all, or some numbers")
        if not self.backends:
            raise Misplaced(("backends",), "no arm is listed; write e.g. [baseline, fake]")
        seen: set[str] = set()
        for i, entry in enumerate(self.backends):
            where = ("backends", i)
            if entry.name in seen:
                raise Misplaced((*where, "name"), f"two arms are called {entry.name}; give one of them another name:")
            seen.add(entry.name)
            if entry.backend in UNQUANTIZED_BACKENDS:
                if entry.quant is not None:
                    raise Misplaced((*where, "quant"), f"{entry.backend} is unquantized; remove its quant")
                continue
            if self.policy.type == "remote":
                raise Misplaced(
                    where, "a remote policy runs as its server has it; only baseline and aa can be its arms"
                )
            if self.quant is None and entry.quant is None:
                raise Misplaced(where, f"{entry.backend} needs a quant section (extends: ../quant/duquant_w4a8.yaml)")
            try:
                quant_of_arm(self.quant, entry.quant)
            except ValueError as error:
                message = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
                raise Misplaced((*where, "quant"), message) from None
        return self

    def arms(self) -> tuple[Arm, ...]:
        """The arms in the order they are written."""
        return tuple(
            Arm(b.name, b.backend, None if b.backend in UNQUANTIZED_BACKENDS else quant_of_arm(self.quant, b.quant))
            for b in self.backends
        )

    def task_ids(self) -> tuple[int, ...]:
        """Task numbers, `all` spelt out."""
        return tuple(range(TASKS_OF_SUITE[self.suite])) if self.tasks == "all" else self.tasks


# --------------------------------------------------------------------------------------------------- the hash
def config_hash(experiment: Experiment, arm: Arm) -> str:
    """16 hex digits over everything that decides the result of one of `arm`'s episodes, and nothing else.

    Left out: which episodes are run (tasks, episodes_per_task, stop), margin, other arms, names, workers, retries,
    videos, tracking, launch. So more episodes or another arm continue a run directory, and another seed or alpha is
    refused. A policy with a sha256 counts by it; paths inside the repository count relative to it, so a hash does not
    depend on where the checkout lies.
    """
    policy = experiment.policy.model_dump(mode="json")
    if policy.get("sha256"):
        policy.pop("checkpoint")
    if policy.get("type") == "remote":
        policy = {key: policy[key] for key in ("type", "url", "replan_steps")}
    decides = {
        "suite": experiment.suite,
        "seed": experiment.seed,
        "protocol": experiment.protocol,
        "max_steps": experiment.max_steps,
        "policy": policy,
        "backend": arm.backend,
        "quant": arm.quant and _ordered(arm.quant.model_dump(mode="json")),
        "on_failure": experiment.on_failure if arm.quant else None,
    }
    text = json.dumps(_portable(decides), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _ordered(quant: dict[str, Any]) -> dict[str, Any]:
    return {**quant, "per_layer_bits": list(quant["per_layer_bits"].items())}  # later patterns win: order counts


# set by a sweep inside a container: the checkout outside, whose paths the experiment names
CHECKOUT = "QLIBERO_CHECKOUT"


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    for checkout in (str(REPOSITORY), os.environ.get(CHECKOUT)):
        if checkout and isinstance(value, str) and value.startswith(f"{checkout}/"):
            return value[len(f"{checkout}/") :]
    return value
