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

import errno
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qlibero.episode_key import EpisodeKey
from qlibero.errors import GuardRefusal, UserError, WorkFailed, cause
from qlibero.results import quality
from qlibero.results.records import EpisodeRecord, TrajectorySlice, record_from_dict, record_from_json

ROW = 10  # 7 action values + 3 end-effector coordinates
ROW_BYTES = 4 * ROW
META_SCHEMA = 1
_EPISODES = re.compile(r"episodes-(?P<shard>[A-Za-z0-9_.]+)-(?P<attempt>\d+)\.jsonl")
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
    meta: dict[str, Any] = field(default_factory=dict)
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
        self.arm, self.shard, self.config_hash = arm, str(shard), config_hash
        self.directory = Path(run_dir) / arm
        self._lock = self._episodes = self._trajectory = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.directory, self.shard)
            check_config(run_dir, arm, config_hash)
            if not (self.directory / "meta.json").exists():
                write_meta(run_dir, arm, {"config_hash": config_hash})
            self.torn_recovered = self._cut_torn_tails()
            self.attempt = self._create_files()
        except BaseException as problem:
            self.close()
            if isinstance(problem, OSError):
                raise WorkFailed(
                    f"cannot write to {self.directory}: {cause(problem)}; choose another --out"
                ) from problem
            raise

    def append(self, record: EpisodeRecord, trajectory: np.ndarray | None = None) -> EpisodeRecord:
        """Write one episode durably and return the record as written.

        `trajectory` (steps, 10) float32, may be None for an error. The execution quality, the trajectory's
        place and the config hash are filled in here, so that no caller can get them wrong. Raises WorkFailed
        on a full disk.
        """
        if record.arm != self.arm:
            raise ValueError(f"a record of arm '{record.arm}' in the ledger of '{self.arm}'")
        if trajectory is not None and len(trajectory):
            rows = np.ascontiguousarray(trajectory, dtype="<f4")
            if rows.ndim != 2 or rows.shape[1] != ROW:
                raise ValueError(f"trajectory of shape {rows.shape}, expected (steps, {ROW})")
            offset = _append(self._trajectory, rows.tobytes(), self._name("trajectory", "f32"))
            record = replace(
                record,
                trajectory=TrajectorySlice(self._name("trajectory", "f32").name, offset, len(rows)),
                path_length_m=quality.path_length_m(rows),
                jerk=quality.jerk(rows),
                gripper_flips=quality.gripper_flips(rows),
            )
        record = replace(record, config_hash=self.config_hash)
        line = record.to_json()
        _append(self._episodes, line.encode() + b"\n", self._name("episodes", "jsonl"))
        return record_from_json(line)

    def done_keys(self) -> set[EpisodeKey]:
        """Keys any shard and attempt of this arm has finished. Errors are not done: they are tried again."""
        return {r.key for r in read_arm(self.directory.parent, self.arm).records if r.outcome != "error"}

    def close(self) -> None:
        for descriptor in (self._episodes, self._trajectory, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._episodes = self._trajectory = self._lock = None

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
            data = path.read_bytes()
            if data and not data.endswith(b"\n"):
                os.truncate(path, data.rfind(b"\n") + 1)
                cut += 1
        return cut

    def _create_files(self) -> int:
        """Files of the next attempt: later than every attempt of any shard, so that `last wins` means later in time."""
        attempts = [int(m["attempt"]) for m in map(_EPISODES.fullmatch, os.listdir(self.directory)) if m]
        self.attempt = max(attempts, default=0) + 1
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        self._episodes = os.open(self._name("episodes", "jsonl"), flags, 0o644)
        self._trajectory = os.open(self._name("trajectory", "f32"), flags, 0o644)
        _fsync_directory(self.directory)
        return self.attempt


def write_meta(run_dir: Path | str, arm: str, update: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `update` into the arm's meta.json and replace it atomically.

    What reports look for there, all optional: `label` (the arm's name for people), `control` (an A/A arm),
    `policy`, `quant`, `artifact` (mappings), `kernels` ({layer: {"kernel", "verdict", "reason", "shape"}}),
    `layers` ([{"name", "sqnr_db"}]), `memory` ({"weight_bytes", "scale_bytes", "transform_bytes",
    "bf16_bytes"}), `warmup_ms` (list).
    """
    path = Path(run_dir) / arm / "meta.json"
    meta = {"schema": META_SCHEMA, "arm": arm, **_read_meta(path), **update}
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".meta-", suffix=".json")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(meta, file, indent=1, ensure_ascii=False, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as problem:
        Path(temporary).unlink(missing_ok=True)
        raise WorkFailed(f"cannot write {path}: {cause(problem)}") from problem
    return meta


def read_arm(run_dir: Path | str, arm: str) -> ArmLedger:
    """Read every shard and attempt of an arm. Safe while writers are at work.

    Raises GuardRefusal for lines of another configuration than the arm's meta.json, UserError for foreign or
    differently versioned lines. An arm without files is an empty one.
    """
    directory = Path(run_dir) / arm
    meta = _read_meta(directory / "meta.json")
    files = [(int(m["attempt"]), m["shard"], name) for name in _listdir(directory) if (m := _EPISODES.fullmatch(name))]
    records: dict[EpisodeKey, EpisodeRecord] = {}
    conflicts: set[EpisodeKey] = set()
    torn = lines = 0
    for _, _, name in sorted(files):
        *complete, tail = (directory / name).read_bytes().split(b"\n")
        torn += bool(tail)
        for number, line in enumerate(complete, start=1):
            where = f"{directory / name}:{number}"
            try:
                data = json.loads(line)
            except ValueError:  # a complete line that is no JSON: zero pages after a power loss
                torn += 1
                continue
            record = record_from_dict(data, where)
            if meta.get("config_hash", record.config_hash) != record.config_hash:
                raise GuardRefusal(
                    f"{where}: written under configuration {record.config_hash[:12]}, "
                    f"the arm is {meta['config_hash'][:12]}; two experiments are mixed in one directory"
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
        with open(Path(run_dir) / record.arm / piece.file, "rb") as file:
            file.seek(piece.offset)
            data = file.read(piece.rows * ROW_BYTES)
    except FileNotFoundError:
        return None
    return np.frombuffer(data, "<f4").reshape(-1, ROW) if len(data) == piece.rows * ROW_BYTES else None


def arms_of(run_dir: Path | str) -> list[str]:
    """Names of the arms that have a ledger in the run directory, sorted."""
    run_dir = Path(run_dir)
    return [name for name in _listdir(run_dir) if any(map(_EPISODES.fullmatch, _listdir(run_dir / name)))]


def _content(record: EpisodeRecord) -> tuple[str, str, str]:
    return record.fingerprint, record.action_digest, record.outcome


def _listdir(directory: Path) -> list[str]:
    return sorted(os.listdir(directory)) if directory.is_dir() else []


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as problem:
        raise UserError(
            f"{path}: not JSON ({problem}); it is written atomically, so something else changed it"
        ) from None
    if not isinstance(meta, dict):
        raise UserError(f"{path}: not a mapping; it is written atomically, so something else changed it")
    if meta.get("schema") != META_SCHEMA:
        raise UserError(f"{path}: meta schema {meta.get('schema')!r}, this qlibero reads {META_SCHEMA}")
    return meta


def check_config(run_dir: Path | str, arm: str, config_hash: str) -> None:
    """Raises GuardRefusal when the arm's directory holds episodes of another configuration."""
    directory = Path(run_dir) / arm
    known = _read_meta(directory / "meta.json").get("config_hash", config_hash)
    if known != config_hash:
        raise GuardRefusal(
            f"{directory} holds episodes of another configuration "
            f"({known[:12]}, this experiment is {config_hash[:12]}); its experiment.yaml says which. "
            "Choose another --out, or restore the configuration to continue it"
        )


def _lock(directory: Path, shard: str) -> int:
    """An advisory lock that dies with the process; the descriptor holds it.

    Filesystems without locks go on unlocked.
    """
    descriptor = os.open(directory / f".lock-{shard}", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise GuardRefusal(f"{directory}: shard {shard} is being written by {holder}; wait for it or stop it") from None
    except OSError as problem:
        if problem.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        return descriptor
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
    return descriptor


def is_locked(lock: Path) -> bool:
    """Whether a process of this machine holds a shard's lock file open. Asks /proc: trying the lock, even for a moment,
    could be what a writer that is just starting finds it held by."""
    try:
        _, pid, _, host = lock.read_text().split()
        if host != os.uname().nodename:
            return False
        held = lock.resolve()
        return any(Path(os.readlink(descriptor)) == held for descriptor in Path(f"/proc/{pid}/fd").iterdir())
    except (OSError, ValueError):  # gone, ended, or being written this moment
        return False


def _append(descriptor: int, data: bytes, path: Path) -> int:
    """One write and an fsync; returns the offset it went to. On any failure the file is as it was before."""
    offset = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, data)
        if written == len(data):
            os.fsync(descriptor)
            return offset
        reason = f"the disk is full ({written} of {len(data)} bytes were taken)"
    except OSError as problem:
        reason = cause(problem)
    os.ftruncate(descriptor, offset)
    raise WorkFailed(
        f"{path}: {reason}. Everything finished before is kept; free some space and run the same command again"
    )


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
