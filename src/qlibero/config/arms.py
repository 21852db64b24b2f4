"""An arm: one column of the comparison. A name, and in what it differs from the experiment: backend, quant, policy.

What an arm says of the policy lies over the experiment's `policy` as one file lies over another: key by key, another
`type` inherits nothing, another checkpoint does not inherit a hash. `completed` does that before validation, so that an
arm's entry holds whole settings; `differences_only` undoes it for people.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qlibero.config.execution import Execution
from qlibero.config.fields import FieldError, Int, Slug, StrictModel
from qlibero.config.policies import Policy, PolicySettings, as_settings
from qlibero.config.quantization import Quant, QuantOverrides, quant_of_arm
from qlibero.config.vocabulary import did_you_mean
from qlibero.config.yaml_source import OLDER_WORDS, laid_over
from qlibero.config.yaml_text import short, shown
from qlibero.documents import JsonObject
from qlibero.errors import UserError

if TYPE_CHECKING:
    from qlibero.config.schema import Experiment

UNQUANTIZED_BACKENDS = ("baseline", "aa")  # the policy as it is; the same again with another batch composition
# A file of a run directory, or of a later version's: an arm's directory must not be taken for one.
FILE_ENDINGS = (".csv", ".html", ".json", ".jsonl", ".lock", ".log", ".md", ".parquet", ".tmp", ".yaml", ".yml")
DIRECTORIES = ("sweep", "trackio", "videos", "wandb")
OVERRIDABLE = ("policy", "execution")  # sections of the experiment in which an arm may differ, key by key


def _spell_out(entry: Any) -> Any:
    if isinstance(entry, str):
        return {"name": entry, "backend": entry}
    if isinstance(entry, dict) and "name" not in entry and "backend" in entry:
        return {"name": entry["backend"], **entry}
    return entry


class ArmEntry(StrictModel):
    """One arm: a name, and in what it differs from the experiment. A backend alone is an arm of that name."""

    name: Slug = Field(description="the arm's name in tables and directories; by default the backend's")
    backend: str = Field(
        "baseline", description="baseline (unquantized), aa (baseline again), auto, or a kernel's name"
    )
    quant: QuantOverrides | None = Field(None, description="quant keys in which this arm differs")
    policy: Policy | None = Field(None, description="policy keys in which this arm differs")
    execution: Execution | None = Field(None, description="execution keys in which this arm differs")
    replicates: Int | None = Field(
        None,
        ge=1,
        le=32,
        description="of aa: so many arms aa-1, aa-2, …, each with its sums in another order",
    )

    @model_validator(mode="after")
    def _says_something(self) -> ArmEntry:
        if not self.model_fields_set & {"backend", "quant", *OVERRIDABLE}:
            raise FieldError(("backend",), f"is missing, and {self.name} differs in nothing else; write e.g. fake")
        return self

    @model_serializer(mode="wrap")
    def _short_when_plain(self, handler: SerializerFunctionWrapHandler) -> Any:
        plain = self.name == self.backend and self.replicates is None
        if plain and all(getattr(self, key) is None for key in ("quant", *OVERRIDABLE)):
            return self.backend
        return {key: value for key, value in handler(self).items() if key not in OVERRIDABLE or value is not None}

    def names(self) -> tuple[str, ...]:
        """The arms it stands for."""
        return tuple(f"{self.name}-{k + 1}" for k in range(self.replicates)) if self.replicates else (self.name,)


Entry = Annotated[ArmEntry, BeforeValidator(_spell_out, json_schema_input_type=str | ArmEntry)]


@dataclass(frozen=True)
class Arm:
    """What one column of the comparison runs. `quant` is None for an unquantized arm."""

    name: str
    backend: str
    quant: Quant | None
    policy: PolicySettings
    execution: Execution = Execution()
    replicate: int = 1  # of an A/A arm: which one, from 1


def completed(data: JsonObject) -> JsonObject:
    """An experiment's data with its arms under today's word, each with whole sections where it overrides keys of one.

    What cannot be laid over the experiment's, because that is wrong itself, is left out: the experiment's is told.
    """
    for older, now in OLDER_WORDS.items():
        if older in data and now not in data:  # from Python; of a file it was said where it was read
            data = {now if key == older else key: value for key, value in data.items()}
    arms = data.get("arms")
    if not isinstance(arms, list | tuple):
        return data
    return {**data, "arms": [_completed(entry, data) for entry in arms]}


def _completed(entry: Any, data: JsonObject) -> Any:
    if not isinstance(entry, dict):
        return entry
    whole = dict(entry)
    for section, validated in (("policy", as_settings), ("execution", Execution.model_validate)):
        base = data.get(section, {} if section == "execution" else None)
        base = base.model_dump() if isinstance(base, BaseModel) else base
        if not isinstance(entry.get(section), dict) or not isinstance(base, dict):
            continue
        try:
            validated(base)
        except (ValidationError, PydanticCustomError, UserError):
            whole[section] = None
            continue
        whole[section] = laid_over(base, entry[section])
        if section == "execution" and entry[section].get("mode") == "sync" and "latency_ms" not in entry[section]:
            whole[section].pop("latency_ms", None)  # the experiment's, which waits for nothing here
    return whole


def differences_only(data: JsonObject) -> JsonObject:
    """A dumped experiment whose arms say of each section only what is not the experiment's own."""
    if "arms" not in data:  # a dump of some keys
        return data
    return {**data, "arms": [_shortened(entry, data) for entry in data["arms"]]}


