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
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict

from qlibero.documents import checked, read_bytes, read_json
from qlibero.errors import GuardRefusal, UserError
from qlibero.files import open_own, replace
from qlibero.identity import Identity

META_SCHEMA = 1
EPISODES = re.compile(r"episodes-(?P<shard>[A-Za-z0-9_.]+)-(?P<attempt>\d{1,30})\.jsonl")


class _Machine(BaseModel):
    kind: str
    facts: dict[str, str] = {}


class _PolicyCheck(BaseModel):
    layers_consuming_int8: Annotated[int, Strict(), Field(ge=0)]
    action_difference: Annotated[float, Field(ge=0)] | None


class _ActionError(BaseModel):
    observations: Annotated[int, Field(ge=1)]
    arm: Annotated[float, Field(ge=0)]
    arm95: tuple[float, float] | None


class _Schema(BaseModel):
    """The types of what is read back; whatever else stands there is handed on."""

    model_config = ConfigDict(extra="allow")

    arm: str | None = None
    label: str | None = None
    backend: str | None = None
    control: bool | None = None
    config_hash: Annotated[str, Strict(), Field(max_length=500)] | None = None
    identity: dict[str, str] | None = None
    probe: str | None = None
    probes: dict[str, _Machine] | None = None
    policy: dict[str, Any] | None = None
    quant: dict[str, Any] | None = None
    artifact: dict[str, Any] | str | None = None
    kernels: dict[str, dict[str, Any]] | None = None
    layers: list[dict[str, Any]] | None = None
    action_error: _ActionError | None = None
    memory: dict[str, Any] | None = None
    witness: _PolicyCheck | None = None
    passport: dict[str, Any] | None = None
    execution: dict[str, Any] | None = None
    warmup_ms: list[float] | None = None


def read_meta(run_dir: Path | str, arm: str) -> dict[str, Any]:
    """The content of an arm's meta.json, {} without one. UserError for a file that is none, naming the key."""
    path = Path(run_dir) / arm / "meta.json"
    try:
        meta = read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(meta, dict):
        raise UserError(f"{path}: not a mapping; it is written atomically, so something else changed it")
    if meta.get("schema") != META_SCHEMA:
        raise UserError(f"{path}: meta schema {str(meta.get('schema'))[:40]!r}, this qlibero reads {META_SCHEMA}")
    checked(_Schema, meta, path)
    return meta


def write_meta(run_dir: Path | str, arm: str, update: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `update` into the arm's meta.json and replace it atomically; returns the whole.

    What reports look for there, all optional: `label` (the arm's name for people), `control` (an A/A arm),
    `policy`, `quant`, `artifact` (mappings), `kernels` ({layer: {"kernel", "verdict", "reason", "shape"}}),
    `layers` ([{"name", "sqnr_db"}]), `action_error` (on held-out demonstrations: {"observations", "arm", "arm95"}),
    `memory` ({"weight_bytes", "scale_bytes", "transform_bytes", "bf16_bytes"}), `warmup_ms` (list).
    What binds the directory: `config_hash`, `identity` ({part: digest}), `probe`, and `probes`, {probe: {"kind",
    "facts"}}, the machines that gave each.
    """
    with _one_at_a_time(Path(run_dir) / arm):
        return _write(run_dir, arm, {**read_meta(run_dir, arm), **update})


def check(run_dir: Path | str, arm: str, wanted: Mapping[str, Any], mixed_machines: bool = False) -> dict[str, Any]:
    """The arm's meta.json as far as it binds: {} when no episode was recorded yet.

    `wanted` may hold `config_hash`, `identity` (all parts, or those known so far), `probe` and `probes`. Raises
    GuardRefusal, naming what differs, when the directory holds episodes of something else.
    """
    directory = Path(run_dir) / arm
    if not has_episodes(directory):
        return {}
    known = read_meta(run_dir, arm)
    for compare in (_same_configuration, _same_identity):
        if problem := compare(known, wanted):
            raise GuardRefusal(f"{directory} holds episodes {problem}")
    if not mixed_machines and (problem := _same_probe(known, wanted)):
        raise GuardRefusal(f"{directory} holds episodes {problem}")
    return known


def bind(run_dir: Path | str, arm: str, meta: Mapping[str, Any], mixed_machines: bool = False) -> None:
    """`check`, then put `meta` on record: beside what is known when episodes are there, in its place otherwise."""
    with _one_at_a_time(Path(run_dir) / arm):
        known = check(run_dir, arm, meta, mixed_machines)
        probes = {**known.get("probes", {}), **meta.get("probes", {})}
        kept = {key: known[key] for key in ("probe",) if key in known}
        if "verdict" not in meta.get("passport", {"verdict": ""}):  # by suite; this may be a shard of some of them
            kept["passport"] = {**known.get("passport", {}), **meta["passport"]}
        _write(run_dir, arm, {**known, **meta, **kept, **({"probes": probes} if probes else {})})


def has_episodes(directory: Path) -> bool:
    """Whether any shard or attempt has written a whole line there."""
    names = os.listdir(directory) if directory.is_dir() else []
    return any(b"\n" in read_bytes(directory / name) for name in names if EPISODES.fullmatch(name))


def _same_configuration(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    before, now = known.get("config_hash"), wanted.get("config_hash")
    if before is not None and "identity" not in known and "identity" in wanted:
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


def _same_identity(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    if not known.get("identity") or not wanted.get("identity"):
        return ""
    differences = Identity(known["identity"]).differences(Identity(wanted["identity"]), wanted.get("partial", False))
    if not differences:
        return ""
    return (
        f"under what is not the same any more: {'; '.join(differences[:6])}"
        + (f"; and {len(differences) - 6} more" if len(differences) > 6 else "")
        + ". One success rate must not mix the two: choose another --out, or restore it to continue"
    )


def _same_probe(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    before, now = known.get("probe"), wanted.get("probe")
    if not before or not now or before == now:
        return ""
    theirs = known.get("probes", {}).get(before, {}).get("facts", {})
    ours = wanted.get("probes", {}).get(now, {}).get("facts", {})
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


def _write(run_dir: Path | str, arm: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    whole = {"schema": META_SCHEMA, "arm": arm, **meta}
    replace(Path(run_dir) / arm / "meta.json", json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False))
    return whole


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Shards of one arm read and write its meta.json in turn."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = open_own(directory / ".lock-meta", os.O_RDWR)
    try:
        with contextlib.suppress(OSError):  # a filesystem without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
