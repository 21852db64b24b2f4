"""A real Slurm of two nodes in one directory, as the current user: no /etc, no systemd, no database, pretend GPUs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

CONF = """ClusterName=lab
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={d}/munge/s,cred_expire=5
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool.%n
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd.%n.pid
SlurmctldLogFile={d}/log/slurmctld.log
SlurmdLogFile={d}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MinJobAge=3600
KillWait=5
SlurmdTimeout=15
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{port1}-{port2}] CPUs=4 RealMemory=4000 Gres=gpu:2
PartitionName=gpu Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if not _which(program)]


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


@contextmanager
def slurm(directory: Path, more: str = ""):
    """Start it, with SLURM_CONF set in this process; yields the directory. Every daemon is gone afterwards.

    `more` are further lines of slurm.conf."""
    for name in ("state", "log", "munge"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    (directory / "munge").chmod(0o700)
    key = directory / "munge" / "key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    port = _three_free_ports()
    user = subprocess.check_output(["id", "-un"], text=True).strip()
    conf = directory / "slurm.conf"
    conf.write_text(CONF.format(d=directory, port=port, port1=port + 1, port2=port + 2, user=user) + more)
    # gres files must be character devices; these two do, without root
    (directory / "gres.conf").write_text("".join(f"NodeName=n[1-2] Name=gpu File=/dev/{d}\n" for d in ("null", "zero")))
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(conf)
    m = directory / "munge"
    try:
        _call(
            "munged",
            f"--key-file={key}",
            f"--socket={m}/s",
            f"--pid-file={directory}/munged.pid",
            f"--log-file={directory}/log/munged.log",
            f"--seed-file={m}/seed",
            "--force",
        )
        _call("slurmctld", "-c")
        start_node("n1")
        start_node("n2")
        wait_for(
            lambda: (
                set(subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True).stdout.split())
                == {"idle"}
            ),
            30,
        )
        yield directory
    finally:
        subprocess.run(["scancel", "--full", "--signal=KILL", f"--user={user}"], capture_output=True, timeout=20)
        for path in directory.glob("*.pid"):
            kill(path, signal.SIGTERM)
        time.sleep(0.5)
        for path in directory.glob("*.pid"):
            kill(path, signal.SIGKILL)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


def start_node(name: str) -> None:
    _call("slurmd", "-N", name)


def kill(pid_file: Path, number: int) -> bool:
    """Send a signal to the process a daemon's pid file names; whether there was one."""
    try:
        os.kill(int(pid_file.read_text()), number)
    except (OSError, ValueError):
        return False
    return True


def queue() -> dict[str, str]:
    """{job_task: state} of everything not yet forgotten by the controller and not finished."""
    out = subprocess.run(["squeue", "-h", "-r", "-o", "%i %T"], capture_output=True, text=True, check=True).stdout
    return dict(line.split() for line in out.splitlines())


def wait_for(condition, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def _three_free_ports() -> int:
    for base in range(26817 + os.getpid() % 2000, 60000, 7):
        sockets = [socket.socket() for _ in range(3)]
        try:
            for i, s in enumerate(sockets):
                s.bind(("127.0.0.1", base + i))
            return base
        except OSError:
            continue
        finally:
            for s in sockets:
                s.close()
    raise AssertionError("no three free ports")


def _call(program: str, *arguments: str) -> None:
    subprocess.run([_which(program), *arguments], check=True, capture_output=True, timeout=30)
