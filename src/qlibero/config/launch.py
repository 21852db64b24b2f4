"""What may be said under `launch`: how episodes are spread over processes and machines."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from qlibero.config.fields import MOST, Count, Float, Int, Line, PluginName, StrictModel, Word, one_of_pattern
from qlibero.registry import EnginePlugin

MAX_PROCESSES = 10_000

SlurmTime = Annotated[
    str, one_of_pattern(r"^([0-9]{1,3}-)?[0-9]{1,6}(:[0-9]{2}){0,2}$", "04:00:00", "2-00:00:00", "90 (minutes)")
]
SlurmMemory = Annotated[str, one_of_pattern(r"^[0-9]{1,9}[KMGT]?$", "48G")]


class SlurmMerge(StrictModel):
    """The job after the shards: what is not said here is the array's (partition, account, qos) or not asked for."""

    partition: Word | None = Field(None, description="--partition; null: the array's")
    account: Word | None = Field(None, description="--account; null: the array's")
    qos: Word | None = Field(None, description="--qos; null: the array's")
    gres: Word | None = Field(None, description="--gres, where the partition refuses jobs without one")
    time: SlurmTime = Field("01:00:00", description="--time")
    cpus_per_task: Int | None = Field(None, ge=1, le=MAX_PROCESSES, description="--cpus-per-task")
    mem: SlurmMemory | None = Field(None, description="--mem")
    extra: tuple[Line, ...] = Field((), description="further #SBATCH options")


class Slurm(StrictModel):
    """What `sweep --engine slurm` writes into submit.sbatch."""

    partition: Word | None = Field(None, description="--partition")
    account: Word | None = Field(None, description="--account")
    qos: Word | None = Field(None, description="--qos")
    gres: Word | None = Field(None, description="--gres, e.g. gpu:1")
    gpus: Annotated[str, one_of_pattern(r"^([A-Za-z0-9_.-]+:)?[1-9][0-9]{0,3}$", "1", "h100:1")] | None = Field(
        None, description="--gpus, where the site asks for it instead of gres, e.g. 1 or h100:1"
    )
    nodelist: Word | None = Field(None, description="--nodelist")
    time: SlurmTime = Field("04:00:00", description="--time of one array task")
    cpus_per_task: Int = Field(8, ge=1, le=MAX_PROCESSES, description="--cpus-per-task; simulator workers share them")
    mem: SlurmMemory | None = Field(None, description="--mem, e.g. 48G; 1.9 GB per simulator, and the policy's own")
    array_limit: Int | None = Field(None, ge=1, le=MOST, description="most array tasks at once (`--array=0-99%N`)")
    chdir: Annotated[str, one_of_pattern("^/", "/shared/me/qlibero")] | None = Field(
        None, description="where jobs work; null: the checkout, of a wheel the directory of submission"
    )
    signal_s: Int = Field(
        120, ge=30, le=86_400, description="seconds before the time limit at which a task saves and requeues"
    )
    login_shell: bool = Field(False, description="`bash -l`, where only a login shell knows `module`")
    setup: tuple[Line, ...] = Field((), description="shell lines before the work; the first that fails ends the job")
    container: Line | None = Field(None, description="command prefix, e.g. `apptainer exec --nv qlibero.sif`")
    extra: tuple[Line, ...] = Field((), description="further #SBATCH options, e.g. --constraint=h100")
    merge: SlurmMerge = Field(default_factory=SlurmMerge, description="options of the job after the shards")


class Ray(StrictModel):
    """Where `sweep --engine ray` finds its cluster."""

    address: Word = Field("auto", description="address of a running cluster, or `local` to start one here")
    cpus: Float = Field(2, ge=0.01, le=MAX_PROCESSES, description="CPUs reserved per shard")
    gpus: Float = Field(0, ge=0, le=MAX_PROCESSES, description="GPUs reserved per shard")


class Launch(StrictModel):
    """How episodes are spread over processes and machines. Changes nothing in the results."""

    engine: Annotated[str, PluginName(EnginePlugin)] = Field("local", description="default of `sweep --engine`")
    shard_episodes: Count = Field(100, description="episodes per shard and arm; aim at ten minutes or more")
    processes: Literal["auto"] | Annotated[Int, Field(ge=1, le=MAX_PROCESSES)] = Field(
        "auto",
        description="`run`, engine local: policy processes at once; auto: one for each GPU that may be used, else one",
    )
    slurm: Slurm = Field(default_factory=Slurm, description="Slurm's options")
    ray: Ray = Field(default_factory=Ray, description="Ray's options")
    options: dict[Word, Any] = Field(
        default_factory=dict, max_length=100, description="what an engine that is a plug-in is told"
    )
