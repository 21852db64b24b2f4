"""The three ways a command can end badly, and the exit status each one means.

Raised anywhere, turned into a one-line message and an exit status in one place (`cli.main`), so that a script
can tell a typo (2) from a guard's refusal (3) from work that failed (1).
"""

from __future__ import annotations

import errno

GL_HINT = (
    "apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libgl1 (./scripts/setup.sh does, as root), or "
    'without root, docs/clusters.md, "Without root"'
)
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
}


class QliberoError(Exception):
    """Base of every error whose message is written for the user; `exit_status` is what the command returns."""

    exit_status = 1


class WorkFailed(QliberoError):
    """The request was fine, the work could not be done (disk full, simulator cannot start, …)."""

    exit_status = 1


class UserError(QliberoError):
    """The request was wrong. The message names file:line or flag, what was found, and what to write instead."""

    exit_status = 2


class GuardRefusal(QliberoError):
    """A guard (kernel validation, physics check, artifact, run directory) refused a number it cannot vouch for."""

    exit_status = 3


def import_cause(problem: ImportError) -> tuple[str, str]:
    """What cannot be imported and why; and what to do. A library the loader does not find is no missing package."""
    where, traceback = "", problem.__traceback__
    while traceback is not None:
        place = traceback.tb_frame.f_code.co_filename
        where = place.rpartition("site-packages/")[2].partition("/")[0] if "site-packages/" in place else where
        traceback = traceback.tb_next
    library, _, rest = str(problem).partition(":")
    if "cannot open shared object" in rest:
        hint = f"install what has {library}, or put its directory into LD_LIBRARY_PATH"
        if where == "cv2":
            hint = "./scripts/setup.sh --repair puts the headless OpenCV there, which needs no desktop's libraries"
        elif library.startswith(("libGL", "libEGL", "libOpenGL", "libOSMesa")):
            hint = GL_HINT
        return f"{where or problem.name or 'a package'} cannot be imported: the loader finds no {library}", hint
    if "EGL" in str(problem) or "OpenGL" in str(problem):  # MuJoCo's, of a driver that is missing or does not start
        return f"nothing here renders without a screen ({str(problem).partition('. ')[0]})", GL_HINT
    return f"{where or problem.name or 'a package'} cannot be imported: {problem}", "./scripts/setup.sh --repair"


def cause(problem: OSError) -> str:
    """What the system says is wrong, in words that tell what to do about it."""
    return _FULL.get(problem.errno or 0) or problem.strerror or str(problem)
