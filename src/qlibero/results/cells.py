"""Which runs belong together: a cell is one comparison, with a reference arm and the arms paired with it.

A sweep's cells are experiments of their own, and each has its own `baseline`. Compared across cells that baseline would
be a tested arm ("baseline against baseline"), and every episode of another cell an unpaired one. So runs become one
comparison only where they are parts of one: the same arms over other episodes (a sweep over suites or seeds), or arms
without a reference of their own beside a run that has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlibero.documents import flattened
from qlibero.results.pairing import collect_arms
from qlibero.results.runs import RunResults

# Settings that change no episode, or that the arms themselves show: no axis of a sweep is told by them.
NO_AXIS = ("name", "arms", "backends", "workers", "retries", "videos", "tracking", "launch")
MAX_AXES = 3  # more than this is no label; the directory's name is


@dataclass(frozen=True)
class Cell:
    """`label` is what distinguishes the cell from the others; "" when it is alone."""

    runs: tuple[RunResults, ...]
    label: str = ""


def cells_of(runs: Iterable[RunResults], reference: str) -> list[Cell]:
    """The runs grouped into comparisons, in order, labelled by the settings in which they differ."""
    groups: list[list[RunResults]] = []
    runs = list(runs)
    if any(run.chosen for run in runs):
        return [Cell(tuple(runs))]
    for run in runs:
        home = next((group for group in groups if _belongs(run, group, reference)), None)
        if home is None:
            groups.append([run])
        else:
            home.append(run)
    if len(groups) == 1:
        return [Cell(tuple(groups[0]))]
    return [
        Cell(tuple(_labelled(run, label) for run in group), label)
        for group, label in zip(groups, _labels([group[0] for group in groups]), strict=True)
    ]


def _belongs(run: RunResults, group: list[RunResults], reference: str) -> bool:
    """A run without a reference joins the first that has one, and only more episodes of the same arms join else."""
    if reference not in run.arms:
        return any(reference in other.arms for other in group)
    if any(set(other.arms) != set(run.arms) for other in group):
        return False
    return set(collect_arms([*group, run])) == set(run.arms)  # other names: same episodes, or other things of that name


def _labels(runs: list[RunResults]) -> list[str]:
    """A sweep's axes as values: "rtn", "seed 7"; the directory's name where the configurations do not tell."""
    flat = [flattened({k: v for k, v in run.experiment.items() if k not in NO_AXIS}) for run in runs]
    axes = [
        key for key in dict.fromkeys(k for of_run in flat for k in of_run) if len({repr(f.get(key)) for f in flat}) > 1
    ]
    labels = [" ".join(_value(key, of_run.get(key)) for key in axes) for of_run in flat]
    if not 0 < len(axes) <= MAX_AXES or len(set(labels)) < len(labels):
        return _names(runs)
    return labels


def _names(runs: list[RunResults]) -> list[str]:
    """Directory names, with a number where two are alike."""
    names = [run.run_dir.resolve().name for run in runs]
    return [name if names.count(name) == 1 else f"{name} {i + 1}" for i, name in enumerate(names)]


def _value(key: str, value: Any) -> str:
    """Words tell what they are; a number or a switch needs its name."""
    return Path(value).stem if isinstance(value, str) else f"{key.rpartition('.')[2]} {value}"


def _labelled(run: RunResults, label: str) -> RunResults:
    """The run with its cell in every arm's label: two arms of one name are told apart wherever they are shown."""
    arms = {
        name: replace(arm, meta=arm.meta.labelled(f"{arm.meta.label or name} · {label}"))
        for name, arm in run.arms.items()
    }
    return replace(run, arms=arms)
