"""One finished episode as one line of JSON.

A record is what everything else is computed from (tables, verdicts, wandb, the report), so it is strict: an
unknown field, another type, a number out of its bounds or another schema version is refused with a sentence, never
guessed at. Floats are kept to a microsecond / a micrometre so that lines stay short and equal runs stay equal text. A
line in a ledger is sealed with a checksum of its text, so that a flipped bit is not read as a result.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, TypeAdapter, ValidationError

from qlibero.documents import complaint, parse_json
from qlibero.episode_key import BASE, FRESH, OFFICIAL, EpisodeKey
from qlibero.errors import UserError

SCHEMA = 1
Outcome = Literal["success", "failure", "error"]
OUTCOMES: tuple[Outcome, ...] = ("success", "failure", "error")

# What a line may hold. The bounds are far above anything real and far below what would exhaust a reader.
Count = Annotated[int, Strict(), Field(ge=0, le=1_000_000)]
Number = Annotated[float, Strict()]
Milliseconds = Annotated[float, Strict(), Field(ge=0)]
Text = Annotated[str, Strict(), Field(max_length=500)]
Hex = Annotated[str, Strict(), Field(pattern=r"^[0-9a-f]{0,64}$")]


@dataclass(frozen=True)
class TrajectorySlice:
    """Where an episode's rows lie in its sidecar: float32, 7 action values and 3 end-effector coordinates (m)."""

    file: Annotated[str, Strict(), Field(pattern=r"^trajectory-[A-Za-z0-9_.]{1,100}-[0-9]{1,30}\.f32$")]
    offset: Annotated[int, Strict(), Field(ge=0, le=1 << 50)]  # bytes
    rows: Count


