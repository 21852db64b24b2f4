"""Sequential stopping inside a run (`stop:` of an experiment): which episodes come first, and which are still needed.

The rule itself and why it may be looked at while a run goes on are in `results/stopping.py`; here it meets the engine.
Pairs count in the declared random order over all tasks. They are *run* in blocks of that order, grouped by task within
a block, because changing a simulator's task is slow. An arm ends when it is decided; the reference, and an A/A arm that
is no hypothesis, end with the last of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlibero.config.schema import Experiment
from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError
from qlibero.results.declaration import BLOCK_PAIRS, Declaration, check_declaration, declare, make_declaration
from qlibero.results.ledger import read_ledger
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import REFERENCE, declared_margin
from qlibero.results.stopping import Decision, pair_step


def declaration_of(experiment: Experiment, keys: Sequence[EpisodeKey]) -> Declaration:
    """The stopping rule of an experiment over `keys`, all of its episodes. Raises UserError without arms to compare."""
    stop = experiment.stop
    assert stop is not None, "declares no test"
    arms = [arm.name for arm in experiment.arms()]
    if REFERENCE not in arms or len(arms) < 2:
        raise UserError(f"stop: needs the arm {REFERENCE} and at least one more to compare it with; arms are {arms}")
    others = [arm for arm in experiment.arms() if arm.name != REFERENCE]
    # the A/A arm is the noise floor, not a hypothesis: it takes no share of alpha and holds nothing up
    tested = [arm.name for arm in others if arm.backend != "aa"] or [arm.name for arm in others]
    return make_declaration(
        keys,
        margin=declared_margin(experiment.model_dump(mode="json")),
        alpha=stop.alpha,
        arms=tested,
        seed=experiment.seed,
        max_pairs=stop.max_episodes,
        method=stop.method,
        looks=stop.looks,
        futility=stop.futility,
    )


class SequentialRun:
    """The state of the test: outcomes so far and the decision about every arm under test.

    Raises GuardRefusal where the run directory declares another rule. Only `declare` writes anything.
    """

    def __init__(self, experiment: Experiment, run_dir: Path, keys: Sequence[EpisodeKey]):
        self._run_dir = run_dir
        self._declaration = declaration_of(experiment, keys)
        check_declaration(run_dir, self._declaration)
        self.order = self._declaration.spendable
        self._place = {key: index for index, key in enumerate(self.order)}
        self._decisions: dict[str, Decision] = {}  # of the arms with nothing new since
        self._outcomes = {
            (arm.name, record.key): record.outcome
            for arm in experiment.arms()
            for record in read_ledger(run_dir, arm.name)
        }

    def declare(self) -> None:
        """Put the rule and the order on record; to be called before the first episode."""
        declare(self._run_dir, self._declaration)

    def block(self, key: EpisodeKey) -> int:
        """Which block of the declared order `key` belongs to."""
        return self._place[key] // BLOCK_PAIRS

    def add(self, record: EpisodeRecord) -> None:
        """An episode has finished."""
        self._outcomes[record.arm, record.key] = record.outcome
        if record.arm == REFERENCE:
            self._decisions.clear()
        self._decisions.pop(record.arm, None)

    def decisions(self) -> dict[str, Decision]:
        """What can be said of every arm under test now."""
        of = self._outcomes.get
        for arm in self._declaration.arms:
            if arm not in self._decisions:
                steps = [pair_step(of((REFERENCE, key)), of((arm, key))) for key in self.order]
                self._decisions[arm] = self._declaration.decide(steps)
        return {arm: self._decisions[arm] for arm in self._declaration.arms}

    def needs(self, arm: str) -> bool:
        """Whether further episodes of the arm, new or tried again, can still serve a question that is open."""
        decisions = self.decisions()
        return not decisions[arm].stop if arm in decisions else any(not d.stop for d in decisions.values())
