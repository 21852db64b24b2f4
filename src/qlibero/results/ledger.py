"""The ledger: one fsynced line per finished episode is the truth; everything else is a view of it.

Layout, inside a run directory and per arm: `episodes-<shard>-<attempt>.jsonl`, its sidecar
`trajectory-<shard>-<attempt>.f32` and `meta.json`. Every opening of a ledger is a new attempt with new files,
so no two writers ever share one (O_APPEND is not atomic across NFS clients) and nothing already written is
rewritten.

What a crash can leave and what is done about it:
  - a torn last line (killed, or the disk filled up in the middle): cut at the next opening, counted by the reader;
  - trajectory rows without a record: unreachable, harmless. The rows are on disk before the line that points at them.
A full disk makes `os.write` return less than it was given *without raising*; the return value is checked, the file
truncated back, and the failure named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qlibero import files
from qlibero.documents import JsonObject, checked, read_bytes
from qlibero.episode_key import EpisodeKey
from qlibero.errors import GuardRefusal, UserError, WorkFailed, cause
from qlibero.identity import Identity
from qlibero.results import meta as binding
from qlibero.results import quality
from qlibero.results.arm_meta import ArmMeta
from qlibero.results.locks import is_locked, lock
from qlibero.results.meta import EPISODES, read_meta, write_meta
from qlibero.results.records import EpisodeRecord, TrajectorySlice, record_from_json, sealed

__all__ = ["ArmLedger", "Ledger", "arms_of", "is_locked", "read_arm", "read_ledger", "read_trajectory", "write_meta"]

ROW = 10  # 7 action values + 3 end-effector coordinates
ROW_BYTES = 4 * ROW
CLOSED = -1  # no file descriptor: the system refuses it
MAX_LINE_BYTES = 16 << 20
_ATTEMPT = re.compile(r"(?:episodes|trajectory)-[A-Za-z0-9_.]+-(\d{1,30})\.(?:jsonl|f32)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")


@dataclass(frozen=True)
class ArmLedger:
    """All that an arm's files say. `records` has one record per key (the last complete line wins), in key order.

    `torn`: lines cut short by a crash and not counted. `repeated`: lines superseded by a later one.
    `conflicts`: keys with two finished episodes that differ in fingerprint, actions or outcome, which pure
    episodes never do.
    """

    arm: str
    records: list[EpisodeRecord]
    meta: ArmMeta = ArmMeta()
    torn: int = 0
    repeated: int = 0
    conflicts: tuple[EpisodeKey, ...] = ()

    def by_key(self) -> dict[EpisodeKey, EpisodeRecord]:
        return {record.key: record for record in self.records}


class Ledger:
    """The writing end for one shard of one arm. Opening it creates the next attempt's files.

    Raises GuardRefusal when the arm's directory belongs to another configuration or another process is
    writing the same shard, WorkFailed when the directory cannot be written or the disk is full.
    """

    def __init__(self, run_dir: Path | str, arm: str, shard: int | str = 0, config_hash: str = "") -> None:
        if not _NAME.fullmatch(arm):
            raise UserError(f"arm name {arm!r}: use letters, digits and . _ + = - (it names a directory)")
        self.arm, self.shard = arm, str(shard)
        self.directory = Path(run_dir) / arm
        self._meta: JsonObject = {"config_hash": config_hash}
        self._said = ArmMeta(config_hash=config_hash)
        self._mixed_machines = self._bound = False
        self._lock: int | None = None
        self._episodes = self._trajectory = CLOSED
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.directory, self.shard)
            binding.check(run_dir, arm, self._meta)
            self.torn_recovered = self._cut_torn_tails()
            self.attempt = self._create_files()
        except BaseException as problem:
            self.close()
            if isinstance(problem, OSError):
                raise WorkFailed(
                    f"cannot write to {self.directory}: {cause(problem)}; choose another --out"
                ) from problem
            raise

    def bind(self, meta: Mapping[str, Any], mixed_machines: bool = False) -> None:
        """Say what this arm is: `ArmMeta` has what may stand there. On record at once where episodes
        are, else again with the first one: until then another start may take the directory.

        Raises GuardRefusal when the directory holds episodes of something else; then nothing was written.
        """
        self._meta, self._mixed_machines = {**self._meta, **meta}, mixed_machines
        self._said = checked(ArmMeta, self._meta, self.directory)
        binding.bind(self.directory.parent, self.arm, self._meta, mixed_machines)

    def append(self, record: EpisodeRecord, trajectory: np.ndarray | None = None) -> EpisodeRecord:
        """Write one episode durably and return the record as written.

        `trajectory` (steps, 10) float32, may be None for an error. The execution quality, the trajectory's
        place and what binds the directory are filled in here, so that no caller can get them wrong. Raises WorkFailed
        on a full disk or when the directory was deleted, GuardRefusal when another start has bound it meanwhile.
        """
        if record.arm != self.arm:
            raise ValueError(f"a record of arm '{record.arm}' in the ledger of '{self.arm}'")
        if trajectory is not None and len(trajectory):
            rows = np.ascontiguousarray(trajectory, dtype="<f4")
            if rows.ndim != 2 or rows.shape[1] != ROW:
                raise ValueError(f"trajectory of shape {rows.shape}, expected (steps, {ROW})")
            offset = files.append(self._trajectory, rows.tobytes(), self._name("trajectory", "f32"))
            record = replace(
                record,
                trajectory=TrajectorySlice(self._name("trajectory", "f32").name, offset, len(rows)),
                path_length_m=quality.path_length_m(rows),
                jerk=quality.jerk(rows),
                gripper_flips=quality.gripper_flips(rows),
            )
        said = self._said
        record = replace(
            record,
            config_hash=said.config_hash or "",
            identity=_digest(said),
            probe=said.probe,
            machine=said.probes[said.probe].kind if said.probe in said.probes else "",
        )
        line = sealed(record.to_json())
        path = self._name("episodes", "jsonl")
        written = record_from_json(line, "a record that no reader would take")
        if os.fstat(self._episodes).st_nlink and not self._bound:
            binding.bind(self.directory.parent, self.arm, self._meta, self._mixed_machines)
            self._bound = True
        files.append(self._episodes, line.encode() + b"\n", path)
        return written

    def done_keys(self) -> set[EpisodeKey]:
        """Keys any shard and attempt of this arm has finished. Errors are not done: they are tried again."""
        return {r.key for r in read_arm(self.directory.parent, self.arm).records if r.outcome != "error"}

    def close(self) -> None:
        for descriptor in (self._episodes, self._trajectory, self._lock):
            if descriptor is not None and descriptor != CLOSED:
                os.close(descriptor)
        self._lock, self._episodes, self._trajectory = None, CLOSED, CLOSED

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _name(self, kind: str, suffix: str) -> Path:
        return self.directory / f"{kind}-{self.shard}-{self.attempt}.{suffix}"

    def _cut_torn_tails(self) -> int:
        """Cut what a crash left after the last newline in this shard's files (the lock says nobody is writing them)."""
        cut = 0
        for path in self.directory.glob(f"episodes-{self.shard}-*.jsonl"):
            data = read_bytes(path)
            if data and not data.endswith(b"\n"):
                os.truncate(path, data.rfind(b"\n") + 1)
                cut += 1
        return cut

    def _create_files(self) -> int:
        """Files of the next attempt: later than every attempt of any shard, so that `last wins` means later in time."""
        attempts = [int(m[1]) for m in map(_ATTEMPT.fullmatch, os.listdir(self.directory)) if m]
        self.attempt = max(attempts, default=0) + 1
        self._episodes = files.create(self._name("episodes", "jsonl"))
        self._trajectory = files.create(self._name("trajectory", "f32"))
        files.sync_directory(self.directory)
        return self.attempt


