"""Verdicts, not averages: every arm against the reference on the same episodes.

`compare` is the whole of `qlibero compare` for runs; the terminal, the report and the trackers show what it returns.
Fractions are fractions (0.02 is 2 pp); Δ is arm − reference, so a loss is negative.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlibero.documents import JsonObject
from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError
from qlibero.results.arm_equality import arithmetic
from qlibero.results.axes import axis_of
from qlibero.results.cells import cells_of
from qlibero.results.comparison import (
    ArmComparison,
    AxisComparison,
    Comparison,
    Errors,
    LedgerState,
    Question,
    Row,
    SuiteComparison,
    TaskTable,
)
from qlibero.results.controls import NoiseFloor, copies, excess_flips, noise_floor, pooled_steps
from qlibero.results.declaration import Declaration, read_declaration
from qlibero.results.execution import action_noise, divergences, execution_quality, measured
from qlibero.results.exported import is_export
from qlibero.results.external_results import ExternalComparison, compare_external
from qlibero.results.multiplicity import adjusted
from qlibero.results.paired_outcomes import (
    PairTable,
    Ruling,
    check_margin,
    judge,
    planning_discordance,
    power,
    worst_step,
)
from qlibero.results.pairing import Arm, Pair, Pairing, collect_arms, outcomes_of, pair_arms
from qlibero.results.published import CountsComparison
from qlibero.results.runs import (
    REFERENCE,
    RunResults,
    common_estimand,
    common_margin,
    common_primary,
    common_reference,
)
from qlibero.results.selection import first_reference, select
from qlibero.results.sequential import sequential_tests
from qlibero.results.speed import speed
from qlibero.results.summary import summarize_arm
from qlibero.results.unlike import unlike
from qlibero.results.wording import margin_text
from qlibero.stats.sampling import Step, check_estimand, sample

Cells = Mapping[str, Comparison | ExternalComparison | CountsComparison]
"""What is compared, by the label of the cell; "" where there is one."""


def compare_runs(
    paths: Sequence[Path | str],
    reference: str | None = None,
    margin: float | None = None,
    estimand: str | None = None,
) -> JsonObject:
    """`compare_paths` as the document that becomes the JSON line."""
    return as_document(compare_paths(paths, reference, margin, estimand))


def as_document(cells: Cells) -> JsonObject:
    """The JSON line of one cell, or of several by their labels."""
    documents = {label: cell.to_json() for label, cell in cells.items()}
    return {"cells": documents} if len(documents) > 1 else next(iter(documents.values()))


def compare_paths(
    paths: Sequence[Path | str],
    reference: str | None = None,
    margin: float | None = None,
    estimand: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
) -> dict[str, Comparison | ExternalComparison]:
    """Read run directories and compare, by the label of the cell ("" when there is one). With result files of other
    tools among them see `external_results.compare_external`.

    A sweep's directory stands for its cells, and each cell is compared with its own reference; DIR/ARM stands for that
    arm, and what is named so is one comparison (`selection.py`, which takes the `labels`). `reference` None is the
    baseline (among files, and arms named one by one, the first); `margin` and `estimand` None are what the runs
    declare. Raises UserError for a bad margin, estimand, reference, label, directory or file.
    """
    if any(Path(path).is_file() and not is_export(path) for path in paths):
        if labels:
            raise UserError("--label: names arms of run directories; a result file names its own")
        return {"": compare_external(paths, reference, margin, columns)}
    if columns:
        raise UserError("--columns: no table among the results; it says what the columns of a .csv or .jsonl are")
    runs = select(paths, labels)
    reference = reference or first_reference(runs)
    return {cell.label: compare(cell.runs, reference, margin, estimand) for cell in cells_of(runs, reference)}


def compare(
    runs: Sequence[RunResults], reference: str = REFERENCE, margin: float | None = None, estimand: str | None = None
) -> Comparison:
    """The arms of `runs`, which are parts of one experiment, against `reference`."""
    question = Question(
        check_margin(common_margin(runs) if margin is None else margin),
        common_estimand(runs) if estimand is None else check_estimand(estimand),
        common_primary(runs),
        common_reference(runs),
    )
    arms = collect_arms(runs)
    if reference not in arms:
        raise UserError(f"--reference {reference}: no such arm; this run has {', '.join(arms)}")
    if len(arms) == 1:
        raise UserError(f"only one arm here ('{reference}'): nothing to compare. Add a backend and run again")
    base = arms.pop(reference)
    # an A/A arm is the baseline again, so it is the noise floor of nothing else
    of_baseline = base.name.rsplit("/", 1)[-1] == REFERENCE
    controls = [arm for arm in arms.values() if arm.is_control and of_baseline and not unlike(base, arm)]
    declarations = [d for run in runs if (d := read_declaration(run.run_dir)) is not None]
    context = _context(base, controls, question, declarations, len(runs) == 1)
    compared = {name: _compare_arm(context, arm) for name, arm in arms.items()}
    compared, family = adjusted(compared, question)
    return Comparison(
        reference,
        base.label,
        question,
        tuple(str(run.run_dir) for run in runs),
        {name: arm.runs for name, arm in [(reference, base), *arms.items()]},
        compared,
        family,
        summarize_arm(list(base.records.values())),
        context.floor,
        context.copies,
        _ledger_state(runs),
        tuple(arithmetic(run.run_dir, run.arms) for run in runs),
    )


@dataclass(frozen=True)
class _Context:
    """What all arms of a comparison share."""

    base: Arm
    controls: list[Arm]  # that are no copies
    copies: dict[str, str]  # A/A arm → the arm of which it is one
    control_pairings: dict[str, Pairing]  # of all A/A arms
    floor: NoiseFloor | None
    noise: float
    question: Question
    declarations: list[Declaration]
    alone: bool  # a single run, which one stopping rule can decide


def _context(
    base: Arm, controls: list[Arm], question: Question, declarations: list[Declaration], alone: bool
) -> _Context:
    pairings = {arm.name: pair_arms(base, arm) for arm in controls}
    found = copies(base, controls)
    controls = [arm for arm in controls if arm.name not in found]
    noise = action_noise(pairings[controls[0].name].pairs, base, controls[0]) if controls else 0.0
    return _Context(base, controls, found, pairings, noise_floor(base, controls), noise, question, declarations, alone)


def _compare_arm(context: _Context, arm: Arm) -> ArmComparison:
    base, question = context.base, context.question
    pairing = context.control_pairings.get(arm.name) or pair_arms(base, arm)
    control = arm.name in context.control_pairings
    replicates = [] if control else context.controls
    tests = sequential_tests(context.declarations, base, arm, pairing)
    outside = not tests and bool(context.declarations) or len(tests) > 1 or bool(tests) and not context.alone
    ruling = tests[0].ruling(question.margin) if tests and context.alone else None
    note = None
    if outside and not control:
        declared = margin_text(context.declarations[0].margin)
        note = f"stopped by a test against {REFERENCE} at {declared}: judge each run by that"
        ruling = Ruling.undecidable()
    everything = _Evidence(pairing.pairs, pairing.errors, _missing(base, arm), base.conflicts | arm.conflicts)
    by_suite = everything.by_suite()
    row = _row(context, everything, replicates, control, ruling)
    suite_rulings = {test.suite: test.ruling(question.margin) for test in tests}
    suites = {
        suite: SuiteComparison(
            **vars(_row(context, evidence, replicates, control, suite_rulings.get(suite))), suite=suite
        )
        for suite, evidence in by_suite.items()
        if evidence.pairs
    }
    by_axis = everything.grouped(lambda key: axis_of(key.suite))
    axes = {
        axis: AxisComparison(
            **vars(_row(context, evidence, replicates, control, Ruling.undecidable() if tests else None)),
            axis=axis,
            pairs_of_suite=dict(sorted(Counter(pair.key.suite for pair in evidence.pairs).items())),
        )
        for axis, evidence in by_axis.items()
        if evidence.pairs and len(by_axis) > 1
    }
    table = row.table
    floor = None if control else context.floor
    pooled = replicates and table.pairs and sample(pooled_steps(pairing.pairs, replicates), question.estimand)
    paired = [{pair.key: pair for pair in context.control_pairings[c.name].pairs} for c in replicates]
    found = measured(pairing.pairs, base, arm)
    floors = [measured(context.control_pairings[c.name].pairs, base, c) for c in replicates]
    psi = planning_discordance(table, floor.discordance if floor else None)
    return ArmComparison(
        **vars(row),
        name=arm.name,
        label=arm.label,
        reference_label=base.label,
        question=question,
        control=control,
        errors=_errors(pairing),
        unlike=unlike(base, arm),
        unpaired={str(key): reason for key, reason in pairing.unpaired.items()},
        suites=suites,
        axes=axes,
        tasks=_tasks(pairing.pairs),
        floor=floor,
        excess=excess_flips(pairing.pairs, paired) if replicates else None,
        pooled=pooled or None,
        references=1 + len(replicates),
        power=power(table.pairs, *psi, question.margin, bool(context.declarations)) if table.pairs else None,
        sequential=tests[0].test if tests and context.alone else None,
        note=note,
        quality=execution_quality(found, floors),
        divergence=divergences(pairing.pairs, base, arm, context.noise, _noise_source(context)),
        summary=summarize_arm(list(arm.records.values())),
        speed=speed(pairing.pairs, arm),
    )


@dataclass(frozen=True)
class _Evidence:
    """What a verdict is computed from: finished pairs, pairs with an error, missing planned ones, conflicts."""

    pairs: tuple[Pair, ...]
    errors: tuple[Pair, ...]
    missing: frozenset[EpisodeKey]
    conflicts: frozenset[EpisodeKey]

    def by_suite(self) -> dict[str, _Evidence]:
        return self.grouped(lambda key: key.suite)

    def grouped(self, by: Callable[[EpisodeKey], str]) -> dict[str, _Evidence]:
        keys = {p.key for p in (*self.pairs, *self.errors)} | self.missing
        return {group: self._of(group, by) for group in sorted({by(key) for key in keys})}

    def _of(self, group: str, by: Callable[[EpisodeKey], str]) -> _Evidence:
        return _Evidence(
            tuple(p for p in self.pairs if by(p.key) == group),
            tuple(p for p in self.errors if by(p.key) == group),
            frozenset(key for key in self.missing if by(key) == group),
            frozenset(key for key in self.conflicts if by(key) == group),
        )


def _row(
    context: _Context, evidence: _Evidence, replicates: Sequence[Arm], control: bool, ruling: Ruling | None
) -> Row:
    question = context.question
    against_mean = question.against == "pooled" and replicates
    steps: list[Step] = (
        pooled_steps(evidence.pairs, replicates) if against_mean else [(p.key, float(p.step)) for p in evidence.pairs]
    )
    lost: list[Step] = [(p.key, float(worst_step(p.outcomes))) for p in evidence.errors]
    seen = sample(steps, question.estimand)
    worst = sample(steps + lost, question.estimand)
    verdict = judge(
        seen,
        worst,
        question.margin,
        missing=len(evidence.missing),
        conflicts=len(evidence.conflicts),
        control=control,
        ruling=ruling,
    )
    return Row(
        PairTable.of(outcomes_of(evidence.pairs)),
        verdict,
        seen,
        worst,
        sample(steps, "new_tasks"),
        len(evidence.missing),
        ruled=ruling is not None,
        ruled_interval=ruling.interval if ruling else None,
    )


def _missing(base: Arm, arm: Arm) -> frozenset[EpisodeKey]:
    """Planned pairs of which a side has not run. An episode that ended in an error has run."""
    return frozenset(key for key in base.planned & arm.planned if key not in base.records or key not in arm.records)


def _errors(pairing: Pairing) -> Errors:
    return Errors(
        sum(p.other.outcome == "error" for p in pairing.errors),
        sum(p.reference.outcome == "error" for p in pairing.errors),
        tuple(str(p.key) for p in pairing.errors),
    )


def _tasks(pairs: Sequence[Pair]) -> tuple[TaskTable, ...]:
    groups = _grouped(pairs, lambda p: (p.key.suite, p.key.task))
    return tuple(TaskTable(suite, task, PairTable.of(outcomes_of(of))) for (suite, task), of in groups.items())


def _noise_source(context: _Context) -> str:
    if not context.controls:
        return "no A/A arm: any difference at all"
    return (
        f"99th percentile of the arm-motion differences between {context.base.name} and {context.controls[0].name} "
        "in the first executed chunk"
    )


def _ledger_state(runs: Sequence[RunResults]) -> LedgerState:
    ledgers = [ledger for run in runs for ledger in run.arms.values()]
    return LedgerState(
        sum(ledger.torn for ledger in ledgers),
        sum(ledger.repeated for ledger in ledgers),
        tuple(f"{ledger.arm}: {key}" for ledger in ledgers for key in ledger.conflicts),
    )


def _grouped(pairs: Sequence[Pair], by: Callable[[Pair], Any]) -> dict[Any, list[Pair]]:
    groups: dict[Any, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[by(pair)].append(pair)
    return dict(sorted(groups.items()))
