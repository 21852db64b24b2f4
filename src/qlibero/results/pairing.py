"""Which episodes of two arms may be compared: same key, same scene, both finished. The rest is listed, never dropped.

A pair is two records with equal (suite, task, init, seed) *and* equal fingerprint: the hash of the settled
scene, so that "the same initial state" is a fact and not a hope. They must also have been run alike: protocol and step
cap. What else differs between two arms is said (`unlike.py`) and keeps no pair apart. An error in either arm removes
the pair and is counted apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError
from qlibero.results.arm_meta import ArmMeta
from qlibero.results.machines import is_mixed
from qlibero.results.records import EpisodeRecord, Outcome
from qlibero.results.runs import RunResults


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: an arm of one run, or the same arm of several runs over different episodes."""

    name: str
    records: dict[EpisodeKey, EpisodeRecord]
    run_dirs: dict[EpisodeKey, Path]
    meta: ArmMeta = ArmMeta()
    planned: frozenset[EpisodeKey] = frozenset()  # what it is to run, as far as its run says; at least what it has
    conflicts: frozenset[EpisodeKey] = frozenset()  # recorded twice with different results
    caps: dict[EpisodeKey, int | None] = field(default_factory=dict)  # max_steps as the experiment says it

    @property
    def label(self) -> str:
        return self.meta.label or self.name

    @property
    def runs(self) -> tuple[str, ...]:
        """The directories that its episodes are of."""
        return tuple(dict.fromkeys(map(str, self.run_dirs.values())))

    @property
    def is_control(self) -> bool:
        """Whether this is the reference run again (A/A), the noise floor of every other difference."""
        named = self.name.rsplit("/", 1)[-1] == "aa" or self.meta.backend == "aa"
        return named if self.meta.control is None else self.meta.control


RUN_ALIKE = {"protocol": "protocols", "max_steps": "step caps"}


@dataclass(frozen=True)
class Pair:
    key: EpisodeKey
    reference: EpisodeRecord
    other: EpisodeRecord

    @property
    def step(self) -> int:
        """+1 repaired, −1 broken, 0 concordant."""
        return int(self.other.succeeded) - int(self.reference.succeeded)

    @property
    def outcomes(self) -> tuple[Outcome, Outcome]:
        """Of the reference and of the other arm."""
        return self.reference.outcome, self.other.outcome


def outcomes_of(pairs: Iterable[Pair]) -> list[tuple[Outcome, Outcome]]:
    return [pair.outcomes for pair in pairs]


@dataclass(frozen=True)
class Pairing:
    """`pairs` and `errors` (either side is an error) in key order; `unpaired` gives each left-out key its reason."""

    pairs: tuple[Pair, ...]
    errors: tuple[Pair, ...]
    unpaired: dict[EpisodeKey, str]


def pair_arms(reference: Arm, other: Arm) -> Pairing:
    """Pairs of two arms. Where an arm's episodes come from machines that answer differently, a pair needs both of its
    sides from one kind of machine: else it would show the machines' difference beside the arms'."""
    pairs, errors, unpaired = [], [], {}
    mixed = is_mixed(reference.records.values()) or is_mixed(other.records.values())
    for key in sorted(reference.records.keys() | other.records.keys()):
        left, right = reference.records.get(key), other.records.get(key)
        if left is None:
            unpaired[key] = f"not in {reference.name}"
        elif right is None:
            unpaired[key] = f"not in {other.name}"
        elif "error" in (left.outcome, right.outcome):
            errors.append(Pair(key, left, right))
        elif left.fingerprint != right.fingerprint:
            unpaired[key] = f"different scenes: fingerprints {left.fingerprint[:12]} and {right.fingerprint[:12]}"
        elif why := _run_unlike(left, right, reference.caps, other.caps):
            unpaired[key] = why
        elif mixed and left.machine != right.machine:
            unpaired[key] = (
                f"different machines: {left.machine or 'not recorded'} and {right.machine or 'not recorded'}"
            )
        else:
            pairs.append(Pair(key, left, right))
    return Pairing(tuple(pairs), tuple(errors), unpaired)


def _run_unlike(left: EpisodeRecord, right: EpisodeRecord, *declared: dict[EpisodeKey, int | None]) -> str:
    """How the two were run differently, or "". Records of earlier versions lack the cap; their experiments say it."""
    for name, what in RUN_ALIKE.items():
        x, y = getattr(left, name), getattr(right, name)
        if None in (x, y):
            if not all(left.key in caps for caps in declared):
                continue
            x, y = (caps[left.key] for caps in declared)
        if x != y:
            return f"different {what}: {'the default' if x is None else x} and {'the default' if y is None else y}"
    return ""


def collect_arms(runs: Iterable[RunResults]) -> dict[str, Arm]:
    """Arms of one or several runs by name.

    Runs that share an arm's name are joined when they hold different episodes of the same thing (the cells of
    a sweep over suites); otherwise the later one is called `<run>/<arm>`.
    """
    arms: dict[str, Arm] = {}
    for run in runs:
        said = run.experiment
        for name, ledger in run.arms.items():
            records = ledger.by_key()
            arm = Arm(
                name,
                records,
                dict.fromkeys(records, run.run_dir),
                ledger.meta,
                run.planned or frozenset(records),
                frozenset(ledger.conflicts),
                dict.fromkeys(records, said.get("max_steps")) if said else {},
            )
            known = arms.get(name)
            if known is None:
                arms[name] = arm
            elif _identity(known.meta) == _identity(arm.meta) and not known.records.keys() & records.keys():
                arms[name] = _joined(known, arm)
            else:
                full = f"{run.name}/{name}"
                if full in arms:
                    raise UserError(f"{run.run_dir}: a second arm '{full}'; compare runs of different names")
                arms[full] = replace(arm, name=full)
    return arms


def _joined(one: Arm, more: Arm) -> Arm:
    return Arm(
        one.name,
        one.records | more.records,
        one.run_dirs | more.run_dirs,
        one.meta,
        one.planned | more.planned,
        one.conflicts | more.conflicts,
        one.caps | more.caps,
    )


def _identity(meta: ArmMeta) -> tuple[object, ...]:
    return meta.policy, meta.quant, meta.artifact, meta.backend