def read_arm(run_dir: Path | str, arm: str) -> ArmLedger:
    """Read every shard and attempt of an arm. Safe while writers are at work.

    Raises GuardRefusal for lines of another configuration than the arm's meta.json, UserError for foreign or
    differently versioned lines. An arm without files is an empty one.
    """
    directory = Path(run_dir) / arm
    meta = read_meta(run_dir, arm)
    identity = _digest(meta)
    found = [(int(m["attempt"]), m["shard"], name) for name in _listdir(directory) if (m := EPISODES.fullmatch(name))]
    records: dict[EpisodeKey, EpisodeRecord] = {}
    conflicts: set[EpisodeKey] = set()
    torn = lines = 0
    for _, _, name in sorted(found):
        *complete, tail = read_bytes(directory / name).split(b"\n")
        torn += bool(tail)
        for number, line in enumerate(complete, start=1):
            if b"\0" in line or not line.strip():  # zero pages after a power loss
                torn += 1
                continue
            where = f"{directory / name}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"{where}: a line of {len(line)} bytes is no episode record")
            record = record_from_json(line, where)
            if record.arm != arm:
                raise UserError(f"{where}: a record of arm {record.arm!r} among those of {arm!r}; remove that line")
            if meta.config_hash is not None and meta.config_hash != record.config_hash:
                raise GuardRefusal(
                    f"{where}: written under configuration {record.config_hash[:12]}, "
                    f"the arm is {meta.config_hash[:12]}; two experiments are mixed in one directory"
                )
            if identity and record.identity and record.identity != identity:
                raise GuardRefusal(
                    f"{where}: acted under identity {record.identity}, the arm's meta.json says {identity}; "
                    "two policies are mixed in one directory"
                )
            lines += 1
            before = records.get(record.key)
            if (
                before is not None
                and "error" not in (before.outcome, record.outcome)
                and _content(before) != _content(record)
            ):
                conflicts.add(record.key)
            records[record.key] = record
    ordered = [records[key] for key in sorted(records)]
    return ArmLedger(arm, ordered, meta, torn, lines - len(records), tuple(sorted(conflicts)))


def read_ledger(run_dir: Path | str, arm: str) -> list[EpisodeRecord]:
    """The arm's records, one per key, in key order."""
    return read_arm(run_dir, arm).records


def read_trajectory(run_dir: Path | str, record: EpisodeRecord) -> np.ndarray | None:
    """The episode's (steps, 10) float32 rows, or None if it has none or the sidecar is gone or too short."""
    piece = record.trajectory
    if piece is None:
        return None
    try:
        descriptor = os.open(Path(run_dir) / record.arm / piece.file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        data = os.pread(descriptor, piece.rows * ROW_BYTES, piece.offset) if file.seekable() else b""
    return np.frombuffer(data, "<f4").reshape(-1, ROW) if len(data) == piece.rows * ROW_BYTES else None


def arms_of(run_dir: Path | str) -> list[str]:
    """Names of the arms that have a ledger in the run directory, sorted."""
    run_dir = Path(run_dir)
    return [name for name in _listdir(run_dir) if any(map(EPISODES.fullmatch, _listdir(run_dir / name)))]


def _digest(meta: ArmMeta) -> str:
    """Of its identity; "" where an earlier version recorded none."""
    return Identity(meta.identity).digest if meta.identity else ""


def _content(record: EpisodeRecord) -> tuple[str, str, str]:
    return record.fingerprint, record.action_digest, record.outcome


def _listdir(directory: Path) -> list[str]:
    return sorted(os.listdir(directory)) if directory.is_dir() else []