def _shortened(entry: Any, data: JsonObject) -> Any:
    if not isinstance(entry, dict):
        return entry
    short = dict(entry)
    for section in OVERRIDABLE:
        said, base = entry.get(section), data.get(section)
        if isinstance(said, dict) and isinstance(base, dict) and said.get("type") == base.get("type"):
            short[section] = {key: value for key, value in said.items() if base.get(key) != value}
    return short


def resolved(
    entries: Iterable[ArmEntry], policy: PolicySettings, quant: Quant | None, execution: Execution
) -> tuple[Arm, ...]:
    """The arms in the order they are written."""
    return tuple(
        Arm(
            name,
            entry.backend,
            None if entry.backend in UNQUANTIZED_BACKENDS else quant_of_arm(quant, entry.quant),
            entry.policy or policy,
            entry.execution or execution,
            k,
        )
        for entry in entries
        for k, name in enumerate(entry.names(), start=1)
    )


def overrides_of(experiment: Experiment, arm: Arm) -> list[str]:
    """In what the arm's policy and execution are not the experiment's, as short words: `flow_steps 1`."""
    base, own = experiment.policy.model_dump(mode="json"), arm.policy.model_dump(mode="json")
    said = [f"{own['type']} policy"]
    if own["type"] == base["type"]:
        said = [f"{key} {_brief(value)}" for key, value in _different(own, base) if key != "sha256"]
    return said + ([] if arm.execution == experiment.execution else [arm.execution.label])


def _different(own: JsonObject, base: JsonObject) -> Iterator[tuple[str, Any]]:
    for key, value in own.items():
        if base.get(key) == value:
            continue
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            yield from ((f"{key}.{inner}", said) for inner, said in _different(value, base[key]))
        else:
            yield key, value


def _brief(value: Any) -> str:
    return short(value.rpartition("/")[2] if isinstance(value, str) else shown(value), 40)


def check_arms(experiment: Experiment) -> None:
    """Raises FieldError for arms that cannot be told apart, or that cannot be what they say."""
    if not experiment.entries:
        raise FieldError(("arms",), "no arm is listed; write e.g. [baseline, fake]")
    seen: dict[str, str] = {}
    for i, entry in enumerate(experiment.entries):
        where = ("arms", i)
        for name in entry.names():
            _check_name(name, where, seen)
        for section in OVERRIDABLE:
            if entry.backend == "aa" and getattr(entry, section) is not None:
                raise FieldError(
                    (*where, section),
                    f"aa is the baseline again and differs in nothing; write backend: baseline for another {section}",
                )
        late = experiment.execution
        if entry.backend == "aa" and late.mode == "async" and late.latency_ms == "measured":
            raise FieldError(
                ("execution", "latency_ms"),
                "measured: aa, whose batches are of another size, would answer earlier or later than the baseline that "
                "it repeats; write a number, or leave aa out",
            )
        if entry.replicates is not None and entry.backend != "aa":
            raise FieldError((*where, "replicates"), f"belongs to aa; {entry.backend} would give the same again")
        if entry.backend not in UNQUANTIZED_BACKENDS:
            _check_quantized(experiment, entry, where)
        elif entry.quant is not None:
            raise FieldError(
                (*where, "quant"), f"{entry.backend} is unquantized; remove its quant, or write e.g. backend: fake"
            )


def _check_name(name: str, where: tuple[str | int, ...], seen: dict[str, str]) -> None:
    directory = name.casefold()
    if directory.endswith(FILE_ENDINGS) or directory in DIRECTORIES:
        raise FieldError((*where, "name"), f"{name} is what a file of the run may be called; rename the arm")
    if seen.get(directory) == name:
        raise FieldError((*where, "name"), f"two arms are called {name}; give one of them another name:")
    if directory in seen:
        raise FieldError(
            (*where, "name"), f"{seen[directory]} and {name} differ by case only, which not every disk tells apart"
        )
    seen[directory] = name


def _check_quantized(experiment: Experiment, entry: ArmEntry, where: tuple[str | int, ...]) -> None:
    policy = entry.policy or experiment.policy
    if not (layouts := policy.family.layouts):
        raise FieldError(where, f"a {policy.type} policy runs as it is, and only baseline and aa can be its arms")
    if experiment.quant is None and entry.quant is None:
        raise FieldError(where, f"{entry.backend} needs a quant section (extends: ../quant/duquant_w4a8.yaml)")
    try:
        quant = quant_of_arm(experiment.quant, entry.quant)
    except ValidationError as error:
        message = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
        raise FieldError((*where, "quant"), message) from None
    at = ("quant",) if entry.quant is None else (*where, "quant")
    if quant.lacks_data:
        raise FieldError((*at, "calibration"), f"{quant.method} is fitted on data: give calibration.path, or artifact")
    if quant.layout is not None and quant.layout not in layouts:
        known = f"a {policy.type} policy has the layouts {', '.join(layouts)}, or give include"
        raise FieldError((*at, "layout"), f"{known} (got {quant.layout!r}){did_you_mean(quant.layout, layouts)}")
