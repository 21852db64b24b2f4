"""`qlibero probe CONFIG --run DIR`: arms asked what a run's reference was asked, along its own recorded episodes.

An episode is pure, so its recorded actions replayed show the policy's observations again, and its noise is a function
of its key. Where the run has an arm of that name, the error along an episode is held against its outcome.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from qlibero.activity import doing
from qlibero.config.schema import Experiment
from qlibero.errors import UserError
from qlibero.policies.base import Observation, QuantizablePolicy
from qlibero.quant.held_out import PHASES
from qlibero.quant.probe import Flips, Probed, Questions, probe
from qlibero.results.ledger import read_ledger, read_trajectory
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import REFERENCE
from qlibero.run.noise import call_noise
from qlibero.run.replay import call_every, replay_all
from qlibero.run.simulators import start_pool
from qlibero.sim.pool import Observed
from qlibero.stats.ranks import auc


def probe_along(experiment: Experiment, run_dir: Path, episodes: int) -> Probed:
    """`quant.probe.probe` on every policy call of so many episodes of the run's baseline, spread over them. An arm that
    the run has too gets its `flips`.

    Raises UserError for a directory without finished baseline episodes that have their trajectories, and WorkFailed
    where a replay differs from its record: it needs the simulator and renderer that the records came from.
    """
    chosen = recorded(run_dir, episodes)
    found = probe(experiment, lambda asked, policy: questions_of(asked, policy, chosen, run_dir))
    episodes_of = np.array(found.episodes)  # of those whose replay came to its end
    reference = {str(record.key): record for record, _ in chosen if str(record.key) in episodes_of}
    arms = []
    for arm in found.arms:
        squares = arm.errors**2
        others = {str(r.key): r for r in read_ledger(run_dir, arm.arm) if str(r.key) in reference}
        pairs = {
            key: record.succeeded != reference[key].succeeded
            for key, record in others.items()
            if record.outcome != "error" and record.fingerprint == reference[key].fingerprint
        }
        if pairs:
            along = {key: float(np.mean(squares[episodes_of == key])) for key in pairs}
            of_flipped, of_others = (
                [along[k] for k, flip in pairs.items() if flip == which] for which in (True, False)
            )
            area, area95 = auc(of_flipped, of_others) or (None, None)
            arm = replace(arm, flips=Flips(sum(pairs.values()), len(pairs), area, area95))
        arms.append(arm)
    return replace(found, arms=tuple(arms))


def recorded(run_dir: Path, episodes: int) -> list[tuple[EpisodeRecord, np.ndarray]]:
    """Finished episodes of the run's baseline with their trajectories, spread evenly over all there are."""
    finished = sorted((r for r in read_ledger(run_dir, REFERENCE) if r.outcome != "error"), key=lambda r: r.key)
    found = [(r, rows) for r in finished if (rows := read_trajectory(run_dir, r)) is not None]
    if not found:
        raise UserError(
            f"--run {run_dir}: {len(finished)} finished episodes of {REFERENCE}, none with its trajectory; "
            "give the directory of a run whose baseline has finished some"
        )
    places = np.unique(np.linspace(0, len(found) - 1, min(episodes, len(found))).astype(int))
    return [found[i] for i in places]


def questions_of(
    experiment: Experiment,
    policy: QuantizablePolicy,
    chosen: list[tuple[EpisodeRecord, np.ndarray]],
    run_dir: Path,
) -> Questions:
    """What the baseline was shown before each call of these episodes, with the noise that it got."""
    protocol, done = chosen[0][0].protocol, 0
    seen: dict[tuple[str, int], tuple[Observation, EpisodeRecord]] = {}

    def observed(record: EpisodeRecord, event: Observed) -> None:
        shown = event.observation
        image, wrist, state = (np.array(x) for x in (shown.image, shown.wrist_image, shown.state))
        seen[str(record.key), event.step] = (Observation(image, wrist, state, event.prompt), record)

    def ended(record: EpisodeRecord, path: Path | None) -> None:
        nonlocal done
        done += 1
        doing("replaying episodes", done, len(chosen))

    with start_pool(experiment, len(chosen)) as pool:
        replay_all([(record, rows, None) for record, rows in chosen], pool, protocol, ended, observed)
    keys = sorted(seen)
    noise = [
        call_noise(record.key, step // call_every(record), policy.noise_shape)
        for (_, step), record in ((key, seen[key][1]) for key in keys)
    ]
    return Questions(
        [seen[key][0] for key in keys],
        np.stack(noise),
        [PHASES[min(2, 3 * key[1] // seen[key][1].steps)] for key in keys],
        True,
        f"{len(chosen)} episodes of {run_dir}",
        [key[0] for key in keys],
    )
