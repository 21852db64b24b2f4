"""`qlibero doctor`: what is wrong with this machine, and the command that mends it.

One small function per question; each answers with Findings and never raises. `fail` means runs will not work or their
numbers would not count, `warn` that something is slower, narrower or less comparable than it could be. Whoever adds a
check adds it to CHECKS. The slow ones (the physics check, about 30 s) come last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from qlibero.cli.doctor.finding import SETUP, Finding
from qlibero.cli.doctor.graphics import driver, kernels, rendering, toolkit
from qlibero.cli.doctor.resources import cpus, disk, memory, shared_memory, wandb
from qlibero.cli.doctor.software import ffmpeg, legacy_variables, libero_files, lock, physics, pins, simulator
from qlibero.errors import QliberoError, import_cause
from qlibero.places import pasteable

CHECKS: tuple[Callable[[], Finding | list[Finding]], ...] = (
    pins,
    lock,
    legacy_variables,
    libero_files,
    ffmpeg,
    cpus,
    memory,
    shared_memory,
    disk,
    driver,
    toolkit,
    rendering,
    kernels,
    wandb,
    simulator,
    physics,
)


def diagnose(checks: Iterable[Callable[[], Finding | list[Finding]]] | None = None) -> list[Finding]:
    """Every finding, in the order of CHECKS. A check that breaks is itself a finding."""
    findings: list[Finding] = []
    for check in CHECKS if checks is None else checks:
        try:
            answer = check()
        except QliberoError as error:
            found, _, hint = str(error).partition("; ")  # a process of ours hands the hint on with what it found
            answer = Finding(check.__name__, "fail", found, hint or f"{SETUP} --repair")
        except ImportError as error:
            answer = Finding(check.__name__, "fail", *import_cause(error))
        except Exception as error:  # one broken check must not hide the others
            answer = Finding(
                check.__name__,
                "fail",
                f"the check itself failed: {error!r}",
                f"please report this line; {SETUP} --repair mends a damaged installation",
            )
        findings += answer if isinstance(answer, list) else [answer]
    return [replace(finding, hint=pasteable(finding.hint)) for finding in findings]
