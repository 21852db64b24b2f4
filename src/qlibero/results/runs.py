"""A run directory read back: the experiment as resolved, its environment, and every arm's ledger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml

from qlibero.documents import JsonObject, read_json
from qlibero.episode_key import BASE, FRESH, OFFICIAL, EpisodeKey
from qlibero.errors import UserError
from qlibero.results.exported import is_export, unpacked
from qlibero.results.ledger import ArmLedger, arms_of, read_arm
from qlibero.results.records import EpisodeRecord
from qlibero.stats.sampling import DEFAULT_ESTIMAND, Estimand, check_estimand

REFERENCE = "baseline"  # the arm that others are compared with unless another is named
PRIMARY = "pooled"
T = TypeVar("T")
DEFAULT_MARGIN = 0.02  # 2 points, the schema's default: for directories whose experiment says nothing


@dataclass(frozen=True)
class RunResults:
    """`experiment` and `environment` are the parsed files, or {} where a directory lacks them."""

    run_dir: Path
    arms: dict[str, ArmLedger]
    experiment: JsonObject
    environment: JsonObject
    chosen: bool = False
    """Whether its arms were named one by one (`selection.py`): then they are what is compared, and all of it."""

    @property
    def planned(self) -> frozenset[EpisodeKey] | None:
        """The episodes of each arm that the experiment asks for; None where its files do not say."""
        return None if self.planned_order is None else frozenset(self.planned_order)

    @property
    def planned_order(self) -> tuple[EpisodeKey, ...] | None:
        """The same in the order in which they are run: suites and tasks as they are listed."""
        said = self.experiment
        suites, tasks, each = suites_of(said), said.get("tasks") or [], said.get("episodes_per_task")
        told = self.environment.get("instructions") or {}
        asked = {suite: tasks.get(suite, "all") if isinstance(tasks, dict) else tasks for suite in suites}
        of_suite = {
            suite: [int(task) for task in told.get(suite) or ()] if chosen == "all" else list(chosen)
            for suite, chosen in asked.items()
        }
        seeds = said.get("seeds") or [said.get("seed")]
        if not suites or not all(of_suite.values()) or not each or None in seeds:
            return None
        inits, kind = said.get("inits"), OFFICIAL
        if isinstance(inits, dict):
            kind, each = FRESH, inits["fresh"]
        elif inits == BASE:
            kind = BASE
        return tuple(
            EpisodeKey(suite, t, init, seed, kind)
            for suite in suites
            for t in of_suite[suite]
            for init in range(each.get(t, 0) if isinstance(each, dict) else each)  # a mapping: qlibero.evaluate
            for seed in seeds
        )

    @property
    def name(self) -> str:
        return str(self.experiment.get("name") or self.run_dir.resolve().name)


def suites_of(experiment: JsonObject) -> list[str]:
    """Names of the suites of an experiment (resolved, as in experiment.yaml). One's own is said as where its files
    lie."""
    said = experiment.get("suite")
    named = [
        str(suite.get("name") or Path(suite.get("bddl") or "").name) if isinstance(suite, dict) else str(suite or "")
        for suite in (said if isinstance(said, list) else [said])
    ]
    return named if all(named) else []


def keeps_a_sweep(path: Path) -> bool:
    """Whether this is what a sweep keeps for itself beside its cells."""
    return (path / "experiments").is_dir() and any(path.glob("submission-*"))


def read_runs(paths: Sequence[Path | str]) -> list[RunResults]:
    """`read_run` of each; a sweep's directory stands for its cells, an exported table for its runs.

    What a sweep keeps for itself (`sweep/`) is passed over, so that a shell's `logs/<sweep>/*/` works too.
    """
    runs = []
    places = [place for given in map(Path, paths) for place in (unpacked(given) if is_export(given) else [given])]
    for path in places:
        if keeps_a_sweep(path):
            continue
        cells = [] if arms_of(path) else sorted(found.parent for found in path.glob("*/experiment.yaml"))
        runs += [read_run(cell) for cell in cells or [path]]
    if not runs:
        raise UserError(f"{', '.join(map(str, paths))}: no run here; give the directory of a run or of a sweep")
    return runs


def read_run(run_dir: Path | str) -> RunResults:
    """Read a run directory. Arms come in the order the experiment lists them, then by name.

    Raises UserError if the directory does not exist or holds no ledger.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory; `qlibero run` prints the one it writes")
    names = arms_of(run_dir)
    if not names:
        raise UserError(
            f"{run_dir}: no episodes here (looked for <arm>/episodes-*.jsonl); give the directory of one run"
        )
    experiment = _yaml(run_dir / "experiment.yaml")
    listed = [entry["name"] for entry in listed_arms(experiment)]
    names.sort(key=lambda name: (listed.index(name) if name in listed else len(listed), name))
    return RunResults(run_dir, {name: read_arm(run_dir, name) for name in names}, experiment, _environment(run_dir))


