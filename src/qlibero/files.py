"""Files that a crash, a full disk or a planted link cannot turn into something else.

Every file of qlibero that replaces another goes through `replace`, every file that grows through `create` and `append`,
what stays open, locks and logs, through `open_own`.
Names of temporary files cannot be guessed, links are never followed, and nothing counts as written before it is on
disk.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO

from qlibero.errors import GuardRefusal, WorkFailed, cause

PART = ".part"
KEPT = "Everything finished is kept; the same command continues"


def replace(path: Path, content: str | bytes, advice: str = KEPT) -> None:
    """Put `content` in the place of the file at `path`, at once: a reader sees the old content or the new, never less.

    On disk (file and directory) when this returns. The mode is what the umask leaves of 0666. A link at `path` is
    replaced, not followed; missing directories are made.
    Raises WorkFailed, ending with `advice`, when it cannot be written.
    """
    temporary = None
    try:
        temporary = beside(path)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        settle(temporary, path)
    except OSError as problem:
        if temporary is not None:
            remove(temporary)
        raise WorkFailed(f"cannot write {path}: {cause(problem)}. {advice}") from problem


def beside(path: Path) -> Path:
    """An empty file of this user's next to `path`, for somebody else to write (a codec, a library); then `settle` it.

    Missing directories are made. Raises OSError, WorkFailed where `path` is a directory or a device.
    """
    if path.exists() and not path.is_file():
        raise WorkFailed(f"cannot write {path}: that is a directory or a device, no file; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}-", suffix=PART)
    os.close(descriptor)
    return Path(temporary)


def settle(temporary: Path, path: Path, over: bool = True) -> None:
    """Put a whole file from `beside` in the place of `path`, durably and with the umask's mode. Raises OSError.

    `over` False leaves a file that is there by now, where the file system has hard links."""
    with open(temporary, "rb") as file:
        os.fchmod(file.fileno(), 0o666 & ~_umask())
        os.fsync(file.fileno())
    if over or not _linked(temporary, path):
        os.replace(temporary, path)
    sync_directory(path.parent)


def _linked(temporary: Path, path: Path) -> bool:
    """Whether `path` is there now without having been replaced; `temporary` then is gone."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        return False  # a file system without links
    os.unlink(temporary)
    return True


def create(path: Path) -> int:
    """A descriptor to append to a new file: nothing of that name, not even a link, may be there. Raises OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o666)


def append(descriptor: int, data: bytes, path: Path) -> int:
    """One write and an fsync; returns the offset (bytes) it went to. On any failure the file is as it was before.

    Raises WorkFailed, also when the disk takes less than it was given: `os.write` says so without raising. A file that
    was deleted under its writer counts as a failure too.
    """
    about = os.fstat(descriptor)
    if about.st_nlink == 0:
        raise WorkFailed(f"{path}: was deleted while it was being written. {KEPT} what is left")
    try:
        written = os.write(descriptor, data)
        if written == len(data):
            os.fsync(descriptor)
            return about.st_size
        reason = f"the disk is full ({written} of {len(data)} bytes were taken)"
    except OSError as problem:
        reason = cause(problem)
    os.ftruncate(descriptor, about.st_size)
    raise WorkFailed(f"{path}: {reason}. {KEPT}, once there is space")


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a file of this program's that stays, a lock or a log, made if need be. Raises OSError, and
    GuardRefusal when a link, a pipe or a file of two names lies there: on a shared disk it may point at a file of the
    person who runs this."""
    refusal = GuardRefusal(f"{path} is no plain file of qlibero's; look who put it there, and remove it")
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as problem:
        if problem.errno in (errno.ELOOP, errno.ENXIO):
            raise refusal from None
        raise
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        os.close(descriptor)
        raise refusal
    return descriptor


def open_log(path: Path) -> BinaryIO:
    """The file at `path` for a child process to append its output to. Raises what `open_own` does, WorkFailed for
    OSError."""
    try:
        return open(open_own(path, os.O_WRONLY | os.O_APPEND), "ab")
    except OSError as problem:
        raise WorkFailed(f"cannot write {path}: {cause(problem)}. {KEPT}") from problem


def sync_directory(directory: Path) -> None:
    """Put the directory's names on disk. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file if it is there and can be deleted: callers have a failure of their own to report."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass


def _umask() -> int:
    """This process's umask, from /proc: asking the system for it means changing it, which other threads would see."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022
