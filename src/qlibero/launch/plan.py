"""`qlibero plan`: what a sweep would run, its cost on each engine, what it could detect, and what cannot work.

Costs come from episodes that were really run: of this sweep, of other runs under logs/, or of a calibration, which runs
one episode of each arm *into the ledger*, so that nothing of it is wasted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlibero.config.arms import overrides_of
from qlibero.config.quantization import Quant
from qlibero.config.schema import Experiment, Stop, Tracking
from qlibero.config.yaml_source import laid_over
from qlibero.console import count_text
from qlibero.episode_key import EpisodeKey
from qlibero.errors import QliberoError, UserError
from qlibero.launch.cells import Cell, Manifest, Shard
from qlibero.launch.engine import Engine, engines, load_engine
from qlibero.machine.capacity import WORKER_GB, fitting, wanted
from qlibero.places import RUNS
from qlibero.results.ledger import read_ledger
from qlibero.results.paired_outcomes import power
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import REFERENCE, declared_margin, listed_arms, read_run
from qlibero.results.stopping import BLOCK_PAIRS
from qlibero.results.wording import detectable_line
from qlibero.run.experiment import (
    episode_keys,
    finished_episodes,
    missing_episodes,
    planned_keys,
    run_experiment,
    stopping_rule,
)
from qlibero.run.simulators import device_of, gpu_batch
from qlibero.stats.sequential_power import pairs_needed, prospect

log = logging.getLogger(__name__)

Kind = tuple[Any, ...]
"""What an episode's cost depends on, see `_kind_of`."""
DISCORDANCE = 0.05  # share of pairs that flip, for planning, while none has been observed


@dataclass(frozen=True)
class Cost:
    """Mean seconds of an episode: `sim_s` of simulator and rendering (one core), `policy_s` waiting for the policy."""

    sim_s: float
    policy_s: float
    episodes: int


def plan(manifest: Manifest, calibrate: bool = False) -> dict[str, Any]:
    """The plan as a document; see `_cell` and `_engines` for its parts. Raises UserError for cells that cannot work."""
    refuse_impossible(manifest, None)
    known = costs(manifest)
    if calibrate:
        for cell in manifest.cells:
            unknown = [arm for arm in cell.experiment.arms() if _kind(cell.experiment, arm.name) not in known]
            if unknown:
                log.info(f"calibrating {cell.id}: one episode of each arm, kept in {cell.run_dir}")
                _one_episode(cell)
                known = costs(manifest)
    cells = [_cell(cell, known) for cell in manifest.cells]
    unknown = sum(cell["missing"] for cell in cells if cell["seconds_each"] is None)
    missing = manifest.missing()
    return {
        "sweep": manifest.name,
        "directory": str(manifest.directory),
        "cells": cells,
        "shards": len(manifest.shards),
        "shards_missing": len(missing),
        "episodes": sum(cell["episodes"] for cell in cells),
        "done": sum(cell["done"] for cell in cells),
        "without_cost": unknown,
        "engines": None if unknown else _engines(manifest, known),
        "queued_as": _queued_as(manifest, missing),
    }


def _queued_as(manifest: Manifest, missing: tuple[int, ...]) -> dict[str, dict[str, int]]:
    """What a sweep would submit for the `missing` shards, by engine, where an engine has something to say of that."""
    own = manifest.cells[0].experiment.launch.engine
    found = {name: engine.jobs(missing, name == own) for name, engine in engines(own).items() if missing}
    return {name: jobs for name, jobs in found.items() if jobs is not None}


def refuse_impossible(manifest: Manifest, engine: str | None) -> None:
    """Raise UserError naming every cell that cannot run on `engine` (None: on none of them looked at by itself)."""
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
        device = device_of(arm, _auto(experiment, engine))
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


def _auto(experiment: Experiment, engine: Engine) -> Callable[[], str]:
    """What `device: auto` will be on an engine."""
    return lambda: "cuda" if engine.place(experiment.launch).gpus > 0 else "cpu"


def costs(manifest: Manifest) -> dict[Kind, Cost]:
    """Mean cost per kind of episode, from this sweep's cells first, else from other runs under logs/."""
    ours = [cell.run_dir for cell in manifest.cells]
    found: dict[Kind, list[EpisodeRecord]] = {}
    for directories in (ours, _other_runs(ours)):
        here: dict[Kind, list[EpisodeRecord]] = {}
        for directory in directories:
            try:
                run = read_run(directory)
            except QliberoError:
                continue
            for arm, ledger in run.arms.items():
                kind = _kind_of(run.experiment, arm)
                here.setdefault(kind, []).extend(r for r in ledger.records if r.outcome != "error")
        found = {**{kind: records for kind, records in here.items() if records}, **found}
    return {kind: _cost(records) for kind, records in found.items()}


