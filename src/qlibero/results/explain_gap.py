"""Why one number is not the other: every constant in which a run differs from a published protocol, or from how another
tool's result was made, with what is known of its effect, most likely first.

What a step cap does is not looked up but counted, in the run's own episodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.errors import UserError
from qlibero.results.exported import is_export
from qlibero.results.importers import read_external
from qlibero.results.protocols import OF_TOOL, effects, protocol, protocols
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import REFERENCE, RunResults, read_runs

OURS = {
    "settle_steps": 10,
    "resolution": 256,
    "rotation": "180 degrees",
    "orientation": "rotation vector without antipodal flip",
    "gripper": "as the policy gives it",
    "instruction": "task.language",
    "success": "goal true after any step",
}
"""What every run of qlibero does."""
_RESIZE = {name: "224, plain bilinear" for name in ("lerobot-0.4", "lerobot-0.6")}
_RESIZE |= {name: "224, antialiased bilinear" for name in ("openpi", "openpi-state")}
_STREAM = {"pure": "one seed an episode, before its reset", "openpi": "one seed a task and one reset an episode"}


@dataclass(frozen=True)
class Difference:
    """`here` and `there` are the two values; `known` what is known of the effect, and `points` of success (lowest,
    highest) where it was measured; `likely` orders them, 1 first."""

    constant: str
    here: Any
    there: Any
    source: str
    known: str
    points: tuple[float, float] | None
    likely: int


@dataclass(frozen=True)
class Gap:
    """`equal` are the constants in which both agree, `unknown` those that one side does not say."""

    run: str
    arm: str
    other: str
    rate: tuple[int, int]  # successes and finished episodes, here
    other_rate: tuple[int, int] | None
    differences: tuple[Difference, ...]
    equal: tuple[str, ...]
    unknown: tuple[str, ...]

    def to_json(self) -> JsonObject:
        return asdict(self)


def explain_gap(run: Path | str, other: Path | str, arm: str | None = None) -> Gap:
    """`run` is a run directory or an exported table, `other` the name of a published protocol, a result file of another
    tool, or another run. `arm` is the baseline, or the only one, unless named.

    Raises UserError for an unknown protocol, file, run or arm.
    """
    here, name, records = _of_run(run, arm)
    sources: Mapping[str, str]
    rate = None
    if Path(other).exists() and (Path(other).is_dir() or is_export(other)):
        there, label, theirs = _of_run(other, arm)
        sources, rate = dict.fromkeys(there, "the run's own files"), _rate(theirs)
        label = f"{Path(other).name}/{label}"
    elif Path(other).is_file():
        there, sources, label, rate = _of_file(other)
    else:
        try:
            found = protocol(str(other))
        except UserError as problem:
            raise UserError(f"{other} is neither a file, nor a run, nor a protocol: {problem}") from None
        there = {key: constant.value for key, constant in found.constants.items()}
        sources = {key: constant.source for key, constant in found.constants.items()}
        label = found.about
    suites = {record.suite for record in records}
    differences, equal, unknown = [], [], []
    for constant in effects():
        ours, others = (_of_suites(side.get(constant), suites) for side in (here, there))
        if ours is None or others is None:
            unknown += [constant] if (ours, others) != (None, None) else []
        elif ours == others:
            equal.append(constant)
        else:
            differences.append(_difference(constant, ours, others, sources.get(constant, ""), records))
    differences.sort(key=_likelihood)
    ranked = tuple(Difference(**{**asdict(d), "likely": i}) for i, d in enumerate(differences, 1))
    return Gap(str(run), name, label, _rate(records), rate, ranked, tuple(equal), tuple(unknown))


def _of_run(path: Path | str, asked: str | None) -> tuple[JsonObject, str, Sequence[EpisodeRecord]]:
    runs = read_runs([path])
    arms = list(dict.fromkeys(name for run in runs for name in run.arms))
    name = asked or (REFERENCE if REFERENCE in arms else arms[0])
    if name not in arms:
        raise UserError(f"--arm {name}: {path} has {', '.join(arms)}")
    some = [run for run in runs if name in run.arms]
    found = [_constants(run, name) for run in some]
    records = [record for run in some for record in run.arms[name].records]
    merged = {key: value for key, value in found[0].items() if all(one.get(key) == value for one in found)}
    merged["max_steps"] = {suite: cap for one in found for suite, cap in (one.get("max_steps") or {}).items()}
    return merged, name, records


def _constants(run: RunResults, arm: str) -> JsonObject:
    said, policy = run.experiment, run.arms[arm].meta.policy
    versions = run.environment.get("versions") or {}
    asked = said.get("policy") or {}
    records = run.arms[arm].records
    caps = {r.suite: r.max_steps for r in records if r.max_steps is not None}
    replan: set[Any] = {r.replan_steps for r in records if r.replan_steps is not None} or {asked.get("replan_steps")}
    stream = _STREAM.get(str(said.get("protocol")))
    fresh = isinstance(said.get("inits"), dict)
    each = said["inits"]["fresh"] if fresh else said.get("episodes_per_task")
    if isinstance(each, dict):
        each = f"{min(each.values())} to {max(each.values())}"
    return OURS | {
        "max_steps": caps,
        "replan_steps": replan.pop() if len(replan) == 1 else None,
        "action_horizon": policy.action_horizon,
        "flow_steps": policy.flow_steps or asked.get("flow_steps"),
        "resize": _RESIZE.get(str(policy.profile)),
        "mujoco": versions.get("mujoco"),
        "robosuite": versions.get("robosuite"),
        "random_stream": stream,
        "seed": said.get("seed"),
        "initial_states": "fresh ones" if fresh else "official in their order",
        "episodes_per_task": each,
    }


def _of_file(path: Path | str) -> tuple[JsonObject, dict[str, str], str, tuple[int, int]]:
    """The protocol of the file's tool, and what the file itself says."""
    (arm, *_) = read_external(path)
    usual = protocols()[OF_TOOL[arm.tool]].constants if arm.tool in OF_TOOL else {}
    there = {key: constant.value for key, constant in usual.items()}
    sources = {key: constant.source for key, constant in usual.items()}
    for key, value in arm.constants.items():
        if value:
            there[key], sources[key] = value, str(Path(path).name)
    wins, finished, _ = arm.counts
    return there, sources, f"{arm.name} ({arm.tool})", (wins, finished)


