"""Which episodes an experiment has, which the ledger holds and which are missing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from qlibero.config.schema import Experiment
from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError
from qlibero.results.declaration import Declaration
from qlibero.results.ledger import read_ledger
from qlibero.run.sequential import SequentialRun, declaration_of


def episode_keys(experiment: Experiment, shard: tuple[int, int] = (0, 1)) -> list[EpisodeKey]:
    """The episodes of shard `(index, count)`, in order; all arms of an episode belong to the same shard.

    A shard is a contiguous piece, so that it has few tasks: building a task's scene costs as much as an episode.
    """
    kind, count = experiment.initial_states()
    keys = [
        EpisodeKey(suite, task, init, seed, kind)
        for suite, task in experiment.all_tasks()
        for init in range(count)
        for seed in experiment.all_seeds()
    ]
    index, count = shard
    return keys[index * len(keys) // count : (index + 1) * len(keys) // count]


def planned_keys(experiment: Experiment) -> Sequence[EpisodeKey]:
    """The most episodes an arm will run: all, or as many as `stop` may spend, in its declared order.

    Raises UserError for a `stop` without two arms to compare.
    """
    keys = episode_keys(experiment)
    return keys if experiment.stop is None else stopping_rule(experiment).spendable


def stopping_rule(experiment: Experiment) -> Declaration:
    """What an experiment with `stop` declares. Raises UserError without two arms to compare."""
    return declaration_of(experiment, episode_keys(experiment))


def missing_episodes(
    experiment: Experiment, run_dir: Path, shard: tuple[int, int] = (0, 1)
) -> list[tuple[str, EpisodeKey]]:
    """(arm, key) of everything the ledger does not hold yet. Episodes that ended in an error are missing: they get
    another chance each time the experiment is run. Under `stop` nothing of an arm is missing once it is decided."""
    done = finished_episodes(experiment, run_dir, shard)
    arms = [arm.name for arm in experiment.arms()]
    keys: Sequence[EpisodeKey] = episode_keys(experiment, shard)
    if experiment.stop is not None:
        if shard[1] > 1:
            raise UserError("stop: a sequential test needs all its episodes in one process; run this cell as one shard")
        sequential = SequentialRun(experiment, run_dir, keys)
        keys, arms = sequential.order, [arm for arm in arms if sequential.needs(arm)]
    return [(arm, key) for key in keys for arm in _rotated(arms, key) if (arm, key) not in done]


def _rotated(arms: list[str], key: EpisodeKey) -> list[str]:
    """The arms of a scene in an order of its own: what comes first on a scene or a host that drifts is no arm's lot."""
    first = int.from_bytes(hashlib.sha256(f"arms/{key}".encode()).digest()[:4], "little") % max(1, len(arms))
    return arms[first:] + arms[:first]


def finished_episodes(
    experiment: Experiment, run_dir: Path, shard: tuple[int, int] = (0, 1)
) -> set[tuple[str, EpisodeKey]]:
    """(arm, key) of the experiment's episodes that are in the ledger with an outcome. With the missing ones these are
    all it will run, as far as can be said now: under `stop` fewer than all keys."""
    keys = set(episode_keys(experiment, shard))
    return {
        (arm.name, record.key)
        for arm in experiment.arms()
        for record in read_ledger(run_dir, arm.name)
        if record.outcome != "error" and record.key in keys
    }
