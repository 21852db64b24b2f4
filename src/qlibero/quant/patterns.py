"""Which names a pattern from a config matches, in bounded time.

Python's `re` backtracks: `(.*.*)*Z$` against one layer's name takes longer than anybody waits. No look at a pattern
tells for sure, so every one that could is matched in a process of its own, which the kernel ends after some seconds of
CPU time.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import lru_cache

from qlibero.errors import UserError, WorkFailed

CPU_S = 2

_CHILD = """
import json, re, resource, sys
pattern, names, seconds = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
json.dump([re.search(pattern, name) is not None for name in names], sys.stdout)
"""


_STACK = re.compile(r"^.*?([^.]+)(?:\.(?:model|encoder))?\.layers\.(\d+)\.")


def short_name(name: str) -> str:
    """`language_model.3.v_proj`, as `inspect` prints a layer, for a name as wide as a screen."""
    return _STACK.sub(r"\1.\2.", name).replace("self_attn.", "")


def matching(pattern: str, names: Iterable[str], key: str) -> list[str]:
    """The names in which `pattern` is found, in order; or the one whose short name it is. `key`: for the message.

    Raises UserError for a pattern that has not answered after two seconds of CPU time.
    """
    names = tuple(names)
    listed = [name for name in names if short_name(name) == pattern]
    return listed or [name for name, found in zip(names, _search(pattern, names, key), strict=True) if found]


@lru_cache(maxsize=64)
def _search(pattern: str, names: tuple[str, ...], key: str) -> tuple[bool, ...]:
    if "(" not in pattern and sum(map(pattern.count, "*+?{")) < 2:
        return tuple(re.search(pattern, name) is not None for name in names)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _CHILD],
        input=json.dumps([pattern, names, CPU_S]),
        capture_output=True,
        text=True,
    )
    if done.returncode < 0:
        raise UserError(
            f"quant.{key}: {pattern!r} has not matched {len(names)} layer names after {CPU_S} s, because it repeats "
            "what repeats already; write each repetition once, e.g. `.*` for `(.*.*)*`"
        )
    if done.returncode:
        raise WorkFailed(f"quant.{key}: {pattern!r} could not be matched: {done.stderr.strip()[-300:]}")
    return tuple(json.loads(done.stdout))
