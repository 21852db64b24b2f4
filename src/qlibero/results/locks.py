"""Advisory locks: who is writing a shard. They die with their process."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from qlibero.errors import GuardRefusal
from qlibero.files import open_own


def lock(directory: Path, shard: str) -> int:
    """Lock a shard for this process; the descriptor holds it. Filesystems without locks go on unlocked.

    Raises GuardRefusal naming the process that holds it, OSError.
    """
    descriptor = open_own(directory / f".lock-{shard}", os.O_RDWR)
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


def refuse_second_writer(run_dir: Path) -> None:
    """Raise GuardRefusal where a process of this machine writes in a run directory: cut into another number of shards,
    the same episodes have other locks."""
    for path in sorted(run_dir.glob("*/.lock-*")):
        if is_locked(path):
            holder = path.read_text().strip()
            raise GuardRefusal(f"{run_dir} is being written by {holder}; wait for it or stop it")
