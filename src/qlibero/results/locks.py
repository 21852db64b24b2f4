"""Advisory locks: who is writing a shard. They die with their process."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

from qlibero.errors import GuardRefusal


def open_lock(path: Path) -> int:
    """A descriptor of a lock file, made if need be. GuardRefusal when a link or another kind of file lies there: on a
    shared disk it may point at a file of the person who runs this. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as problem:
        if problem.errno in (errno.ELOOP, errno.ENXIO):
            raise GuardRefusal(
                f"{path} is not a lock file of qlibero's; look who put it there, and remove it"
            ) from None
        raise
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        os.close(descriptor)
        raise GuardRefusal(f"{path} is not a lock file of qlibero's; look who put it there, and remove it")
    return descriptor


def lock(directory: Path, shard: str) -> int:
    """Lock a shard for this process; the descriptor holds it. Filesystems without locks go on unlocked.

    Raises GuardRefusal naming the process that holds it, OSError.
    """
    descriptor = open_lock(directory / f".lock-{shard}")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise GuardRefusal(f"{directory}: shard {shard} is being written by {holder}; wait for it or stop it") from None
    except OSError as problem:
        if problem.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            os.close(descriptor)
            raise
        return descriptor
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
    return descriptor


def is_locked(path: Path) -> bool:
    """Whether a process of this machine holds a shard's lock file open. Asks /proc: trying the lock, even for a moment,
    could be what a writer that is just starting finds it held by."""
    try:
        _, pid, _, host = path.read_text().split()
        if host != os.uname().nodename:
            return False
        held = path.resolve()
        return any(Path(os.readlink(descriptor)) == held for descriptor in Path(f"/proc/{pid}/fd").iterdir())
    except (OSError, ValueError):  # gone, ended, or being written this moment
        return False
