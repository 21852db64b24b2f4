"""Two results that share no episode key, reduced to the suites and tasks that both have."""

from __future__ import annotations

from collections import Counter

from qlibero.errors import UserError
from qlibero.results.imports import Cell, ExternalArm


def same_tasks(base: ExternalArm, arm: ExternalArm) -> tuple[ExternalArm, ExternalArm, str]:
    """Both reduced to the suites and tasks that they share, and what has to be said about it.

    Raises UserError where they share none: two suites are two questions, not two samples.
    """
    places, theirs = ({place for place in one.places if place} for one in (base, arm))
    ran = [one.suites or {suite for suite, _ in found} for one, found in ((base, places), (arm, theirs))]
    if (base.suites or arm.suites) and all(ran) and ran[0].isdisjoint(ran[1]):
        left, right = (", ".join(sorted(suites)) for suites in ran)
        raise UserError(f"{base.name} has {left}, {arm.name} has {right}: no suite in common")
    if not places or not theirs:
        silent = " and ".join(one.name for one, found in ((base, places), (arm, theirs)) if not found)
        return base, arm, f"; {silent} says neither suite nor task, that they are the same is taken on trust"
    common = places & theirs
    if common == places == theirs:
        return base, arm, _shares(base, arm)
    if not common:
        by_number = [all(task.isdigit() for _, task in found) for found in (places, theirs)]
        if by_number[0] != by_number[1] and _tasks_per_suite(places) == _tasks_per_suite(theirs):
            return base, arm, "; one names its tasks, the other numbers them: that they are the same is taken on trust"
        raise UserError(
            f"{base.name} has {_said(places)}, {arm.name} has {_said(theirs)}: no task in common; "
            "compare files of the same suite and tasks"
        )
    ours, others = base.only(common), arm.only(common)
    left = _said((places | theirs) - common)
    return ours, others, f"; only what both have, {_said(common)}; left out is {left}{_shares(ours, others)}"


def _shares(base: ExternalArm, arm: ExternalArm) -> str:
    """Says where one has more of its episodes in some task than the other: that alone moves a success rate."""
    first, second = (Counter(one.places) for one in (base, arm))
    if all(first[place] * len(arm.episodes) == second[place] * len(base.episodes) for place in first):
        return ""
    return "; the tasks have different shares of the episodes, which alone can move a rate"


def _tasks_per_suite(places: set[Cell]) -> Counter[str]:
    return Counter(suite for suite, _ in places)


def _said(places: set[Cell]) -> str:
    suites = sorted({suite for suite, _ in places})
    names = {suite: sorted((task for s, task in places if s == suite), key=lambda t: (len(t), t)) for suite in suites}
    return ", ".join(
        f"{suite} {'tasks' if len(tasks) > 1 else 'task'} {', '.join(tasks[:12])}{' …' if len(tasks) > 12 else ''}"
        for suite, tasks in names.items()
    )
