"""A task's BDDL file, read with its lines, and what is wrong with it before any simulator starts.

LIBERO itself says KeyError, "Missing open parenthesis" or nothing: a file without a goal succeeds at its first step, an
object without an init line stands wherever it was made, a region that nobody declared is passed over.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlibero.errors import UserError, WorkFailed

_TOKEN = re.compile(r";[^\n]*|[()]|[^\s();]+")
MAX_WORDS = 200  # characters of an instruction; the longest of LIBERO has 107


@dataclass(frozen=True)
class Word:
    text: str
    line: int

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Vocabulary:
    """What LIBERO can build and judge: `classes` of objects and fixtures, `problems`, `predicates` with how many names
    each takes."""

    classes: frozenset[str]
    problems: frozenset[str]
    predicates: dict[str, int]


Tree = list[Any]
"""Words, and lists of the same."""

WORKSPACES = frozenset("table floor coffee_table kitchen_table living_room_table study_table".split())
"""Fixtures that a problem class brings itself: `main_table - table`."""
PREDICATES = {"on": 2, "in": 2, "up": 1, "open": 1, "close": 1, "turnon": 1, "turnoff": 1, "true": 0, "false": 0}


def lint_all(paths: Iterable[Path], vocabulary: Vocabulary) -> dict[str, list[str]]:
    """`lint` of files, and of all *.bddl in directories: {file: complaints}. Raises UserError where there is none."""
    files = [file for path in paths for file in (sorted(path.glob("*.bddl")) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"{', '.join(map(str, paths))}: no .bddl file here")
    return {str(file): lint(file, vocabulary) for file in files}


def installed() -> Vocabulary:
    """The vocabulary of the installed LIBERO, read from the source of its environments: importing them would start
    robosuite and a renderer. Raises WorkFailed where LIBERO is not installed."""
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise WorkFailed("LIBERO is not installed: run ./scripts/setup.sh")
    names: dict[str, set[str]] = {"register_object": set(), "register_problem": set()}
    for file in sorted((Path(next(iter(spec.submodule_search_locations))) / "libero" / "envs").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Name) and mark.id in names:
                        names[mark.id].add(node.name)
    # LIBERO calls class WhiteBowl white_bowl and class Foo1 foo_1, and a problem by its class in lower case
    classes = {"_".join(re.sub(r"([A-Z0-9])", r" \1", name).split()).lower() for name in names["register_object"]}
    problems = frozenset(name.lower() for name in names["register_problem"])
    return Vocabulary(frozenset(classes) | WORKSPACES, problems, PREDICATES)


def lint(path: Path, vocabulary: Vocabulary) -> list[str]:
    """What is wrong with a task's file, each as `FILE:LINE: what`; [] for a sound one. Raises UserError for a file that
    cannot be read or whose parentheses do not balance."""
    found = list(_complaints(parse(path), vocabulary))
    return [f"{path}:{line}: {what}" for line, what in sorted(found)]


def parse(path: Path) -> Tree:
    """A file as nested lists of words. Raises UserError for one that cannot be read or does not balance."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"{path}: cannot be read: {problem}") from None
    stack: list[list[Any]] = [[]]
    opened: list[int] = []
    for match in _TOKEN.finditer(text):
        token, line = match[0], text.count("\n", 0, match.start()) + 1
        if token.startswith(";"):
            continue
        if token == "(":
            stack.append([])
            opened.append(line)
        elif token == ")":
            if not opened:
                raise UserError(f"{path}:{line}: a parenthesis closes that was never opened")
            opened.pop()
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(Word(token, line))
    if opened:
        raise UserError(f"{path}:{opened[-1]}: a parenthesis opens here that is never closed")
    if len(stack[0]) != 1 or not isinstance(stack[0][0], list) or head(stack[0][0]) != "define":
        raise UserError(f"{path}:1: not one (define (problem …) …)")
    return stack[0][0]


def head(tree: Tree) -> str:
    """A block's first word in lower case."""
    return tree[0].text.lower() if tree and isinstance(tree[0], Word) else ""


def blocks(tree: Tree) -> dict[str, Tree]:
    """The lists in a list by their first word."""
    return {head(part): part for part in tree if isinstance(part, list)}


def declared_names(block: Tree) -> dict[str, str]:
    """`a b - class` of (:objects …) or (:fixtures …): name → class."""
    words = [str(part).lower() for part in block[1:]]
    found: dict[str, str] = {}
    waiting: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if before == "-":
            found |= dict.fromkeys(waiting, word)
            waiting = []
        elif word != "-":
            waiting.append(word)
    return found


def _line(tree: list[Any]) -> int:
    return next((part.line if isinstance(part, Word) else _line(part) for part in tree if part), 1)


