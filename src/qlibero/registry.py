"""What can be plugged in, and where it is found: kernels, methods, corrections, policies, engines, trackers, sections,
suites.

A plug-in is a module that declares itself in one statement:

    PLUGIN = MethodPlugin("shuffle", "a random order of the channels", data_free=True, factors=("order",))

(`PLUGINS = (…, …)` where it is several.) The statement is *read* from the source, not run: its arguments are literals,
so that `--help`, `ls` and the check of a configuration import no torch, and what cannot be imported is listed all the
same. A plug-in is known under the name it declares where it is built in (the folder of its kind holds it) or comes with
an installed distribution (`[project.entry-points."qlibero.methods"]`, any key, the module as value); any other module
on the import path is known under its own name (`method: package.module`, `package.module:name` of several).
"""

from __future__ import annotations

import importlib
import json
import os
import re
import zlib
from base64 import b64decode, b64encode
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from qlibero.errors import UserError
from qlibero.plugin_source import BrokenPlugin, declared, locate, place, said

BUILT_IN = "built in"
_PACKAGE = Path(__file__).parent
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(:\S+)?")


class UnknownPlugin(UserError):
    """No plug-in of that name. `known` are the names there are."""

    def __init__(self, message: str, known: tuple[str, ...]):
        super().__init__(message)
        self.known = known


@dataclass(frozen=True)
class Plugin:
    """What a module says of itself. Literals only; `module`, `file` and `origin` are filled in by whoever found it."""

    name: str
    about: str
    """One line: what it is for."""
    needs: tuple[str, ...] = ()
    """Importable names of packages that qlibero itself does not require."""
    provides: str = ""
    """The attribute of the module that is the plug-in; by default the module itself is."""
    order: int = 100
    """Where it stands among its siblings."""
    module: str = field(default="", kw_only=True)
    file: Path = field(default=Path(), kw_only=True)
    origin: str = field(default=BUILT_IN, kw_only=True)
    """`built in`, the distribution with its version, or the file."""

    kind: ClassVar[str]
    kinds: ClassVar[str]
    folder: ClassVar[str]
    """Of the built-in ones, below the package."""
    must_have: ClassVar[tuple[str, ...]] = ()
    """What is called on it, so what it has to have."""

    def called(self) -> tuple[str, ...]:
        """What this one has to have."""
        return self.must_have

    @property
    def missing(self) -> tuple[str, ...]:
        """Those of `needs` that this environment does not have."""
        return tuple(name for name in self.needs if locate(name) is None)

    def load(self) -> Any:
        """The plug-in itself, imported. BrokenPlugin names the module, the line and what is missing."""
        try:
            found: Any = importlib.import_module(self.module)
        except Exception as error:
            raise BrokenPlugin(f"{self._named} cannot be imported: {place(error, self.file)}: {said(error)}") from error
        for step in filter(None, self.provides.split(".")):
            if not hasattr(found, step):
                raise BrokenPlugin(f"{self._named} declares that it provides {self.provides}, which is not in the file")
            found = getattr(found, step)
        if lacking := [name for name in self.called() if not hasattr(found, name)]:
            raise BrokenPlugin(
                f"{self._named} lacks {', '.join(lacking)}: a {self.kind} has {', '.join(self.called())}"
            )
        return found

    @property
    def _named(self) -> str:
        return f"{self.kind} {self.name} ({self.file})"


@dataclass(frozen=True)
class KernelPlugin(Plugin):
    """An integer matrix product: a class with the contract of `kernels/contract.py:Kernel`."""

    kind, kinds, folder = "kernel", "kernels", "kernels"
    must_have = ("supports", "pack", "accumulate", "matmul")


@dataclass(frozen=True)
class MethodPlugin(Plugin):
    """How a linear's input is transformed before rounding: a module with `fit(data, spec) -> Transform`."""

    data_free: bool = False
    """It looks at weights only."""
    factors: tuple[str, ...] = ()
    """Which of the transform's factors it makes: scale, first, order, second, hadamard."""
    blocks: bool = False
    """It works in blocks of `block_size` channels, which must divide the input's width."""
    smooths_first: bool = False
    """Its smoothing is folded into the rows of `first`, which is then no plain rotation."""
    rotates_outputs: bool = False
    """It has `output_rotation(weight, spec)` too, for `row_rotation: true`."""
    chooses: tuple[str, ...] = ()
    """It fits nothing itself but has `choose(decibels) -> name` of these methods, given from the cheapest on."""

    kind, kinds, folder = "method", "methods", "quant/methods"
    must_have = ("fit",)

    def called(self) -> tuple[str, ...]:
        if self.chooses:
            return ("choose",)
        return (*self.must_have, "output_rotation") if self.rotates_outputs else self.must_have


