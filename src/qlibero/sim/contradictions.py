"""Tasks whose words contradict their own file: a policy that does what it is told fails, or one that does nothing wins.

Looked for, each only where the file itself gives the answer: a side ("the left moka pot") that is not the side of the
region in which the goal's object starts; something to be turned off or closed that is so from the start; "between" and
"next to" of things whose regions lie elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from qlibero.sim.bddl import Tree, Word, blocks, declared_names, head, parse

NEAR = 0.2
"""Metres between the middles of two regions; further apart nothing is "next to" anything (LIBERO's own: up to 0.17)."""
BESIDE_THE_LINE = 0.05
"""Metres from the line between two things, still "between" them."""
_UNDONE = {"turnoff": "turnon", "close": "open"}
_THING = r"(?:the )?([a-z ]+?)(?= (?:and|on|onto|in|into|from|to|with)\b|[^a-z ]|$)"
_BETWEEN = re.compile(rf"(?<!not )\bbetween {_THING} and {_THING}")
_NEXT_TO = re.compile(rf"(?<!not )\b(?:next to|beside) {_THING}")


@dataclass(frozen=True)
class Task:
    """What of a BDDL file the checks look at."""

    tree: Tree

    @cached_property
    def classes(self) -> dict[str, str]:
        """Object or fixture → its class."""
        parts = blocks(self.tree)
        return declared_names(parts.get(":objects", [])) | declared_names(parts.get(":fixtures", []))

    @cached_property
    def goal(self) -> list[list[str]]:
        """Facts, e.g. ["on", "plate_1", "flat_stove_1_cook_region"]."""
        return _facts(blocks(self.tree).get(":goal", []))

    @cached_property
    def start(self) -> list[list[str]]:
        return _facts(blocks(self.tree).get(":init", []))

    @cached_property
    def places(self) -> dict[str, np.ndarray]:
        """Object or fixture → the middle of the region it starts in, (2,) float64 metres, where that has numbers."""
        middles = {}
        for region in blocks(self.tree).get(":regions", [])[1:]:
            if isinstance(region, list) and region and isinstance(region[0], Word):
                parts = blocks(region)
                numbers = re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", _text(parts.get(":ranges", [])))
                if len(numbers) >= 4 and len(parts.get(":target", [])) == 2:
                    box = np.array(numbers[:4], dtype=np.float64).reshape(2, 2)
                    middles[f"{parts[':target'][1]}_{region[0]}".lower()] = box.mean(0)
        return {fact[1]: middles[fact[2]] for fact in self.start if fact[0] == "on" and fact[-1] in middles}

    def called(self, words: str) -> list[str]:
        """Objects and fixtures that `words` name, e.g. "cookie box" → ["cookies_1"]. By what they are, not by how they
        look: a flat dish is no flat_stove."""
        found = [w for w in re.findall(r"[a-z]+", words) if len(w) > 2]
        return [n for n, kind in self.classes.items() if any(word in kind.rpartition("_")[2] for word in found)]


def contradictions(path: Path, words: str) -> list[str]:
    """What of an instruction contradicts the task's file; [] for none. Raises UserError for a file that is no BDDL."""
    task = Task(parse(path))
    return [*_sides(task, words), *_done(task), *_relations(task, words)]


def _sides(task: Task, words: str) -> Iterator[str]:
    region = {fact[1]: fact[2] for fact in task.start if len(fact) == 3}
    for fact in task.goal:
        kind = task.classes.get(fact[1], "") if len(fact) > 1 else ""
        said = re.findall(rf"\b(left|right) {re.escape(kind.replace('_', ' '))}\b", words) if kind else []
        starts = re.findall("left|right", region.get(fact[1], "")) if said else []
        if len(said) == len(starts) == 1 and said != starts:
            yield f"says the {said[0]} {kind.replace('_', ' ')}; its goal is {fact[1]}, which starts on the {starts[0]}"


def _done(task: Task) -> Iterator[str]:
    start = {tuple(fact) for fact in task.start}
    for fact in task.goal:
        if before := _UNDONE.get(fact[0]):
            if (before, *fact[1:]) not in start:
                yield f"its goal is ({' '.join(fact)}), which nothing in (:init …) has undone: it is so from the start"


def _relations(task: Task, words: str) -> Iterator[str]:
    target = next((fact[1] for fact in task.goal if len(fact) > 1), "")
    if target not in task.places:
        return
    for match in _BETWEEN.finditer(words):
        ends = [
            [task.places[n] for n in task.called(text) if n in task.places and n != target] for text in match.groups()
        ]
        if all(len(end) == 1 for end in ends) and not _between(task.places[target], ends[0][0], ends[1][0]):
            yield f"says {match[0]!r}; {target} starts elsewhere"
    for match in _NEXT_TO.finditer(words):
        near = [task.places[n] for n in task.called(match[1]) if n in task.places and n != target]
        if near and min(float(np.linalg.norm(task.places[target] - at)) for at in near) > NEAR:
            yield f"says {match[0]!r}; {target} starts more than {NEAR:g} m from it"


def _between(point: np.ndarray, one: np.ndarray, other: np.ndarray) -> bool:
    line = other - one
    along = float((point - one) @ line / max(line @ line, 1e-12))
    return 0 < along < 1 and float(np.linalg.norm(point - one - along * line)) <= BESIDE_THE_LINE


def _facts(block: Tree) -> list[list[str]]:
    """Every (PREDICATE NAME …) below, in lower case."""
    found = [part for part in block if isinstance(part, list)]
    if not found and head(block) not in ("", ":goal", ":init", "and"):
        return [[str(word).lower() for word in block]]
    return [fact for part in found for fact in _facts(part)]


def _text(tree: Tree) -> str:
    return " ".join(_text(part) if isinstance(part, list) else str(part) for part in tree)
