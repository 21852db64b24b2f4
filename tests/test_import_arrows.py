"""Risk: rooms grow into each other until nothing can be changed alone. Every arrow runs downward, without exception."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import qlibero

SOURCE = Path(qlibero.__file__).parent
LINES = 500

# Modules of the top level that every room may import; they import nothing but each other.
LEAVES = {
    *"activity cache console documents episode_key errors files frames identity places".split(),
    *"plugin_source quoting registry".split(),
}

# The floors, lowest first: a room imports from lower floors only, and of those what stands beside its name.
FLOORS: list[dict[str, set[str]]] = [
    {"sim": set(), "kernels": set(), "stats": set()},
    {
        "config": set(),
        "results": {"stats"},
        "machine": {"sim"},  # environment.json says what a simulator process gets
    },
    {
        "policies": {"kernels", "config"},
        "tracking": {"results", "stats"},
        "reporting": {"results", "stats"},
    },
    {"quant": {"policies", "kernels", "config"}},
    {"run": {"config", "machine", "policies", "quant", "kernels", "sim", "results", "stats", "tracking"}},
    {"launch": {"config", "run", "machine", "results", "stats", "kernels", "tracking"}},
    {"cli": {"config", "run", "launch", "machine", "policies", "quant", "kernels", "sim", "results", "reporting"}},
    {"__main__": {"cli"}},
]
MAY_IMPORT = {room: below for floor in FLOORS for room, below in floor.items()}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name without `qlibero.`; a package by its folder's."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    return {name: path for name, path in found.items() if name != "__init__"}


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of qlibero that a module imports, wherever in the file; not those only for type checkers."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the arrow"
            for alias in node.names:
                within = f"{node.module}.{alias.name}"
                found.add(within if within.removeprefix("qlibero.") in modules() else str(node.module))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(modules()[module].read_text()))
    return frozenset(name.removeprefix("qlibero.") for name in found if name.startswith("qlibero."))


def room(module: str) -> str:
    """`config.load` → `config`."""
    return module.partition(".")[0]


def test_every_room_stands_on_a_floor() -> None:
    assert {room(name) for name in modules()} == set(MAY_IMPORT) | LEAVES
    for number, floor in enumerate(FLOORS):
        lower = {name for below in FLOORS[:number] for name in below}
        for name, allowed in floor.items():
            assert allowed <= lower, f"{name} would import {allowed - lower}, which stands no lower"


def test_arrows_run_downward_only() -> None:
    wrong = [
        f"{module}: {name}"
        for module in modules()
        for name in imports(module)
        if room(name) not in {room(module)} | LEAVES | MAY_IMPORT.get(room(module), set())
    ]
    assert wrong == [], "imports against the arrows"


def test_no_arrow_is_allowed_that_no_file_uses() -> None:
    used = {(room(module), room(name)) for module in modules() for name in imports(module)}
    assert {(here, below) for here, allowed in MAY_IMPORT.items() for below in allowed} <= used


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = {module: {name for name in imports(module) if name in modules()} - {module} for module in modules()}
    while ready := [module for module, below in left.items() if not below & set(left)]:
        for module in ready:
            del left[module]
    assert left == {}, "circles"


def test_files_stay_readable() -> None:
    long = {name: lines for name, path in modules().items() if (lines := len(path.read_text().splitlines())) > LINES}
    assert long == {}, f"split by idea, not by length; but {LINES} lines hold more than one"
