"""How many simulators a run starts: as many as keep a policy on a GPU busy, elsewhere one a core; what they took."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from qlibero.activity import doing
from qlibero.config.arms import Arm
from qlibero.config.policies import GPU_BATCH
from qlibero.config.schema import Experiment
from qlibero.machine.capacity import WORKER_GB, simulators

if TYPE_CHECKING:
    from qlibero.sim.pool import SimulatorPool

log = logging.getLogger(__name__)


def device_of(arm: Arm, auto: Callable[[], str]) -> str:
    """`cpu` or `cuda`; `auto` says what an arm is on that leaves it open."""
    wanted = getattr(arm.policy, "device", "cpu")
    return auto() if wanted == "auto" else wanted.partition(":")[0]


def names_a_gpu(experiment: Experiment) -> bool:
    """Whether a policy says which of several GPUs it is on (`cuda:1`)."""
    return any(":" in getattr(arm.policy, "device", "cpu") for arm in experiment.arms())


def device_here() -> str:
    """What a policy takes in this process where it is left open."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def gpu_batch(experiment: Experiment, auto: Callable[[], str] = device_here) -> int | None:
    """The most rows of a call of an arm that is on a GPU; None where none is. `auto`: see `device_of`."""
    batches = [arm.policy.batch_size for arm in experiment.arms() if device_of(arm, auto) == "cuda"]
    return max((GPU_BATCH if batch == "auto" else batch for batch in batches), default=None)


def start_pool(experiment: Experiment, episodes: int, batch: int | None = None) -> SimulatorPool:
    """As many simulators as are asked for and fit, for so many episodes and a `gpu_batch`; use it as a context."""
    from qlibero.machine.environment import simulator_environment
    from qlibero.sim.pool import SimulatorPool

    fitting = simulators(experiment.workers, episodes, gpu_batch=batch)
    log.info(f"simulators: {fitting.workers}, {fitting.why}")
    if fitting.short:
        log.warning(f"simulators: {fitting.short}; one that is killed for it costs its episode")
    doing("starting simulators")
    return SimulatorPool(fitting.workers, environment=simulator_environment())


def tell_memory(pool: SimulatorPool) -> None:
    """What a simulator really took, beside what their number was reckoned with."""
    peak_gb = pool.peak_gb()
    text = f"simulators: up to {peak_gb:.1f} GB each, {WORKER_GB:g} GB were reckoned with"
    if peak_gb > WORKER_GB:
        log.warning(f"{text}; where memory is short, write workers: N")
    else:
        log.info(text)
