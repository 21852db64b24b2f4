"""Sequential stopping inside a run (`stop:` of an experiment): which episodes come first, and when enough has been seen.

The rule itself and why it may be looked at after every episode are in `results/stopping.py`; here it meets the engine.
Pairs count in the declared random order over all tasks. They are *run* in blocks of that order, grouped by task within a
block, because changing a simulator's task is dear.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlibero.config.schema import Experiment
from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError
from qlibero.results.ledger import read_ledger
from qlibero.results.records import EpisodeRecord
from qlibero.results.stopping import Decision, PairStep, declare

BLOCK_PAIRS = 20
REFERENCE = "baseline"


class SequentialRun:
    """The state of the test: outcomes so far and the decision about every arm under test."""

    def __init__(self, experiment: Experiment, run_dir: Path, keys: Sequence[EpisodeKey], shards: int):
        if shards > 1:
            raise UserError("stop: a sequential test needs all its episodes in one process; run this cell as one shard")
        arms = [arm.name for arm in experiment.arms()]
        if REFERENCE not in arms or len(arms) < 2:
            raise UserError(f"stop: needs the arm {REFERENCE} and at least one more to compare it with; backends are {arms}")
        # the A/A arm is the noise floor, not a hypothesis: it takes no share of alpha and holds nothing up
        self.arms = [a.name for a in experiment.arms() if a.name != REFERENCE and a.backend != "aa"] or arms[1:]
        stop = experiment.stop
        self._declaration = declare(
            run_dir, keys, margin=stop.margin, alpha=stop.alpha, arms=self.arms, seed=experiment.seed
        )
        self.order = self._declaration.order[: stop.max_episodes]
        self._outcomes = {
            (arm, record.key): record.outcome for arm in arms for record in read_ledger(run_dir, arm)
        }

    def block(self, key: EpisodeKey) -> int:
        """Which block of the declared order `key` belongs to."""
        return self.order.index(key) // BLOCK_PAIRS

    def add(self, record: EpisodeRecord) -> None:
        """An episode has finished."""
        self._outcomes[record.arm, record.key] = record.outcome

    def decisions(self) -> dict[str, Decision]:
        """What can be said of every arm now."""
        return {arm: self._declaration.decide([self._step(arm, key) for key in self.order]) for arm in self.arms}

    def decided(self) -> bool:
        """Whether no arm needs another pair."""
        return all(decision.stop for decision in self.decisions().values())

    def _step(self, arm: str, key: EpisodeKey) -> PairStep:
        reference, tested = self._outcomes.get((REFERENCE, key)), self._outcomes.get((arm, key))
        if reference is None or tested is None:
            return None
        if "error" in (reference, tested):
            return "error"
        return (tested == "success") - (reference == "success")