def listed_arms(experiment: JsonObject) -> list[JsonObject]:
    """The arms that an experiment (resolved, as in experiment.yaml) lists, each as a mapping with `name` and `backend`.
    Earlier versions wrote them under `backends`."""
    listed = experiment.get("arms") or experiment.get("backends") or ()
    return [{"name": entry, "backend": entry} if isinstance(entry, str) else entry for entry in listed]


def declared_margin(experiment: JsonObject) -> float:
    """The non-inferiority margin an experiment (resolved, as in experiment.yaml) was declared with, as a fraction."""
    return float((experiment.get("stop") or {}).get("margin") or experiment.get("margin") or DEFAULT_MARGIN)


def common_margin(runs: Sequence[RunResults]) -> float:
    """The margin of a comparison that names none: what its runs declare. Raises UserError when they disagree."""
    return _common(runs, "margin", declared_margin, DEFAULT_MARGIN)


def common_estimand(runs: Sequence[RunResults]) -> Estimand:
    """The question of a comparison that names none: what its runs declare."""
    return check_estimand(
        _common(runs, "estimand", lambda said: said.get("estimand") or DEFAULT_ESTIMAND, DEFAULT_ESTIMAND)
    )


def common_primary(runs: Sequence[RunResults]) -> str:
    """`pooled`: one claim an arm, over all suites; `per-suite`: one for each suite. What the runs declare."""
    return _common(runs, "primary", lambda said: said.get("primary") or PRIMARY, PRIMARY)


def common_reference(runs: Sequence[RunResults]) -> str:
    """`baseline`: verdicts are against the reference arm alone; `pooled`: against its mean with the A/A arms."""
    return _common(runs, "compare_with", lambda said: said.get("compare_with") or REFERENCE, REFERENCE)


def _common(runs: Sequence[RunResults], what: str, declared: Callable[[JsonObject], T], default: T) -> T:
    found = {run.run_dir: declared(run.experiment) for run in runs}
    if len(set(found.values())) > 1:
        said = ", ".join(f"{run_dir} {value}" for run_dir, value in found.items())
        choose = f"choose one with --{what}" if what in ("margin", "estimand") else "compare them one by one"
        raise UserError(f"the runs declare different {what}s ({said}); {choose}")
    return next(iter(found.values()), default)


def video_path(run_dir: Path, record: EpisodeRecord) -> Path:
    """Where an episode's video lies when there is one.

    Which videos are kept is known after the record, so records cannot know of them.
    """
    return run_dir / record.arm / "videos" / f"{record.suite}-{record.task}-{record.key.init_name}-{record.seed}.mp4"


def _yaml(path: Path) -> JsonObject:
    if not path.exists():
        return {}
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as problem:
        raise UserError(f"{path}: not YAML: {problem}") from None
    return data if isinstance(data, dict) else {}


def _environment(run_dir: Path) -> JsonObject:
    try:
        data = read_json(run_dir / "environment.json")
    except FileNotFoundError:
        return {}
    return data if isinstance(data, dict) else {}