def _other_runs(ours: list[Path]) -> Iterable[Path]:
    return [path.parent for path in sorted(RUNS.glob("*/experiment.yaml")) if path.parent not in ours]


def _kind(experiment: Experiment, arm: str) -> Kind:
    return _kind_of(experiment.model_dump(mode="json"), arm)


def _kind_of(experiment: dict[str, Any], arm: str) -> Kind:
    """What an episode's cost depends on: suite, step cap, policy and backend."""
    replicated = arm.rpartition("-")[0]
    entry = next(
        (e for e in listed_arms(experiment) if e["name"] == (replicated if e.get("replicates") else arm)),
        {"backend": arm},
    )
    backend = "baseline" if entry["backend"] == "aa" else entry["backend"]
    policy = json.dumps(laid_over(experiment.get("policy"), entry.get("policy") or {}), sort_keys=True)
    return json.dumps(experiment.get("suite")), experiment.get("max_steps"), policy, backend


def _cost(records: list[EpisodeRecord]) -> Cost:
    n = len(records)
    return Cost(
        sim_s=sum(r.sim_ms + r.render_ms for r in records) / n / 1e3,
        policy_s=sum(sum(r.policy_ms) for r in records) / n / 1e3,
        episodes=n,
    )


def _one_episode(cell: Cell) -> None:
    experiment = cell.experiment.model_copy(update={"tracking": Tracking(mode="disabled"), "videos": 0, "workers": 1})
    run_experiment(experiment, cell.run_dir, most_pairs=1)


def _cell(cell: Cell, known: dict[Kind, Cost]) -> dict[str, Any]:
    """One cell: its arms, episodes, what the ledger has, seconds per episode, and what its pairs can detect."""
    experiment = cell.experiment
    arms = [arm.name for arm in experiment.arms()]
    pairs = len(planned_keys(experiment))
    done, missing = (len(of(experiment, cell.run_dir)) for of in (finished_episodes, missing_episodes))
    found = {arm: known.get(_kind(experiment, arm)) for arm in arms}
    each = {arm: round(cost.sim_s + cost.policy_s, 2) for arm, cost in found.items() if cost}
    return {
        "cell": cell.id,
        "suite": ", ".join(experiment.suites),
        "arms": arms,
        "episodes": done + missing,
        "done": done,
        "missing": missing,
        "shards": cell.shards,
        "overrides": {arm.name: said for arm in experiment.arms() if (said := overrides_of(experiment, arm))},
        "seconds_each": each if len(each) == len(arms) else None,
        "pairs": pairs,
        **(_detectable(cell, pairs) if len(arms) > 1 else {}),
    }


def _detectable(cell: Cell, pairs: int) -> dict[str, Any]:
    """What the cell's pairs can find, and what non-inferiority takes. None: too few pairs or flips."""
    margin = declared_margin(cell.experiment.model_dump(mode="json"))
    found = power(pairs, *_discordance(cell), margin)
    stop = cell.experiment.stop
    sequential = _prospects(cell.experiment, stop, found.discordance, margin) if stop else None
    return {
        "discordance": f"{found.discordance:.1%} {found.discordance_from}",
        "detectable_difference": found.difference,
        "one_way_difference": found.one_way_difference,
        "margin": margin,
        "noninferiority_power": found.noninferiority_power,
        "pairs_for_noninferiority": found.pairs_for_noninferiority,
        "sequential": sequential,
        "detectable": detectable_line(found) + (f" {sequential['line']}" if sequential else ""),
    }