def _of_suites(value: Any, suites: set[str]) -> Any:
    """A constant of each suite, of those that were run; one number where they share it."""
    if not isinstance(value, Mapping):
        return value
    found = {suite: value[suite] for suite in sorted(suites) if value.get(suite)}
    return (next(iter(found.values())) if len(set(found.values())) == 1 else found) or None


def _difference(constant: str, here: Any, there: Any, source: str, records: Sequence[EpisodeRecord]) -> Difference:
    effect = effects()[constant]
    known, points = effect.said, effect.points
    if constant == "max_steps":
        known, points = _of_caps(here, there, records)
    if constant == "mujoco":
        new = [_version(v) >= (3, 4) for v in (here, there)]
        dark = [_version(v) >= (3, 3, 3) for v in (here, there)]
        if new[0] == new[1] and dark[0] == dark[1]:
            known = (
                "2.3.7, 3.2.3 and 3.3.2 give states within 1e-7 after 20 steps (measured here); no others were tried"
            )
        points = points if new[0] != new[1] else None
    if constant == "replan_steps" and max(here, there) < 50:
        known, points = f"{known}; of {here} for {there} nothing is known", None
    return Difference(constant, here, there, source, known, points, 0)


def _likelihood(found: Difference) -> tuple[bool, bool, float, int]:
    """Measured effects first, the largest first; then what nobody measured; what was counted to be none last."""
    most = found.points[1] if found.points else 0.0
    return found.points == (0, 0), found.points is None, -most, list(effects()).index(found.constant)


def _of_caps(here: Any, there: Any, records: Sequence[EpisodeRecord]) -> tuple[str, tuple[float, float]]:
    """Counted: successes later than the other's cap would be failures there; failures at a lower cap might be none."""

    def cap(of: Any, suite: str) -> int | None:
        return of.get(suite) if isinstance(of, Mapping) else of

    finished = [r for r in records if r.outcome != "error"]
    late = open_ = 0
    for record in finished:
        ours, theirs = cap(here, record.suite), cap(there, record.suite)
        if ours is None or theirs is None:
            continue
        late += record.succeeded and (record.success_step or 0) > theirs
        open_ += theirs > ours and not record.succeeded
    n = max(1, len(finished))
    said = []
    if late:
        said.append(f"{late} of {count_text(len(finished), 'episode')} succeeded after that cap and would have failed")
    if open_:
        said.append(
            f"{open_} of {count_text(len(finished), 'episode')} failed at the lower cap and might have gone "
            "on to succeed"
        )
    if not said:
        said.append("no episode here succeeded after the lower cap: it explains nothing")
    return "counted: " + "; ".join(said), (100 * late / n, 100 * (late + open_) / n)


def _version(text: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in str(text).split(".") if part.isdigit())


def _rate(records: Sequence[EpisodeRecord]) -> tuple[int, int]:
    finished = [record for record in records if record.outcome != "error"]
    return sum(record.succeeded for record in finished), len(finished)