@dataclass(frozen=True, kw_only=True)
class EpisodeRecord:
    """An episode of one arm.

    `outcome`: `success`, `failure` (horizon reached, or the policy returned non-finite actions) or `error`
    (simulator, rendering, transport, watchdog: neither success nor failure; `error` then says what happened).
    `fingerprint` and `action_digest` are hex; only an error may lack them. `policy_ms` has one entry per
    policy call, the time its whole batch took; `phases_ms` the same per phase; `batch_sizes` says how many
    episodes shared each call, so an episode's share of a call is 1 / size and a batch counts once. (Warm-up calls
    belong to no episode: they are in the arm's meta.json.)
    `sim_ms`, `render_ms` are totals, `wall_s` is from the episode's start to its end, waiting included, of
    the attempt that counts. `kernels` is 16 hex digits over which kernel ran
    each layer (meta.json says them). `path_length_m`, `jerk` (m/s³) and `gripper_flips` come from
    the trajectory (`quality.py`). `identity` is 16 hex digits over the content of everything that decides an action,
    `probe` 16 hex digits over the actions of one fixed policy call in the process that ran the episode, `machine` what
    kind of machine that was; `max_steps` (control steps), `replan_steps` and `latency_steps` (control steps before an
    answer was there; None: the simulator waited) are what was in force. Lines of earlier versions have none of these:
    empty, or None.
    """

    suite: Text
    task: Count
    init: Count
    seed: Annotated[int, Strict(), Field(ge=0, le=1 << 63)]
    arm: Text
    outcome: Outcome
    steps: Count
    replans: Count
    fingerprint: Text
    action_digest: Text
    error: str | None = None
    attempt: Count = 1
    success_step: Count | None = None
    policy_ms: list[Milliseconds] = field(default_factory=list)
    phases_ms: dict[Text, list[Number]] = field(default_factory=dict)
    batch_sizes: list[Count] = field(default_factory=list)
    sim_ms: Milliseconds = 0.0
    render_ms: Milliseconds = 0.0
    wall_s: Milliseconds = 0.0
    finished_at: Text = ""  # UTC, ISO 8601; never compared
    path_length_m: Number | None = None
    jerk: Number | None = None
    gripper_flips: Count | None = None
    trajectory: TrajectorySlice | None = None
    protocol: Text = "pure"
    kernels: Text = ""
    versions: dict[Text, Text] = field(default_factory=dict)
    config_hash: Text = ""
    identity: Hex = ""
    probe: Hex = ""
    machine: Text = ""
    max_steps: Count | None = None
    replan_steps: Count | None = None
    latency_steps: Count | None = None
    inits: Text = OFFICIAL  # what `init` counts, see EpisodeKey
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        def refuse(problem: str) -> None:
            raise ValueError(f"episode {self.key} of arm '{self.arm}': {problem}")

        if self.outcome not in OUTCOMES:
            refuse(f"outcome {self.outcome!r} is none of {', '.join(OUTCOMES)}")
        if self.inits not in (OFFICIAL, FRESH, BASE):
            refuse(f"inits {self.inits!r} is neither {OFFICIAL} nor {FRESH} nor {BASE}")
        if (self.outcome == "error") != (self.error is not None):
            refuse("`error` holds a text exactly when the outcome is 'error'")
        if (self.outcome == "success") != (self.success_step is not None):
            refuse("`success_step` is set exactly when the outcome is 'success'")
        if self.outcome != "error" and not (self.fingerprint and self.action_digest):
            refuse("a finished episode needs its fingerprint and its action digest")
        numbers = [self.sim_ms, self.render_ms, self.wall_s, *self.policy_ms]
        numbers += [x for values in self.phases_ms.values() for x in values]
        numbers += [x for x in (self.path_length_m, self.jerk) if x is not None]
        if not all(map(math.isfinite, numbers)):
            refuse("a number is not finite")

    @property
    def key(self) -> EpisodeKey:
        return EpisodeKey(self.suite, self.task, self.init, self.seed, self.inits)

    @property
    def succeeded(self) -> bool:
        return self.outcome == "success"

    def to_json(self) -> str:
        """One line, without the newline. Floats are rounded to six decimals."""
        text = json.dumps(_rounded(asdict(self)), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode(errors="replace").decode()  # an error may quote a name that is no UTF-8


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return value


_FIELDS = {f.name for f in fields(EpisodeRecord)}
_RETIRED = {"video", "warmup_calls"}  # in lines of earlier versions of schema 1, never with a value


def record_from_dict(data: Any, where: str = "record") -> EpisodeRecord:
    """The record in a parsed line.

    `where` (file:line) opens every message. Raises UserError for anything not schema 1.
    """
    if not isinstance(data, dict) or type(data.get("schema")) is not int:
        raise UserError(f"{where}: not an episode record (no `schema` number); was the file written by qlibero?")
    if data["schema"] > SCHEMA:
        raise UserError(
            f"{where}: written with record schema {data['schema']}, this qlibero reads schema {SCHEMA}; "
            "update qlibero to read this run"
        )
    if data["schema"] < SCHEMA:
        raise UserError(
            f"{where}: written with record schema {data['schema']}, "
            f"which is older than the {SCHEMA} this qlibero reads; "
            "read it with the qlibero that wrote it, or run again into another --out"
        )
    data = {key: value for key, value in data.items() if key not in _RETIRED}
    unknown = sorted(set(data) - _FIELDS)
    if unknown:
        raise UserError(f"{where}: unknown field(s) {', '.join(unknown)[:200]} in a schema {SCHEMA} record")
    try:
        return _schema().validate_python(data)
    except ValidationError as problem:
        raise UserError(f"{where}: {complaint(problem)}") from None


@cache
def _schema() -> TypeAdapter[EpisodeRecord]:
    return TypeAdapter(EpisodeRecord)


def record_from_json(line: str | bytes, where: str = "record") -> EpisodeRecord:
    """Inverse of `EpisodeRecord.to_json` and of `sealed`. Raises UserError for a line that is neither, and for a sealed
    one whose text is not what was sealed; a line without a checksum, as earlier versions wrote them, is read."""
    text = line.encode() if isinstance(line, str) else line
    data = parse_json(text, where)
    if isinstance(data, dict) and "checksum" in data:
        found, seal = data.pop("checksum"), _SEAL.search(text)
        if seal is None or found != _checksum(text[: seal.start()] + b"}"):
            raise UserError(
                f"{where}: the line is not what was written (its checksum does not fit): the disk, or somebody, "
                "changed it. Restore the file, or delete this line and run again: only this episode is run anew"
            )
    return record_from_dict(data, where)


_SEAL = re.compile(rb',"checksum":"[0-9a-f]{16}"\}\s*\Z')


def sealed(line: str) -> str:
    """A record's line as a ledger holds it: with the checksum of its text as its last field."""
    return f'{line[:-1]},"checksum":"{_checksum(line.encode())}"}}'


def _checksum(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]
