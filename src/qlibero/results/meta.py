"""An arm's meta.json: what the arm is, and what its directory is bound to once it holds an episode.

Bound are the configuration's hash, the identity (what decides an action, by content) and the probe (what the policy
answers here). They are compared before anything is overwritten. A directory without an episode line is bound to
nothing: a start that failed leaves a meta.json that the next start replaces.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlibero.documents import JsonObject, checked, read_bytes, read_json
from qlibero.errors import GuardRefusal, UserError
from qlibero.files import open_own, replace
from qlibero.identity import Identity
from qlibero.results.arm_meta import ArmMeta

META_SCHEMA = 1
EPISODES = re.compile(r"episodes-(?P<shard>[A-Za-z0-9_.]+)-(?P<attempt>\d{1,30})\.jsonl")


def read_meta(run_dir: Path | str, arm: str) -> ArmMeta:
    """What an arm's meta.json says; nothing without one. UserError for a file that is none, naming the key."""
    return checked(ArmMeta, _content(run_dir, arm), _place(run_dir, arm))


def write_meta(run_dir: Path | str, arm: str, update: Mapping[str, Any]) -> None:
    """Merge `update` (fields of `ArmMeta`, and whatever else is to be kept) into the arm's meta.json, atomically."""
    with one_at_a_time(Path(run_dir) / arm):
        _write(run_dir, arm, {**_content(run_dir, arm), **update})


def check(run_dir: Path | str, arm: str, wanted: Mapping[str, Any], mixed_machines: bool = False) -> ArmMeta:
    """The arm's meta.json as far as it binds: nothing when no episode was recorded yet.

    `wanted`: what is known so far of what is to run; it binds by its `config_hash`, `identity` (all parts), `probe` and
    `probes`. Raises GuardRefusal, naming what differs, when the directory holds episodes of something else.
    """
    directory = Path(run_dir) / arm
    if not has_episodes(directory):
        return ArmMeta()
    known, now = read_meta(run_dir, arm), checked(ArmMeta, wanted, f"{directory}: what is to run")
    for compare in (_same_configuration, _same_identity):
        if problem := compare(known, now):
            raise GuardRefusal(f"{directory} holds episodes {problem}")
    if not mixed_machines and (problem := _same_probe(known, now)):
        raise GuardRefusal(f"{directory} holds episodes {problem}")
    return known


def bind(run_dir: Path | str, arm: str, meta: Mapping[str, Any], mixed_machines: bool = False) -> None:
    """`check`, then put `meta` on record: beside what is known when episodes are there, in its place otherwise."""
    with one_at_a_time(Path(run_dir) / arm):
        check(run_dir, arm, meta, mixed_machines)
        known = _content(run_dir, arm) if has_episodes(Path(run_dir) / arm) else {}
        probes = {**known.get("probes", {}), **meta.get("probes", {})}
        kept = {key: known[key] for key in ("probe",) if key in known}
        if "verdict" not in meta.get("passport", {"verdict": ""}):  # by suite; this may be a shard of some of them
            kept["passport"] = {**known.get("passport", {}), **meta["passport"]}
        _write(run_dir, arm, {**known, **meta, **kept, **({"probes": probes} if probes else {})})


def has_episodes(directory: Path) -> bool:
    """Whether any shard or attempt has written a whole line there."""
    names = os.listdir(directory) if directory.is_dir() else []
    return any(b"\n" in read_bytes(directory / name) for name in names if EPISODES.fullmatch(name))


def _same_configuration(known: ArmMeta, wanted: ArmMeta) -> str:
    before, now = known.config_hash, wanted.config_hash
    if before is not None and not known.identity and wanted.identity:
        return (
            "that an earlier qlibero recorded, which did not record by content what decided their actions. They are "
            "read and compared as they are, but not continued: choose another --out"
        )
    if before is None or now is None or before == now:
        return ""
    return (
        f"of another configuration ({before[:12]}, this experiment is {now[:12]}); its experiment.yaml says which. "
        "Choose another --out, or restore the configuration to continue it"
    )


def _same_identity(known: ArmMeta, wanted: ArmMeta) -> str:
    if not known.identity or not wanted.identity:
        return ""
    differences = Identity(known.identity).differences(Identity(wanted.identity))
    if not differences:
        return ""
    return (
        f"under what is not the same any more: {'; '.join(differences[:6])}"
        + (f"; and {len(differences) - 6} more" if len(differences) > 6 else "")
        + ". One success rate must not mix the two: choose another --out, or restore it to continue"
    )


def _same_probe(known: ArmMeta, wanted: ArmMeta) -> str:
    before, now = known.probe, wanted.probe
    if not before or not now or before == now:
        return ""
    theirs, ours = (said.probes[said.probe].facts if said.probe in said.probes else {} for said in (known, wanted))
    changed = [
        f"{name} was {theirs.get(name)!r}, is {ours.get(name)!r}"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
    return (
        f"of a policy that answers differently here (its probe was {before}, is {now}): "
        + ("; ".join(changed) or "no difference between the machines is known")
        + ". Continue on a machine like the first, choose another --out, or allow the mix with `mixed_machines: true`"
    )


def _place(run_dir: Path | str, arm: str) -> Path:
    return Path(run_dir) / arm / "meta.json"


def _content(run_dir: Path | str, arm: str) -> JsonObject:
    """The file as it is written again; {} without one."""
    path = _place(run_dir, arm)
    try:
        meta = read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(meta, dict):
        raise UserError(f"{path}: not a mapping; it is written atomically, so something else changed it")
    if meta.get("schema") != META_SCHEMA:
        raise UserError(f"{path}: meta schema {str(meta.get('schema'))[:40]!r}, this qlibero reads {META_SCHEMA}")
    return meta


def _write(run_dir: Path | str, arm: str, meta: JsonObject) -> None:
    """What no reader would take is not written."""
    path = _place(run_dir, arm)
    whole = {"schema": META_SCHEMA, "arm": arm, **meta}
    checked(ArmMeta, whole, path)
    replace(path, json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False))


@contextlib.contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """Shards of one arm read and write what they share (its meta.json, its latency) in turn."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = open_own(directory / ".lock-meta", os.O_RDWR)
    try:
        with contextlib.suppress(OSError):  # a filesystem without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
