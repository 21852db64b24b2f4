"""Plug-ins as source files: finding a module, and reading what it declares, without running any of it."""

from __future__ import annotations

import ast
import re
import sys
import traceback
from collections.abc import Collection, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qlibero.errors import UserError

if TYPE_CHECKING:
    from qlibero.registry import Plugin

P = TypeVar("P", bound="Plugin")
_DECLARES = re.compile(r"^PLUGINS?\b", re.MULTILINE)


class BrokenPlugin(UserError, ImportError):
    """A plug-in is there and cannot be used; the message names file and line. An ImportError too, for those who ask
    whether something can be loaded."""


def declared(kind: type[P], kinds: Collection[str], file: Path, module: str, origin: str) -> Iterator[P]:
    """The plug-ins of this kind that a source file declares, without running it. `kinds`: classes it may name."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenPlugin(f"{file} cannot be read: {error}") from None
    if not _DECLARES.search(text):
        return
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise BrokenPlugin(f"{file}, line {error.lineno}: {error.msg}") from None
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(target, ast.Name) and target.id in ("PLUGIN", "PLUGINS") for target in targets):
                value = statement.value
                for call in value.elts if isinstance(value, ast.Tuple | ast.List) else [value]:
                    plugin = _read(kind, kinds, call, file)
                    if plugin is not None:
                        yield replace(plugin, module=module, file=file, origin=origin)


def _read(kind: type[P], kinds: Collection[str], call: ast.expr, file: Path) -> P | None:
    """The declaration that one call makes, if it is of this kind."""
    where = f"{file}, line {call.lineno}"
    called = call.func if isinstance(call, ast.Call) else None
    name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
    if name not in kinds:
        raise BrokenPlugin(f"{where}: PLUGIN is one of {', '.join(kinds)}, or PLUGINS a tuple of them")
    if name != kind.__name__:
        return None
    assert isinstance(call, ast.Call)
    try:
        positional = [ast.literal_eval(argument) for argument in call.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except ValueError:
        raise BrokenPlugin(f"{where}: a declaration is read without being run, so its values are literals") from None
    try:
        plugin = kind(*positional, **named)
    except TypeError as error:
        says = ", ".join(each.name for each in fields(kind) if not each.kw_only)
        raise BrokenPlugin(f"{where}: {str(error).partition(') ')[2] or error}; a {name} says {says}") from None
    for each in fields(kind):
        value, wanted = getattr(plugin, each.name), type(each.default) if each.default is not None else str
        wanted = str if each.name in ("name", "about") else wanted
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise BrokenPlugin(f"{where}: {each.name} is {value!r}; it should be a {wanted.__name__}")
    return plugin


def locate(module: str) -> Path | None:
    """The source file of a module, found as `import` finds it, but with none of its packages run."""
    path: Any = None
    spec = None
    parts = module.split(".")
    for depth in range(len(parts)):
        whole = ".".join(parts[: depth + 1])
        finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))
        try:
            spec = next((found for finder in finders if (found := finder.find_spec(whole, path)) is not None), None)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        path = spec.submodule_search_locations
        if path is None and depth < len(parts) - 1:
            return None
    if spec is None:
        return None
    return Path(spec.origin) if spec.origin and spec.has_location else Path(next(iter(path or [""]), ""))


def place(error: BaseException, file: Path) -> str:
    """`FILE, line N`: where in the plug-in's file it happened, else where at all."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename == str(file)] or frames
    return f"{ours[-1].filename}, line {ours[-1].lineno}"


def said(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"it needs the package {error.name.partition('.')[0]}, which is not installed here"
    return f"{type(error).__name__}: {error}"
