"""What qlibero can always make again: verdicts of kernels and simulators, hashes, artifacts with no better place.

One rule for all of it: `QLIBERO_CACHE`, else $XDG_CACHE_HOME/qlibero, else ~/.cache/qlibero; where that cannot be
written (a batch account without a home) a temporary directory of this user's, which is said once.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from qlibero import files
from qlibero.errors import WorkFailed, cause

log = logging.getLogger(__name__)


def cache_directory(name: str) -> Path:
    """The cache's part called `name`, made if need be. Raises WorkFailed when not even a temporary one can be made."""
    try:
        return _made(_chosen() / name)
    except (OSError, RuntimeError) as problem:  # RuntimeError: this user has no home at all
        why, instead = cause(problem) if isinstance(problem, OSError) else str(problem), _temporary()
        log.warning(f"the cache cannot be written ({why}); using {instead}")
        os.environ["QLIBERO_CACHE"] = str(instead)  # so that children use it too, and none says so again
        return _made(instead / name)


def triton_cache() -> None:
    """Where Triton's machine code cannot be kept (a batch account without a home, a read-only one), name it a part of
    the cache: left alone it fails, and its kernels' place is taken by others that round otherwise."""
    home = os.environ.get("TRITON_HOME")
    _moved("Triton", "TRITON_CACHE_DIR", lambda: Path(home or Path.home()) / ".triton" / "cache")


def numba_cache() -> None:
    """Likewise numba's, which compiles robosuite's control and a policy's flow, and refuses to where neither its user's
    cache nor what is installed can be written."""
    _moved("numba", "NUMBA_CACHE_DIR", lambda: _of_user() / "numba")
    if "numba" in sys.modules:  # which has read its variables
        sys.modules["numba"].config.CACHE_DIR = os.environ.get("NUMBA_CACHE_DIR", "")


def _moved(whose: str, variable: str, usual: Callable[[], Path]) -> None:
    try:
        _made(Path(os.environ.get(variable) or usual()))
    except (OSError, RuntimeError) as problem:
        why, instead = cause(problem) if isinstance(problem, OSError) else str(problem), cache_directory(whose.lower())
        log.warning(f"{whose}'s cache cannot be written ({why}); using {instead}")
        os.environ[variable] = str(instead)


def keep(path: Path, content: str | bytes) -> None:
    """Keep a file of the cache, if that is possible: without it something is made again, nothing else."""
    try:
        files.replace(path, content)
    except WorkFailed:
        pass


def _chosen() -> Path:
    if chosen := os.environ.get("QLIBERO_CACHE"):
        return Path(chosen).expanduser().absolute()
    return _of_user() / "qlibero"


def _of_user() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _made(path: Path) -> Path:
    """The directory, proven to take a file: permissions do not tell of a read-only mount."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        return path


def _temporary() -> Path:
    """A directory that only this user can have put anything into: another's of that name is passed over."""
    try:
        place = Path(tempfile.gettempdir()) / f"qlibero-{os.getuid()}"
        place.mkdir(mode=0o700, exist_ok=True)
        about = place.lstat()
        if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o022:
            return place
        return Path(tempfile.mkdtemp(prefix="qlibero-"))
    except OSError as problem:
        raise WorkFailed(
            f"there is no place for temporary files ({cause(problem)}); set QLIBERO_CACHE to a directory of yours"
        ) from None
