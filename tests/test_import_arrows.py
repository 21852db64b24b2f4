"""Risk: rooms grow into each other until nothing can be changed alone. Arrows run downward only, as the design says."""

from __future__ import annotations

import ast
from pathlib import Path

import qlibero

SOURCE = Path(qlibero.__file__).parent

# What each room may import besides itself. The leaves are for everybody; the schema, plain data that stands on the
# ground, is for every room above the ground.
LEAVES = {"activity", "errors", "episode_key", "console", "files", "places", "cache", "quoting", "documents"} | {
    "identity"
}
SCHEMA = {f"qlibero.config.{name}" for name in ("schema", "fields", "inits", "quantization", "vocabulary", "yaml_text")}
MAY_IMPORT: dict[str, set[str]] = {
    "sim": set(),
    "kernels": set(),
    "stats": set(),
    "results": {"stats"},
    "config": {"kernels"},  # load knows the backends' names
    # a full-size policy is loaded straight from its artifact; its Triton stands on the kernels'
    "policies": {"quant", "kernels"},
    "quant": {"kernels", "policies"},
    "machine": {"sim"},
    "tracking": {"results", "stats"},
    "reporting": {"results", "stats"},
    "run": {"config", "machine", "policies", "quant", "kernels", "sim", "results", "stats", "tracking"},
    "launch": {"config", "run", "machine", "results", "stats", "sim", "kernels", "tracking"},
    "cli": {"*"},
    "__main__": {"*"},
}
ON_THE_GROUND = {name for name, below in MAY_IMPORT.items() if not below}


def room(module: str) -> str:
    """`qlibero.config.load` → `config`."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """Modules of qlibero that a file imports, wherever in the file; not those only for type checkers."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrow"
            module = node.module or ""
            found.update(f"{module}.{alias.name}" for alias in node.names) if module == "qlibero" else found.add(module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name for name in found if name.split(".")[0] == "qlibero" and name != "qlibero"}


def files() -> list[tuple[str, Path]]:
    """(room, file) of every module of the package."""
    return [(path.relative_to(SOURCE).parts[0].removesuffix(".py"), path) for path in sorted(SOURCE.rglob("*.py"))]


def allowed(here: str, name: str) -> bool:
    """May room `here` import the module `name`?"""
    if room(name) in {here} | LEAVES or "*" in MAY_IMPORT[here]:
        return True
    return room(name) in MAY_IMPORT[here] or (name in SCHEMA and here not in ON_THE_GROUND)


def test_arrows_run_downward_only() -> None:
    rooms = [(here, path) for here, path in files() if here not in LEAVES | {"__init__"}]
    strangers = {here for here, _ in rooms} - set(MAY_IMPORT)
    assert not strangers, f"say in MAY_IMPORT where {strangers} stand"
    wrong = [
        f"{path.relative_to(SOURCE)}: {name}"
        for here, path in rooms
        for name in imports(path)
        if not allowed(here, name)
    ]
    assert wrong == [], "imports against the arrows"


def test_leaves_and_the_schema_import_no_room() -> None:
    for path in (SOURCE / f"{leaf}.py" for leaf in LEAVES):
        assert {name for name in imports(path) if room(name) not in LEAVES} == set(), path
    for path in (SOURCE / f"{name.removeprefix('qlibero.').replace('.', '/')}.py" for name in SCHEMA):
        assert {name for name in imports(path) if room(name) not in LEAVES} <= SCHEMA, path


def test_the_allowed_arrows_have_no_unexpected_circle() -> None:
    """The one intended pair: a policy is quantized, and a full-size one loaded straight from its artifact."""
    order: list[str] = []
    rooms = {
        name: {to for to in allowed if to in MAY_IMPORT} for name, allowed in MAY_IMPORT.items() if "*" not in allowed
    }
    rooms["quant"] = rooms["quant"] - {"policies"}
    while rooms:
        ready = [name for name, below in rooms.items() if below <= set(order)]
        assert ready, f"a circle among {sorted(rooms)}"
        order += ready
        rooms = {name: below for name, below in rooms.items() if name not in ready}


def test_files_stay_readable() -> None:
    long = {
        str(path.relative_to(SOURCE)): lines
        for _, path in files()
        if (lines := len(path.read_text().splitlines())) > 500
    }
    assert long == {}, "split by idea, not by length; but 500 lines is more than one idea"