@dataclass(frozen=True)
class CorrectionPlugin(Plugin):
    """What calibration multiplies back into an attention: a module with `factors(teacher, student)`, both a
    `quant.corrections.AttentionSeen`, giving a factor of each query head, or one of the output."""

    scales: str = "output"
    """The linear whose rows take the factors: the attention's `query` or its `output` projection."""
    low: float = 0.5
    high: float = 2.0
    """Factors lie in this range; an artifact with others is refused."""

    kind, kinds, folder = "correction", "corrections", "quant/corrections"
    must_have = ("factors",)


@dataclass(frozen=True)
class PolicyPlugin(Plugin):
    """A family of policies: a module with what `policies/base.py:PolicyFamily` lists."""

    layouts: tuple[str, ...] = ()
    """Names of the layouts that its linears can be quantized by; none: it cannot be quantized from here."""

    kind, kinds, folder = "policy", "policies", "policies"
    must_have = ("Settings", "load")


@dataclass(frozen=True)
class EnginePlugin(Plugin):
    """What runs the shards of a sweep: an object of `launch/engine.py:Engine`."""

    kind, kinds, folder = "engine", "engines", "launch"
    must_have = ("describe", "submit")


@dataclass(frozen=True)
class TrackerPlugin(Plugin):
    """A mirror of the ledger: a program, `python -m MODULE RUN_DIR [--follow] …`, see `tracking/mirror.py`."""

    kind, kinds, folder = "tracker", "trackers", "tracking"


@dataclass(frozen=True)
class SectionPlugin(Plugin):
    """A part of the HTML report: a function of the report's data that gives markup, or None for nothing to say."""

    kind, kinds, folder = "section", "sections", "reporting/html/sections"


@dataclass(frozen=True)
class SuitePlugin(Plugin):
    """Tasks for LIBERO's simulator: an object with `task_files(task)` and `language(task)`, see `sim/suites.py`."""

    tasks: int = 0
    inits: int = 50
    """Official initial states of each task."""
    max_steps: int = 0
    """Policy steps after which an episode is cut."""

    kind, kinds, folder = "suite", "suites", "sim"
    must_have = ("task_files", "language")


FOLDERS = "QLIBERO_SUITES"
"""Variable with the `FolderSuite`s that configurations of this process name, packed: its simulators are told by it."""
MOST = 120_000
"""Its characters: Linux starts no process with a variable of 128 KiB, which the paths of a thousand tasks have."""


@dataclass(frozen=True)
class FolderSuite(SuitePlugin):
    """A directory of tasks that a configuration names (`config/suites.py`)."""

    goals: tuple[str, ...] = ()
    """BDDL files, one a task."""
    states: tuple[str, ...] = ()
    """Their initial states; none where those are drawn."""
    instructions: str = "bddl"
    module: str = field(default="qlibero.sim.own_suite", kw_only=True)
    provides: str = "OwnTasks"

    def load(self) -> Any:
        return super().load()(self)

    def make_known(self) -> None:
        """Under its name, to this process and those that it starts; a later one of that name takes its place.

        Raises UserError where no process could be told of that many tasks."""
        said = {key: getattr(self, key) for key in _OF_FOLDER}
        known = _unpacked(os.environ.get(FOLDERS, "")) | {self.name: said}
        packed = b64encode(zlib.compress(json.dumps(known).encode())).decode()
        if len(packed) > MOST:
            tasks = sum(len(suite["goals"]) for suite in known.values())
            raise UserError(
                f"{self.origin}: no simulator can be told of so many tasks ({tasks:,} here); split the directory, and "
                "run its parts one by one"
            )
        os.environ[FOLDERS] = packed


_OF_FOLDER = ("name", "about", "tasks", "inits", "max_steps", "origin", "goals", "states", "instructions")


def _unpacked(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(zlib.decompress(b64decode(text))) if text else {}
    return found


@lru_cache(maxsize=8)
def _folders(text: str) -> dict[str, FolderSuite]:
    found = {}
    for name, settings in _unpacked(text).items():
        known: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in settings.items()}
        found[name] = FolderSuite(**known)
    return found


KINDS: dict[str, type[Plugin]] = {
    kind.kinds: kind
    for kind in (
        KernelPlugin,
        MethodPlugin,
        CorrectionPlugin,
        PolicyPlugin,
        EnginePlugin,
        TrackerPlugin,
        SectionPlugin,
        SuitePlugin,
    )
}
_NAMES = tuple(kind.__name__ for kind in KINDS.values())
P = TypeVar("P", bound=Plugin)
_BUILT_IN: dict[str, dict[str, Any]] = {}
_INSTALLED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {}