def _prospects(experiment: Experiment, stop: Stop, discordance: float, margin: float) -> dict[str, Any]:
    """What `stop` will cost and find, for one arm, if the arms are truly equal."""
    declared = stopping_rule(experiment)
    if declared.method == "evalues":
        return {
            "line": "All for one look at the end; e-values may be looked at after every pair and take up to 1.7 times "
            "as many (docs/statistics.md)."
        }
    share = declared.alpha / len(declared.arms)
    chances = prospect(declared.looks, margin=margin, discordance=discordance, alpha=share, futility=declared.futility)
    needed = pairs_needed(
        margin=margin,
        discordance=discordance,
        looks=stop.looks,
        block=BLOCK_PAIRS,
        alpha=share,
        futility=declared.futility,
    )
    found = {key: float(f"{value:.6g}") for key, value in asdict(chances).items()}
    return {
        "looks": len(declared.looks),
        **found,
        "pairs_for_noninferiority": needed,
        "line": f"With {count_text(len(declared.looks), 'look')} (α {share:g} an arm) an equal arm is shown "
        "non-inferior with "
        f"{100 * chances.noninferior:.0f} % chance and takes {chances.expected_pairs:,.0f} of "
        f"{count_text(declared.looks[-1], 'pair')} on average, {100 * chances.futile:.0f} % end as futile; 80 % takes "
        f"{count_text(needed, 'pair')} declared.",
    }


def _discordance(cell: Cell) -> tuple[float, str]:
    """Share of pairs that flip, the largest over the arms and never below that of the A/A arm: observed where an arm
    has at least 20 pairs and a flip, else assumed."""
    arms = cell.experiment.arms()
    first = next((arm for arm in arms if arm.name == REFERENCE), arms[0])
    reference = {r.key: r.outcome for r in read_ledger(cell.run_dir, first.name) if r.outcome != "error"}
    found = []
    for arm in arms:
        if arm is first:
            continue
        outcomes = {
            r.key: r.outcome for r in read_ledger(cell.run_dir, arm.name) if r.outcome != "error" and r.key in reference
        }
        flips = sum(outcome != reference[key] for key, outcome in outcomes.items())
        if len(outcomes) >= 20 and flips:
            found.append((flips / len(outcomes), f"observed in {arm.name}"))
    return max(found, default=(DISCORDANCE, "assumed"))


def _engines(manifest: Manifest, known: dict[Kind, Cost]) -> dict[str, dict[str, Any]]:
    """Per engine: {"wall_h", "gpu_h", "basis"} for what is missing, without start-up and queueing."""
    launch = manifest.cells[0].experiment.launch  # the cells share it
    missing = {cell.id: missing_episodes(cell.experiment, cell.run_dir) for cell in manifest.cells}
    by_engine = {}
    for name, engine in engines(launch.engine).items():
        place = engine.place(launch)
        workers = {cell.id: _simulators(cell.experiment, engine) for cell in manifest.cells}
        shards = [
            s
            for shard in manifest.shards
            if (s := _shard_seconds(manifest, shard, missing[shard.cell], workers[shard.cell], engine, known))
        ]
        # the longest shard is a bound of its own; below it the slots share the sum
        wall = max(max(shards, default=0.0), sum(shards) / min(place.at_once or 10**9, len(shards) or 1))
        by_engine[name] = {
            "wall_h": round(wall / 3600, 3),
            "gpu_h": round(sum(shards) * place.gpus / 3600, 3),
            "longest_shard_min": round(max(shards, default=0.0) / 60, 1),
            "basis": f"shards at once: {place.at_once or 'all'}; of each: {count_text(place.cores, 'core')}, "
            f"up to {count_text(max(workers.values()), 'simulator')}",
        }
    return by_engine


def _simulators(experiment: Experiment, engine: Engine) -> int:
    """As many as a shard of this cell starts on an engine."""
    place = engine.place(experiment.launch)
    most = wanted(place.cores, gpu_batch(experiment, _auto(experiment, engine)))
    workers = most if place.memory_gb is None else fitting(most, place.memory_gb)
    return workers if experiment.workers == "auto" else experiment.workers


def _shard_seconds(
    manifest: Manifest,
    shard: Shard,
    missing: list[tuple[str, EpisodeKey]],
    workers: int,
    engine: Engine,
    known: dict[Kind, Cost],
) -> float:
    """Simulators run beside each other, as many at once as there are cores; the policy serves batches of the episodes
    that wait, one batch at a time."""
    experiment = manifest.cell(shard).experiment
    batches = {arm.name: arm.policy.batch_size for arm in experiment.arms()}
    # auto: one at a time on a CPU; on a GPU this is pessimistic
    together = {arm: min(workers, batch) if batch != "auto" else 1 for arm, batch in batches.items()}
    stepping = min(workers, engine.place(experiment.launch).cores)
    each = {arm.name: known[_kind(experiment, arm.name)] for arm in experiment.arms()}
    keys = set(episode_keys(experiment, (shard.index, shard.count)))
    return sum(each[arm].sim_s / stepping + each[arm].policy_s / together[arm] for arm, key in missing if key in keys)
