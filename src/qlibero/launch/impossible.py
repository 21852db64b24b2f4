"""What of a sweep cannot run on an engine, said before anything is queued."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from qlibero.config.quantization import Quant
from qlibero.config.schema import Experiment
from qlibero.console import count_text
from qlibero.errors import QliberoError, UserError, WorkFailed
from qlibero.launch.cells import Manifest
from qlibero.launch.engine import Engine, engines, load_engine
from qlibero.machine.capacity import WORKER_GB
from qlibero.run.experiment import look_through
from qlibero.run.planned import planned_keys
from qlibero.run.simulators import device_of


def refuse_impossible(manifest: Manifest, engine: str | None) -> None:
    """Raise UserError naming every cell that cannot run on `engine` (None: on none of them looked at by itself), and
    all that is wrong with tasks of one's own."""
    for experiment in {cell.experiment.own_suites(): cell.experiment for cell in manifest.cells}.values():
        with suppress(WorkFailed):  # LIBERO is not on this machine; where the work will run it is
            look_through(experiment)
    problems = []
    for cell in manifest.cells:
        by_name = {engine: load_engine(engine)} if engine else engines(cell.experiment.launch.engine)
        found = {name: list(_problems(cell.experiment, name, each)) for name, each in by_name.items()}
        if all(found.values()):
            problems.append(f"  {cell.id}: " + "; ".join(dict.fromkeys(p for name in found for p in found[name])))
    if problems:
        where = f"on engine {engine}" if engine else "on any engine"
        raise UserError(
            f"{len(problems)} of {count_text(len(manifest.cells), 'cell')} cannot run {where}:\n" + "\n".join(problems)
        )


def _problems(experiment: Experiment, name: str, engine: Engine) -> Iterator[str]:
    try:
        planned_keys(experiment)
    except UserError as problem:
        yield str(problem)
    memory_gb = engine.place(experiment.launch).memory_gb
    workers = experiment.workers if experiment.workers != "auto" else 1  # auto takes what fits, and one must
    if memory_gb is not None and workers * WORKER_GB > memory_gb:
        yield (
            f"{count_text(workers, 'simulator')} need{'s' * (workers == 1)} {workers * WORKER_GB:g} GB, "
            f"a shard on engine {name} has {memory_gb:.1f} GB; {engine.more_memory}"
        )
    yield from engine.problems(experiment.launch)
    for arm in experiment.arms():
        device = device_of(arm, auto_device(experiment, engine))
        if arm.quant and arm.backend != "auto" and experiment.on_failure == "refuse":
            if reason := _unsupported(arm.backend, arm.quant, device, engine.here):
                yield f"arm {arm.name}: {reason}"


def _unsupported(backend: str, quant: Quant, device: str, here: bool) -> str | None:
    """Why an arm's kernel cannot serve a typical layer on `device`; None when it can. Validation has the last word.

    Of a cluster's nodes (not `here`) only what is true on any machine is said: a login node has no GPU and perhaps not
    the kernel's package, which says nothing about where the work will run.
    """
    from qlibero.kernels import load
    from qlibero.kernels.contract import GemmShape

    try:
        kernel = load(backend)
        bits = quant.kernel_bits(quant.weight_bits), quant.activation_bits
        shape = GemmShape(2048, 2048, *bits, quant.group_size, device, quant.number_format)
    except ImportError as problem:
        return str(problem) if here else None
    except QliberoError as problem:
        return str(problem)
    support = kernel.supports(shape) if here else kernel.fits(shape)
    return None if support.ok else f"{backend} on {device}: {support.reason}"


def auto_device(experiment: Experiment, engine: Engine) -> Callable[[], str]:
    """What `device: auto` will be on an engine."""
    return lambda: "cuda" if engine.place(experiment.launch).gpus > 0 else "cpu"