def get(kind: type[P], name: str) -> P:
    """The plug-in called `name`: built in, of an installed distribution, or a module of that name.

    Raises UnknownPlugin where there is none (what is near, where it was looked for), BrokenPlugin for a declaration
    that cannot be read.
    """
    for found in (_built_in(kind), _installed(kind)[0]):
        if plugin := found.get(name):
            return plugin
    if isinstance(named := _folders(os.environ.get(FOLDERS, "")).get(name), kind):
        return named
    by_path = _by_path(kind, name) if _MODULE.fullmatch(name) else None
    if by_path is not None:
        return by_path
    known = names(kind)
    near = get_close_matches(name[:80], known, n=1)
    broken = "".join(f"; {problem}" for problem in _installed(kind)[1])
    raise UnknownPlugin(
        f"there is no {kind.kind} {name[:80]!r}{f'; did you mean {near[0]}?' if near else ''} "
        f"(looked for in qlibero/{kind.folder}, among the entry points qlibero.{kind.kinds} of installed packages, and "
        f"as a module on the import path; there are {', '.join(known)}){broken}",
        known,
    )


def names(kind: type[Plugin]) -> tuple[str, ...]:
    """The names that need no path: built in first, then those of installed distributions."""
    return tuple(dict.fromkeys((*_built_in(kind), *_installed(kind)[0])))


def every(kind: type[P]) -> list[P]:
    """The plug-ins behind `names`, in the order they declare."""
    return sorted((get(kind, name) for name in names(kind)), key=lambda plugin: plugin.order)


def forget() -> None:
    """Look again: the import path, or what is installed, has changed."""
    _BUILT_IN.clear()
    _INSTALLED.clear()


def built_in(kind: type[Plugin]) -> tuple[str, ...]:
    """The names that every installation has."""
    return tuple(_built_in(kind))


def problems(kind: type[Plugin]) -> tuple[str, ...]:
    """What is wrong with plug-ins of installed distributions that cannot be listed."""
    return _installed(kind)[1]


def _built_in(kind: type[P]) -> dict[str, P]:
    if kind.kinds not in _BUILT_IN:
        _BUILT_IN[kind.kinds] = _in_folder(kind)
    return _BUILT_IN[kind.kinds]


def _installed(kind: type[P]) -> tuple[dict[str, P], tuple[str, ...]]:
    """Plug-ins of distributions by name, and what is wrong with those that are none."""
    if kind.kinds not in _INSTALLED:
        _INSTALLED[kind.kinds] = _of_distributions(kind)
    return _INSTALLED[kind.kinds]


def _in_folder(kind: type[P]) -> dict[str, P]:
    folder, package = _PACKAGE / kind.folder, f"qlibero.{kind.folder.replace('/', '.')}"
    found: list[P] = []
    for file in sorted([*folder.glob("*.py"), *folder.glob("*/__init__.py")]):
        name = file.parent.name if file.name == "__init__.py" else file.stem
        found += declared(kind, _NAMES, file, f"{package}.{name}", BUILT_IN)
    return {plugin.name: plugin for plugin in sorted(found, key=lambda plugin: (plugin.order, plugin.name))}


def _of_distributions(kind: type[P]) -> tuple[dict[str, P], tuple[str, ...]]:
    from importlib import metadata  # 20 ms, which `--help` need not wait for

    found: dict[str, P] = {}
    wrong: list[str] = []
    for entry in metadata.entry_points(group=f"qlibero.{kind.kinds}"):
        origin = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an entry point"
        try:
            file = locate(entry.module)
            if file is None:
                raise BrokenPlugin(f"there is no module {entry.module}")
            found_here = list(declared(kind, _NAMES, file, entry.module, origin))
            if not found_here:
                raise BrokenPlugin(f"{file} declares no {kind.kind} (PLUGIN = {kind.__name__}(…))")
        except BrokenPlugin as problem:
            wrong.append(f"{origin}: entry point {entry.name} of qlibero.{kind.kinds}: {problem}")
            continue
        for plugin in found_here:
            other = _built_in(kind).get(plugin.name) or found.get(plugin.name)
            if other is not None:
                wrong.append(f"{origin}: a {kind.kind} {plugin.name} is there already ({other.origin})")
            else:
                found[plugin.name] = plugin
    return dict(sorted(found.items(), key=lambda item: (item[1].order, item[0]))), tuple(wrong)


def _by_path(kind: type[P], name: str) -> P | None:
    """The plug-in of the module `name`, known under that very name; None where there is no such module."""
    module, _, wanted = name.partition(":")
    file = locate(module)
    if file is None or file.suffix != ".py":
        return None
    found = [p for p in declared(kind, _NAMES, file, module, str(file)) if wanted in ("", p.name)]
    if len(found) != 1:
        if "." not in module and not found:
            return None  # a word that happens to be some module's name
        has = ", ".join(f"{module}:{p.name}" for p in found)
        raise BrokenPlugin(
            f"{file} declares {'several: write one of ' + has if found else f'no {kind.kind} {wanted}'.rstrip()}; "
            f"a {kind.kind} declares itself by PLUGIN = {kind.__name__}(…)"
        )
    return replace(found[0], name=name)
