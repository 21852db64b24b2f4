"""A run's physics check: its suite's reference episode is begun before the first real one, other physics are refused.
A suite that has none begins that of the suite it is made from.

It takes about five seconds of one core, so it is begun while the policy loads, and what passed is remembered for as
long as nothing it depends on changes: packages, MuJoCo's library, processor, renderer, references, and the source of
this room. A refusal is never remembered, so that a mended machine is believed at once.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType

from qlibero.cache import cache_directory, keep
from qlibero.sim.physics_check import (
    PACKAGES,
    PhysicsFinding,
    PhysicsReport,
    ReferenceRun,
    in_place_of,
    speaks_for,
)


class PhysicsCheck:
    """Begun on entry, ended on exit. `renderer` is OpenGL's own description of itself in `environment`."""

    def __init__(self, suite: str, environment: Mapping[str, str], renderer: Mapping[str, str]) -> None:
        self._suite, self._spoke, self._environment = suite, speaks_for(suite), environment
        self._memory = cache_directory("physics") / f"{_key(self._spoke, environment, renderer)}.json"
        self._known: PhysicsReport | None = None
        self._run: ReferenceRun | None = None

    def __enter__(self) -> PhysicsCheck:
        self._known = _recall(self._memory)  # now: one suite may have spoken for another just before
        if self._known is None:
            self._run = ReferenceRun([self._spoke], self._environment)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run is not None:
            self._run.close()

    def enforce(self) -> PhysicsReport:
        """The report, once it is there. Raises GuardRefusal for other physics or visibly other pictures, WorkFailed
        when the simulator does not run."""
        report = self._known
        if report is None:
            assert self._run is not None, "enter first"
            report = self._run.report().enforce()
            keep(self._memory, json.dumps(asdict(report)))
        if self._spoke == self._suite:
            return report
        said = in_place_of(self._suite, self._spoke)
        return replace(report, verdict="warning", findings=(*report.findings, said))


def _key(suite: str, environment: Mapping[str, str], renderer: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*")):
        if path.suffix in (".py", ".json"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    facts = {
        "suite": suite,
        "packages": {name: _version(name) for name in PACKAGES},
        "mujoco": _library(),
        "processor": _processor(),
        "renderer": dict(renderer),
        "path": environment.get("PYTHONPATH"),
        "source": digest.hexdigest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _library() -> list[tuple[str, int, int]]:
    """MuJoCo's shared library by size and time: versions are only what a package says of itself."""
    spec = importlib.util.find_spec("mujoco")
    found = sorted(Path(spec.origin).parent.glob("libmujoco*")) if spec and spec.origin else []
    return [(path.name, (status := path.stat()).st_size, status.st_mtime_ns) for path in found]


def _processor() -> dict[str, str]:
    """The first core's identity and features: BLAS and libm choose their code, and so the last bits, by them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    keys = ("vendor_id", "model name", "cpu family", "model", "stepping", "flags", "CPU part", "Features")
    return {key.strip(): value.strip() for key, _, value in pairs if key.strip() in keys}


def _recall(path: Path) -> PhysicsReport | None:
    try:
        known = json.loads(path.read_text())
        return PhysicsReport(**{**known, "findings": tuple(PhysicsFinding(**finding) for finding in known["findings"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
