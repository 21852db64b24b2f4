"""What a comparison found, as frozen values: everything that shows a verdict reads these fields.

`to_json` of each gives the keys of `qlibero compare`'s last line.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

from qlibero.documents import JsonObject
from qlibero.results.arm_equality import Arithmetic, together_json
from qlibero.results.controls import ExcessFlips, NoiseFloor
from qlibero.results.execution import Divergence, Shift
from qlibero.results.paired_outcomes import PairTable, Power, Verdict, Word, rounded, rounded_interval
from qlibero.results.speed import Speed
from qlibero.results.stopping import Decision
from qlibero.results.summary import ArmSummary
from qlibero.results.unlike import Unlike
from qlibero.results.wording import detectable_line, sentence
from qlibero.stats.proportions import Interval
from qlibero.stats.sampling import Estimand, Sample


@dataclass(frozen=True)
class Question:
    """What was asked before anything ran: the margin, what the answer is about (`stats.sampling`), over what a claim is
    made (`primary`: pooled or per-suite), against what (`against`: baseline, or pooled with its A/A arms)."""

    margin: float
    estimand: Estimand
    primary: str
    against: str


@dataclass(frozen=True)
class Adjusted:
    """A row's p-values after Holm over the confirmatory family; None of them under a stopping rule."""

    mcnemar_p: float
    noninferiority_p: float
    family: int
    passed: bool  # non-inferior after it
    possible: bool  # whether as many pairs without a flip would pass

    def to_json(self) -> JsonObject:
        return {
            "mcnemar_p_holm": rounded(self.mcnemar_p),
            "noninferiority_p_holm": rounded(self.noninferiority_p),
            "noninferior_after_holm": self.passed,
        }


@dataclass(frozen=True)
class TaskTable:
    """One task's counts, descriptive."""

    suite: str
    task: int
    table: PairTable

    def to_json(self) -> JsonObject:
        return {"suite": self.suite, "task": self.task, **self.table.to_json()}


class Estimate(NamedTuple):
    delta: float
    interval: Interval

    @property
    def low(self) -> float:
        return self.interval[0]

    @property
    def high(self) -> float:
        return self.interval[1]


@dataclass(frozen=True)
class Row:
    """A table with its verdict: an arm over all its episodes, or over those of one suite.

    `seen` is the evidence on which the verdict rests, for the declared question, and `worst` the same with errors
    counted against the arm; `new_tasks` is `seen` asked about new tasks. Under a stopping rule (`ruled`) the interval
    is that rule's own.
    """

    table: PairTable
    verdict: Verdict
    seen: Sample
    worst: Sample
    new_tasks: Sample
    missing: int
    adjusted: Adjusted | None = None
    ruled: bool = False
    ruled_interval: Interval | None = None

    @property
    def interval(self) -> Interval | None:
        """95 %, of the question that the verdict answers."""
        return self.ruled_interval or self.seen.interval

    @property
    def delta(self) -> float | None:
        return self.seen.delta

    @property
    def estimate(self) -> Estimate | None:
        """Δ and its interval; None without a pair."""
        return None if self.delta is None or self.interval is None else Estimate(self.delta, self.interval)

    @property
    def over_new_tasks(self) -> Interval | None:
        """95 %, of Δ on new tasks; None where a single one ran, which says nothing of others."""
        return None if self.new_tasks.clusters == 1 else self.new_tasks.interval

    @property
    def noninferiority_p(self) -> float | None:
        """Of Δ ≤ −margin, with errors counted against the arm, as the verdict counts them. None where nothing is
        judged: a control, an unfinished run, records that conflict, a test with its own rule."""
        unjudged = self.verdict.word in (Word.NOISE_FLOOR, Word.INTERIM, Word.CONFLICT) or self.ruled
        return None if unjudged else self.worst.noninferiority_p(self.verdict.margin)

    def row_json(self) -> JsonObject:
        v = self.verdict
        return {
            **self.table.to_json(),
            "verdict": str(v.word),
            "qualifier": v.qualifier,
            "because": v.because,
            "delta": rounded(self.delta),
            "interval95": rounded_interval(self.interval),
            "difference_p": rounded(self.seen.difference_p),
            "noninferiority_p": rounded(self.noninferiority_p),
            "missing_pairs": self.missing,
            "clusters": {"tasks": self.new_tasks.clusters, "t95": rounded_interval(self.new_tasks.interval)},
            **(self.adjusted.to_json() if self.adjusted else {}),
        }


