"""What a reader of results is given: runs, sweeps, exported tables, or arms of any of them as DIR/ARM; and labels.

Arms that are named one by one are one comparison whatever runs they are of: did this arm change since last week? The
first is the reference unless another is named. Arms of one name are told apart by as much of their path as that takes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qlibero.errors import UserError
from qlibero.results.exported import is_export, unpacked
from qlibero.results.ledger import ArmLedger, arms_of
from qlibero.results.meta import EPISODES
from qlibero.results.runs import REFERENCE, RunResults, keeps_a_sweep, read_run, read_runs


def select(paths: Sequence[Path | str], labels: Mapping[str, str] | None = None) -> list[RunResults]:
    """The runs of `paths` (see `read_runs`); of a run that is named by DIR/ARM those arms only.

    `labels`: what to call an arm, by the name that it has in the result or the path by which it was given. Raises
    UserError for a path that is neither, and for a label of no arm.
    """
    runs: list[RunResults] = []
    whole: dict[Path, RunResults] = {}
    places: dict[str, tuple[int, str]] = {}  # the path as it was written → where it is
    for given in map(Path, paths):
        if (found := _arm(given)) is None:
            if len(paths) == 1 or not keeps_a_sweep(given):  # a shell's `logs/<sweep>/*/` names that too
                runs += read_runs([given])
            continue
        directory, name = found
        home = next((i for i, run in enumerate(runs) if run.chosen and _same(run.run_dir, directory)), None)
        if home is None:
            home = len(runs)
            whole[directory] = read_run(directory)
            runs.append(replace(whole[directory], arms={}, chosen=True))
        runs[home].arms[name] = whole[runs[home].run_dir].arms[name]
        places[os.path.normpath(given)] = home, name
    return _labelled(_told_apart(runs, places), labels or {}, places)


def is_result_file(path: Path) -> bool:
    """Whether it is a file of another tool's: neither a run, nor an arm, nor an exported table."""
    return not path.is_dir() and not is_export(path) and _arm(path) is None


def first_reference(runs: Sequence[RunResults]) -> str:
    """What verdicts are against where nobody says: the baseline; of arms named one by one, the first."""
    return next(iter(runs[0].arms)) if runs[0].chosen else REFERENCE


def _arm(path: Path) -> tuple[Path, str] | None:
    """Run directory and arm of DIR/ARM; None where the path is no arm's."""
    if path.is_dir():
        lies_here = any(map(EPISODES.fullmatch, os.listdir(path))) and not arms_of(path)
        return (path.resolve().parent, path.resolve().name) if lies_here else None
    parent = path.parent
    places = unpacked(parent) if is_export(parent) else [parent] if parent.is_dir() and arms_of(parent) else []
    known = [name for place in places for name in arms_of(place)]
    if known and path.name not in known:
        raise UserError(f"{path}: {parent} has the arms {', '.join(dict.fromkeys(known))}")
    holders = [place for place in places if path.name in arms_of(place)]
    if len(holders) > 1:
        raise UserError(
            f"{path}: {len(holders)} runs of this table have an arm {path.name}; export the one that is meant"
        )
    return (holders[0], path.name) if holders else None


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _told_apart(runs: list[RunResults], places: dict[str, tuple[int, str]]) -> list[RunResults]:
    """Chosen arms of one name get the end of their run's path before it; `places` follows."""
    every = [name for run in runs for name in run.arms]
    told = list(runs)
    for index, run in enumerate(runs):
        if not run.chosen:
            continue
        names = {}
        for name in run.arms:
            rivals = [other.run_dir for other in runs if other is not run and name in other.arms]
            names[name] = f"{end_of(run.run_dir, rivals)}/{name}" if every.count(name) > 1 else name
        arms = {names[name]: _called(arm, name, names[name]) for name, arm in run.arms.items()}
        told[index] = replace(run, arms=arms)
        places |= {given: (i, names[name]) for given, (i, name) in places.items() if i == index}
    return told


def end_of(path: Path, rivals: Sequence[Path]) -> str:
    """As much of the end of a path as tells it from its rivals."""
    own, others = path.resolve().parts, [rival.resolve().parts for rival in rivals]
    depth = next((k for k in range(1, len(own)) if all(own[-k:] != parts[-k:] for parts in others)), len(own))
    return "/".join(own[-depth:])


def _labelled(
    runs: list[RunResults], labels: Mapping[str, str], places: Mapping[str, tuple[int, str]]
) -> list[RunResults]:
    for said, label in labels.items():
        chosen = places.get(os.path.normpath(said))
        hits = [chosen] if chosen else [(i, said) for i, run in enumerate(runs) if said in run.arms]
        if not hits:
            known = dict.fromkeys(name for run in runs for name in run.arms)
            raise UserError(f"--label {said}={label}: no such arm; here are {', '.join(known)}")
        for i, name in hits:
            arms = dict(runs[i].arms)
            arms[name] = replace(arms[name], meta=arms[name].meta.labelled(label))
            runs[i] = replace(runs[i], arms=arms)
    return runs


def _called(arm: ArmLedger, name: str, now: str) -> ArmLedger:
    """The arm under a name that tells it from another; its label, which begins with its name, follows."""
    label = arm.meta.label or name
    told = now + label.removeprefix(name) if label.startswith(name) else f"{now} ({label})"
    return arm if now == name else replace(arm, meta=arm.meta.labelled(told))
