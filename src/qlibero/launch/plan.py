"""`qlibero plan`: what a sweep would run, its cost on each engine, what it could detect, and what cannot work.

Costs come from episodes that were really run: of this sweep, of other runs under logs/, or of a calibration, which runs
one episode of each arm *into the ledger*, so that nothing of it is wasted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qlibero.config.arms import overrides_of
from qlibero.config.schema import Experiment, Tracking
from qlibero.config.yaml_source import laid_over
from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.episode_key import EpisodeKey
from qlibero.errors import QliberoError
from qlibero.launch.cells import Cell, Manifest, Shard
from qlibero.launch.detectable import Detectable, detectable
from qlibero.launch.engine import Engine, engines
from qlibero.launch.impossible import auto_device, refuse_impossible
from qlibero.machine.capacity import fitting, wanted
from qlibero.places import RUNS
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import listed_arms, read_run
from qlibero.run.experiment import run_experiment
from qlibero.run.planned import episode_keys, finished_episodes, missing_episodes, planned_keys
from qlibero.run.simulators import gpu_batch

log = logging.getLogger(__name__)

Kind = tuple[Any, ...]
"""What an episode's cost depends on, see `_kind_of`."""


@dataclass(frozen=True)
class Cost:
    """Mean seconds of an episode: `sim_s` of simulator and rendering (one core), `policy_s` waiting for the policy."""

    sim_s: float
    policy_s: float
    episodes: int


@dataclass(frozen=True)
class CellPlan:
    """One cell: its arms, episodes, what the ledger has, seconds per episode (None where an arm's are not known), and
    what its pairs can find (None for one arm alone)."""

    cell: str
    suite: str
    arms: tuple[str, ...]
    done: int
    missing: int
    shards: int
    overrides: dict[str, list[str]]
    seconds_each: dict[str, float] | None
    pairs: int
    detectable: Detectable | None

    @property
    def episodes(self) -> int:
        return self.done + self.missing

    def to_json(self) -> JsonObject:
        return {
            "cell": self.cell,
            "suite": self.suite,
            "arms": list(self.arms),
            "episodes": self.episodes,
            "done": self.done,
            "missing": self.missing,
            "shards": self.shards,
            "overrides": self.overrides,
            "seconds_each": self.seconds_each,
            "pairs": self.pairs,
            **(self.detectable.to_json() if self.detectable else {}),
        }


@dataclass(frozen=True)
class EngineCost:
    """Of what is missing, without start-up and queueing; `basis` says on what that rests."""

    wall_h: float
    gpu_h: float
    longest_shard_min: float
    basis: str


@dataclass(frozen=True)
class Plan:
    """`engines` is None while the cost of some episode is not known."""

    sweep: str
    directory: Path
    cells: tuple[CellPlan, ...]
    shards: int
    shards_missing: int
    engines: dict[str, EngineCost] | None
    queued_as: dict[str, dict[str, int]]

    @property
    def episodes(self) -> int:
        return sum(cell.episodes for cell in self.cells)

    @property
    def done(self) -> int:
        return sum(cell.done for cell in self.cells)

    @property
    def without_cost(self) -> int:
        return sum(cell.missing for cell in self.cells if cell.seconds_each is None)

    def to_json(self) -> JsonObject:
        return {
            "sweep": self.sweep,
            "directory": str(self.directory),
            "cells": [cell.to_json() for cell in self.cells],
            "shards": self.shards,
            "shards_missing": self.shards_missing,
            "episodes": self.episodes,
            "done": self.done,
            "without_cost": self.without_cost,
            "engines": None if self.engines is None else {name: asdict(cost) for name, cost in self.engines.items()},
            "queued_as": self.queued_as,
        }


def plan(manifest: Manifest, calibrate: bool = False) -> Plan:
    """Raises UserError for cells that cannot work."""
    refuse_impossible(manifest, None)
    known = costs(manifest)
    if calibrate:
        for cell in manifest.cells:
            unknown = [arm for arm in cell.experiment.arms() if _kind(cell.experiment, arm.name) not in known]
            if unknown:
                log.info(f"calibrating {cell.id}: one episode of each arm, kept in {cell.run_dir}")
                _one_episode(cell)
                known = costs(manifest)
    cells = tuple(_cell(cell, known) for cell in manifest.cells)
    missing = manifest.missing()
    found = Plan(
        manifest.name,
        manifest.directory,
        cells,
        len(manifest.shards),
        len(missing),
        None,
        _queued_as(manifest, missing),
    )
    return found if found.without_cost else replace(found, engines=_engines(manifest, known))


def _queued_as(manifest: Manifest, missing: tuple[int, ...]) -> dict[str, dict[str, int]]:
    """What a sweep would submit for the `missing` shards, by engine, where an engine has something to say of that."""
    own = manifest.cells[0].experiment.launch.engine
    found = {name: engine.jobs(missing, name == own) for name, engine in engines(own).items() if missing}
    return {name: jobs for name, jobs in found.items() if jobs is not None}


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


def _kind_of(experiment: JsonObject, arm: str) -> Kind:
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


def _cell(cell: Cell, known: dict[Kind, Cost]) -> CellPlan:
    experiment = cell.experiment
    arms = [arm.name for arm in experiment.arms()]
    pairs = len(planned_keys(experiment))
    done, missing = (len(of(experiment, cell.run_dir)) for of in (finished_episodes, missing_episodes))
    found = {arm: known.get(_kind(experiment, arm)) for arm in arms}
    each = {arm: round(cost.sim_s + cost.policy_s, 2) for arm, cost in found.items() if cost}
    return CellPlan(
        cell=cell.id,
        suite=", ".join(experiment.suites),
        arms=tuple(arms),
        done=done,
        missing=missing,
        shards=cell.shards,
        overrides={arm.name: said for arm in experiment.arms() if (said := overrides_of(experiment, arm))},
        seconds_each=each if len(each) == len(arms) else None,
        pairs=pairs,
        detectable=detectable(cell, pairs) if len(arms) > 1 else None,
    )


def _engines(manifest: Manifest, known: dict[Kind, Cost]) -> dict[str, EngineCost]:
    launch = manifest.launch
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
        by_engine[name] = EngineCost(
            round(wall / 3600, 3),
            round(sum(shards) * place.gpus / 3600, 3),
            round(max(shards, default=0.0) / 60, 1),
            f"shards at once: {place.at_once or 'all'}; of each: {count_text(place.cores, 'core')}, "
            f"up to {count_text(max(workers.values()), 'simulator')}",
        )
    return by_engine


def _simulators(experiment: Experiment, engine: Engine) -> int:
    """As many as a shard of this cell starts on an engine."""
    place = engine.place(experiment.launch)
    most = wanted(place.cores, gpu_batch(experiment, auto_device(experiment, engine)))
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