@dataclass(frozen=True)
class SuiteComparison(Row):
    suite: str = ""

    def to_json(self) -> JsonObject:
        return self.row_json()


@dataclass(frozen=True, kw_only=True)
class AxisComparison(Row):
    """The suites of one perturbation axis together. Each counts by its pairs, so equally where these are equal."""

    axis: str
    pairs_of_suite: dict[str, int]

    @property
    def equal_weights(self) -> bool:
        return len(set(self.pairs_of_suite.values())) == 1

    def to_json(self) -> JsonObject:
        return {**self.row_json(), "pairs_of_suite": self.pairs_of_suite, "equal_weights": self.equal_weights}


@dataclass(frozen=True)
class Errors:
    """Pairs that ended in an error: of the arm, of the reference, in all."""

    arm: int
    reference: int
    keys: tuple[str, ...]

    @property
    def removed_pairs(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class SequentialTest:
    """What the declared stopping rule has decided, recomputed from the ledger in declared order."""

    decision: Decision
    margin: float
    declared_pairs: int
    max_pairs: int | None
    episodes_saved: int

    @property
    def spendable(self) -> int:
        """The most pairs it may take."""
        return min(self.declared_pairs, self.max_pairs or self.declared_pairs)

    def to_json(self) -> JsonObject:
        return {
            **asdict(self.decision),
            "interval": rounded_interval(self.decision.interval),
            "margin": self.margin,
            "declared_pairs": self.declared_pairs,
            "max_pairs": self.max_pairs,
            "episodes_saved": self.episodes_saved,
        }


@dataclass(frozen=True, kw_only=True)
class ArmComparison(Row):
    """An arm against the reference. `floor` is the A/A arms' (None for a control), `excess` whether the arm flips more;
    `pooled` the evidence against the mean of the reference and its A/A arms."""

    name: str
    label: str
    reference_label: str
    question: Question
    control: bool
    errors: Errors
    unpaired: dict[str, str]
    unlike: Unlike
    suites: dict[str, SuiteComparison]
    axes: dict[str, AxisComparison]  # {} where the suites are of one axis
    tasks: tuple[TaskTable, ...]
    floor: NoiseFloor | None
    excess: ExcessFlips | None
    pooled: Sample | None
    references: int
    power: Power | None
    sequential: SequentialTest | None
    note: str | None
    quality: dict[str, Shift | None]
    divergence: Divergence
    summary: ArmSummary
    speed: Speed

    @property
    def passed_holm(self) -> bool | None:
        """Whether the arm is non-inferior in its whole claim after Holm; None where nothing is adjusted."""
        rows = [self.adjusted] if self.adjusted else [suite.adjusted for suite in self.suites.values()]
        passed = [row.passed for row in rows if row is not None]
        return all(passed) if passed and len(passed) == len(rows) else None

    @property
    def family(self) -> int:
        """How many claims Holm runs over."""
        rows = [self.adjusted, *(suite.adjusted for suite in self.suites.values())]
        return max((row.family for row in rows if row), default=0)

    @property
    def task_pairs(self) -> tuple[int, int]:
        """Fewest and most pairs of a task."""
        counts = [task.table.pairs for task in self.tasks]
        return min(counts, default=0), max(counts, default=0)

    @property
    def band(self) -> Interval | None:
        """Where Δ lies in 95 % of reruns if nothing but rounding differs; None without A/A."""
        return self.floor.band(self.table.pairs) if self.floor and self.table.pairs else None

    @property
    def sentence(self) -> str:
        return sentence(self)

    @property
    def detectable(self) -> str:
        return detectable_line(self.power) if self.power else "no pairs, so nothing could be found"

    def to_json(self) -> JsonObject:
        errors = {
            "arm": self.errors.arm,
            "reference": self.errors.reference,
            "removed_pairs": self.errors.removed_pairs,
            "worst_case_verdict": str(self.verdict.worst_case),
            "keys": list(self.errors.keys),
        }
        pooled = self.pooled and {
            "references": self.references,
            "delta": rounded(self.pooled.delta),
            "interval95": rounded_interval(self.pooled.interval),
            "noninferiority_p": rounded(self.pooled.noninferiority_p(self.question.margin)),
        }
        return {
            "label": self.label,
            "control": self.control,
            **self.row_json(),
            "errors": errors,
            "unlike": {name: list(sides) for name, sides in self.unlike.items()},
            "unpaired": [{"key": key, "reason": reason} for key, reason in self.unpaired.items()],
            "suites": {name: suite.to_json() for name, suite in self.suites.items()},
            "axes": {name: axis.to_json() for name, axis in self.axes.items()},
            "tasks": [task.to_json() for task in self.tasks],
            "noise_floor": self.floor.to_json() if self.floor else None,
            "band95": rounded_interval(self.band),
            "excess_flips": self.excess.to_json() if self.excess else None,
            "pooled_reference": pooled,
            "detectable": {**(self.power.to_json() if self.power else {}), "line": self.detectable},
            "noninferior_after_holm": self.passed_holm,
            "sequential": self.sequential.to_json() if self.sequential else None,
            "note": self.note,
            "quality": {name: shift.to_json() if shift else None for name, shift in self.quality.items()},
            "divergence": self.divergence.to_json(),
            "summary": self.summary.to_json(),
            "speedup_p50": None if self.speed.ratio is None else round(self.speed.ratio, 4),
            "speed": self.speed.to_json(),
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class LedgerState:
    """What the ledgers hold besides records that count."""

    torn_lines: int
    repeated_lines: int
    conflicting_episodes: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Every arm of some runs against their reference."""

    reference: str
    reference_label: str
    question: Question
    runs: tuple[str, ...]
    grouped: dict[str, tuple[str, ...]]
    """Which runs each arm's episodes are of, the reference first."""
    arms: dict[str, ArmComparison]
    family: int
    reference_summary: ArmSummary
    floor: NoiseFloor | None
    copies: dict[str, str]  # A/A arms that are another arm to the bit, and which
    ledger: LedgerState
    arithmetic: tuple[Arithmetic, ...]  # of each run: whether the kernels computed what they claim

    @property
    def margin(self) -> float:
        return self.question.margin

    @property
    def tested(self) -> dict[str, ArmComparison]:
        return {name: arm for name, arm in self.arms.items() if not arm.control}

    def words(self) -> set[Word]:
        """The verdicts of the arms under test."""
        return {arm.verdict.word for arm in self.tested.values()}

    def to_json(self) -> JsonObject:
        return {
            "reference": self.reference,
            "reference_label": self.reference_label,
            "margin": self.margin,
            "estimand": self.question.estimand,
            "primary": self.question.primary,
            "compare_with": self.question.against,
            "runs": list(self.runs),
            "grouped": {name: list(runs) for name, runs in self.grouped.items()},
            "arms": {name: arm.to_json() for name, arm in self.arms.items()},
            "holm_family": self.family,
            "reference_summary": self.reference_summary.to_json(),
            "noise_floor": self.floor.to_json() if self.floor else None,
            "aa_copies": self.copies,
            "ledger": {
                "torn_lines": self.ledger.torn_lines,
                "repeated_lines": self.ledger.repeated_lines,
                "conflicting_episodes": list(self.ledger.conflicting_episodes),
            },
            "arithmetic": together_json(self.arithmetic),
        }