def _complaints(tree: list[Any], vocabulary: Vocabulary) -> Iterator[tuple[int, str]]:
    parts = blocks(tree)
    for name in (":language", ":fixtures", ":objects", ":init", ":goal"):
        if name not in parts:
            yield _line(tree), f"no ({name} …)"
    problem = parts.get("problem", [])
    if len(problem) != 2 or str(problem[1]).lower() not in vocabulary.problems:
        known = ", ".join(sorted(vocabulary.problems))
        yield _line(problem or tree), f"problem {' '.join(map(str, problem[1:])) or 'unnamed'} is none of {known}"
    language = parts.get(":language")
    if language is not None:
        words = " ".join(map(str, language[1:]))
        if not words or len(words) > MAX_WORDS:
            yield _line(language), f"an instruction of {len(words)} characters; it says what a policy is told"
        if any(isinstance(part, list) for part in language):
            yield _line(language), "a parenthesis in the instruction: write words alone"
    declared: dict[str, Word] = {}
    for block in (":fixtures", ":objects"):
        yield from _declared(parts.get(block, [])[1:], declared, vocabulary)
    regions = set()
    for region in (part for part in parts.get(":regions", [])[1:] if isinstance(part, list)):
        target = next((_known(p[1]) for p in region[1:] if isinstance(p, list) and head(p) == ":target"), "")
        if target in declared:  # LIBERO's own files have regions of objects that are not there, and never name them
            regions.add(f"{target}_{_known(region[0])}")
    placed = set()
    for fact in parts.get(":init", [])[1:]:
        yield from _fact(fact, declared, regions, vocabulary, "init")
        if isinstance(fact, list) and len(fact) > 1 and isinstance(fact[1], Word):
            placed.add(_known(fact[1]))
    for thing in _names(parts.get(":objects", [])[1:]):
        if _known(thing) not in placed:
            yield thing.line, f"object {thing} has no line in (:init …): where it stands is nobody's choice"
    if ":goal" in parts:
        yield from _goal(parts[":goal"], declared, regions, vocabulary)


def _goal(
    block: list[Any], declared: dict[str, Word], regions: set[str], vocabulary: Vocabulary
) -> Iterator[tuple[int, str]]:
    goal = block[1] if len(block) == 2 and isinstance(block[1], list) else []
    if head(goal) != "and" and head(goal) in vocabulary.predicates:
        goal = [Word("And", _line(goal)), goal]
    if head(goal) in ("or", "not"):
        yield _line(goal), f"({goal[0]} …) in the goal: LIBERO judges (And …) of predicates only"
    elif len(goal) < 2 or head(goal) != "and":
        yield _line(block), "the goal is empty: every episode would succeed at its first step"
    else:
        for fact in goal[1:]:
            yield from _fact(fact, declared, regions, vocabulary, "goal")


def _declared(parts: list[Any], declared: dict[str, Word], vocabulary: Vocabulary) -> Iterator[tuple[int, str]]:
    """`a b - class`: names and their class."""
    waiting: list[Word] = []
    words = [part for part in parts if isinstance(part, Word)]
    for i, word in enumerate(words):
        if i and words[i - 1].text == "-":
            if word.text.lower() not in vocabulary.classes:
                yield word.line, f"LIBERO has no object or fixture called {word}"
            waiting = []
        elif word.text != "-":
            if _known(word) in declared:
                yield word.line, f"{word} is declared twice (line {declared[_known(word)].line})"
            declared[_known(word)] = word
            waiting.append(word)
    for word in waiting:
        yield word.line, f"{word} has no class: write `{word} - CLASS`"


def _known(name: Any) -> str:
    """How LIBERO knows it: it reads files in lower case."""
    return str(name).lower()


def _names(parts: list[Any]) -> list[Word]:
    words = [part for part in parts if isinstance(part, Word)]
    return [w for i, w in enumerate(words) if w.text != "-" and not (i and words[i - 1].text == "-")]


def _fact(
    fact: list[Any] | Word, declared: dict[str, Word], regions: set[str], vocabulary: Vocabulary, where: str
) -> Iterator[tuple[int, str]]:
    if isinstance(fact, Word) or not fact or not isinstance(fact[0], Word):
        yield (fact.line if isinstance(fact, Word) else _line(fact)), f"{where}: not a (PREDICATE NAME …)"
        return
    predicate, names = fact[0], fact[1:]
    wanted = vocabulary.predicates.get(predicate.text.lower())
    if wanted is None:
        known = ", ".join(vocabulary.predicates)
        yield predicate.line, f"{where}: predicate {predicate} is none of {known}"
        return
    if len(names) != wanted:
        yield predicate.line, f"{where}: {predicate} takes {wanted} names, here are {len(names)}"
    for name in names:
        if isinstance(name, list):
            yield _line(name), f"{where}: ({predicate} …) of a list; only names can stand there"
        elif _known(name) not in declared and _known(name) not in regions:
            yield name.line, f"{where}: {name} is no object, fixture or region (regions are called TARGET_REGION)"
