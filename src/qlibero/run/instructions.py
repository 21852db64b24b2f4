"""Which tasks a policy cannot read, all at once and before the first episode."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qlibero.errors import UserError
from qlibero.policies.base import Policy


def require_readable(policy: Policy, instructions: Mapping[tuple[str, int], str]) -> None:
    """Raises UserError naming, suite by suite, the tasks (suite, number) whose words the policy does not know."""
    unreadable: dict[str, list[int]] = {}
    first: UserError | None = None
    for (suite, task), words in instructions.items():
        try:
            policy.warmup_observations([words])
        except UserError as problem:
            first = first or problem
            unreadable.setdefault(suite, []).append(task)
    if first is not None:
        tasks = "; ".join(f"{suite} {ranges(numbers)}" for suite, numbers in unreadable.items())
        raise UserError(f"{first}. Tasks that it cannot read: {tasks}. Write the others under tasks:")


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers with neighbours joined: `0-3, 7`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][-1] == number - 1:
            found[-1] = [found[-1][0], number]
        else:
            found.append([number])
    return ", ".join("-".join(map(str, one)) for one in found)
