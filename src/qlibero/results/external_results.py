"""Result files of other tools in a comparison, beside each other and beside runs of qlibero.

Two arms of qlibero are paired as always, by key and fingerprint. With a file on either side the pair rests on the
key that both have, and equality of the scenes is taken on trust; without a common key two independent proportions
are compared. Every result says which of the three it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.episode_key import EpisodeKey
from qlibero.errors import UserError
from qlibero.results.comparison import Estimate
from qlibero.results.importers import read_external
from qlibero.results.imports import ExternalArm, from_run, task_numbers
from qlibero.results.paired_outcomes import (
    Outcomes,
    PairTable,
    Power,
    Verdict,
    Word,
    check_margin,
    judge,
    planning_discordance,
    power,
    rounded,
    rounded_interval,
    worst_step,
)
from qlibero.results.pairing import collect_arms, outcomes_of, pair_arms
from qlibero.results.runs import RunResults, common_margin
from qlibero.results.same_tasks import same_tasks
from qlibero.results.selection import end_of, is_result_file, select
from qlibero.results.wording import delta_text, detectable_line, interval_text, margin_text, p_text
from qlibero.stats import proportions as st
from qlibero.stats.proportions import Interval
from qlibero.stats.sampling import sample


@dataclass(frozen=True)
class ExternalResult:
    """One result against the reference. `table` is None where the two could not be paired; `caveat` says what the
    comparison rests on, `counts` are (successes, finished episodes)."""

    name: str
    reference: str
    tool: str
    counts: tuple[int, int]
    reference_counts: tuple[int, int]
    delta: float | None
    interval: Interval | None
    method: str
    p: float | None
    verdict: Verdict
    errors: tuple[int, int]  # of the arm, of the reference
    removed_pairs: int
    unpaired: dict[str, str]
    caveat: str
    detectable: str
    table: PairTable | None = None
    power: Power | None = None
    noninferiority_p: float | None = None

    @property
    def estimate(self) -> Estimate | None:
        """None without finished episodes in both."""
        return None if self.delta is None or self.interval is None else Estimate(self.delta, self.interval)

    @property
    def sentence(self) -> str:
        return _sentence(self)

    def to_json(self) -> JsonObject:
        arm, reference = self.errors
        v = self.verdict
        return {
            **(self.table.to_json() if self.table else {}),
            "paired": self.table is not None,
            "delta": rounded(self.delta),
            "interval95": rounded_interval(self.interval),
            "method": self.method,
            "p": rounded(self.p),
            "verdict": str(v.word),
            "qualifier": v.qualifier,
            "noninferiority_p": rounded(self.noninferiority_p),
            "caveat": self.caveat,
            "unpaired": [{"key": key, "reason": reason} for key, reason in self.unpaired.items()],
            "errors": {
                "arm": arm,
                "reference": reference,
                "removed_pairs": self.removed_pairs,
                "worst_case_verdict": str(v.worst_case),
            },
            "detectable": {**(self.power.to_json() if self.power else {}), "line": self.detectable},
            "tool": self.tool,
            "counts": list(self.counts),
            "reference_counts": list(self.reference_counts),
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class ExternalComparison:
    """Results of other tools, and runs of qlibero beside them, against one of them."""

    reference: str
    margin: float
    arms: dict[str, ExternalResult]

    def words(self) -> set[Word]:
        return {arm.verdict.word for arm in self.arms.values()}

    def to_json(self) -> JsonObject:
        arms = {name: arm.to_json() for name, arm in self.arms.items()}
        return {"reference": self.reference, "margin": self.margin, "foreign": True, "arms": arms}


def compare_external(
    paths: Sequence[Path | str],
    reference: str | None = None,
    margin: float | None = None,
    columns: Mapping[str, str] | None = None,
) -> ExternalComparison:
    """Compare result files, and run directories or single arms (DIR/ARM) beside them.

    The reference is the first file unless named; the margin what the runs declare; `columns` says what the
    columns of a table are (`importers.columns`). Raises UserError for a bad margin, reference or file.
    """
    inputs = [Path(path) for path in paths]
    runs = {path: select([path]) for path in inputs if not is_result_file(path)}
    every = [run for of in runs.values() for run in of]
    margin = check_margin(common_margin(every) if margin is None else margin)
    found = [
        [arm for run in runs[path] for arm in _arms_of(run, every)] if path in runs else read_external(path, columns)
        for path in inputs
    ]
    arms = [arm for one in found for arm in one]
    numbers = task_numbers(arms)
    arms = [arm.numbered(numbers) for arm in arms]
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise UserError(
            f"two inputs are called {next(n for n in names if names.count(n) > 1)}; put them into different folders"
        )
    base = next(arm for arm in arms if arm.name == _reference(names, reference))
    others = [arm for arm in arms if arm is not base]
    if not others:
        raise UserError("only one result here: nothing to compare. Name a second file or run directory")
    results = {arm.name: _paired(base, arm, margin) or _independent(base, arm, margin) for arm in others}
    return ExternalComparison(base.name, margin, results)


def _arms_of(run: RunResults, every: Sequence[RunResults]) -> list[ExternalArm]:
    instructions = run.environment.get("instructions") or {}
    here = run.run_dir.resolve()
    rivals = [other.run_dir for other in every if other.name == run.name and other.run_dir.resolve() != here]
    name = end_of(run.run_dir, rivals) if rivals else run.name
    return [from_run(arm, name, instructions) for arm in collect_arms([run]).values()]


def _reference(names: Sequence[str], asked: str | None) -> str:
    """The full name, or its last part where that is one arm's only."""
    if asked is None or asked in names:
        return asked or names[0]
    found = [name for name in names if name.endswith(f"/{asked}")]
    if len(found) != 1:
        problem = "no such result" if not found else "several are called so"
        raise UserError(f"--reference {asked}: {problem}; here are {', '.join(found or names)}")
    return found[0]


def _paired(base: ExternalArm, arm: ExternalArm, margin: float) -> ExternalResult | None:
    """None where no key is common to both."""
    if base.arm and arm.arm:
        pairing = pair_arms(base.arm, arm.arm)
        finished, lost = outcomes_of(pairing.pairs), outcomes_of(pairing.errors)
        unpaired = {str(key): reason for key, reason in pairing.unpaired.items()}
        caveat = "paired by key and scene fingerprint" + (f"; {len(unpaired)} unpaired" if unpaired else "")
    else:
        with_seed = base.has_seeds and arm.has_seeds
        left, right = base.keyed(with_seed), arm.keyed(with_seed)
        if not left or not right or not left.keys() & right.keys():
            return None
        common = sorted(left.keys() & right.keys())
        both: list[Outcomes] = [(left[key], right[key]) for key in common]
        finished, lost = ([pair for pair in both if ("error" in pair) is error] for error in (False, True))
        unpaired = {
            "/".join(map(str, key)): f"not in {(arm if key in left else base).name}"
            for key in sorted(left.keys() ^ right.keys())
        }
        keys = "task, initial state and seed" if with_seed else "task, initial state"
        caveat = f"paired by {keys}; that the scenes were equal is taken on trust"
        if not with_seed:
            caveat += ", and so are the seeds"
        if unpaired:
            caveat += f"; left out, being in one file only: {count_text(len(unpaired), 'episode')}"
    seen, worst = sample(_steps(finished)), sample(_steps(finished) + _steps(lost))
    table = PairTable.of(finished)
    found = power(table.pairs, *planning_discordance(table), margin) if table.pairs else None
    return ExternalResult(
        name=arm.name,
        reference=base.name,
        tool=arm.tool,
        counts=arm.counts[:2],
        reference_counts=base.counts[:2],
        delta=seen.delta,
        interval=seen.interval,
        method="Tango, paired",
        p=table.mcnemar_p,
        verdict=judge(seen, worst, margin),
        errors=(sum(o == "error" for _, o in lost), sum(r == "error" for r, _ in lost)),
        removed_pairs=len(lost),
        unpaired=unpaired,
        caveat=caveat,
        detectable=detectable_line(found) if found else "no pairs, so nothing could be found",
        table=table,
        power=found,
        noninferiority_p=seen.noninferiority_p(margin),
    )


def _steps(pairs: Sequence[Outcomes]) -> list[tuple[EpisodeKey, float]]:
    """Pairs as independent evidence: files of other tools do not say what is a cluster."""
    return [(EpisodeKey("", 0, i, 0), float(worst_step(pair))) for i, pair in enumerate(pairs)]


def _independent(base: ExternalArm, arm: ExternalArm, margin: float) -> ExternalResult:
    base, arm, about = same_tasks(base, arm)
    (k0, n0, e0), (k1, n1, e1) = base.counts, arm.counts
    finished = bool(n0 and n1)
    word, worst = _independent_word(k1, n1, k0, n0, margin), _independent_word(k1, n1 + e1, k0 + e0, n0 + e0, margin)
    line = "no finished episodes, so nothing could be found"
    if finished:
        drop = st.detectable_drop(k0 / n0, n0, n1)
        found = (
            f"the smallest drop found with 80 % power is {100 * drop:.1f} pp"
            if drop
            else "no drop whatever can be found"
        )
        line = (
            f"With {n1} against {count_text(n0, 'independent episode')}, {found}; paired episodes would "
            "find a smaller one."
        )
    why = arm.reason or base.reason or "the two share no episode key"
    return ExternalResult(
        name=arm.name,
        reference=base.name,
        tool=arm.tool,
        counts=arm.counts[:2],
        reference_counts=base.counts[:2],
        delta=k1 / n1 - k0 / n0 if finished else None,
        interval=st.newcombe_independent(k1, n1, k0, n0) if finished else None,
        method="Newcombe, independent samples",
        p=fisher_p(k1, n1, k0, n0) if finished else None,
        verdict=Verdict(Word.ERRORS if word != worst and finished else word, margin, worst),
        errors=(e1, e0),
        removed_pairs=0,
        unpaired={},
        caveat=f"unpaired: {why}, so the interval is that of two independent samples and wider{about}",
        detectable=line,
    )


def _independent_word(k1: int, n1: int, k0: int, n0: int, margin: float) -> Word:
    if not n0 or not n1:
        return Word.NO_PAIRS
    low, high = st.newcombe_independent(k1, n1, k0, n0)
    if low > -margin:
        return Word.NON_INFERIOR
    if high < -margin:
        return Word.INFERIOR
    return Word.WORSE if high < 0 and fisher_p(k1, n1, k0, n0) <= 0.05 else Word.INCONCLUSIVE


def fisher_p(k1: int, n1: int, k0: int, n0: int) -> float:
    """Two-sided exact p-value of two independent proportions."""
    from scipy.stats import fisher_exact  # seconds to import, and only needed here

    return float(fisher_exact([[k1, n1 - k1], [k0, n0 - k0]]).pvalue)


def _sentence(r: ExternalResult) -> str:
    in_arm, in_base = r.errors
    lost = [f"{count_text(in_arm, 'error')} in {r.name}"] if in_arm else []
    lost += [f"{count_text(in_base, 'error')} in {r.reference}"] if in_base else []
    arm, base, margin = r.name, r.reference, r.verdict.margin
    if r.estimate is None:
        return f"{arm} and {base}: no finished episodes to compare" + (f" ({', '.join(lost)})." if lost else ".")
    assert r.p is not None  # there is one wherever there is a difference
    opening = {
        Word.NON_INFERIOR: f"{arm} is non-inferior to {base} at {margin_text(margin)}",
        Word.INFERIOR: f"{arm} is inferior to {base} by more than {100 * margin:g} pp",
        Word.WORSE: f"{arm} is worse than {base} ({p_text(r.p)}); whether by more than {100 * margin:g} pp is open",
        Word.ERRORS: f"{arm} against {base} is inconclusive at {margin_text(margin)} because of its errors",
        Word.FEW: f"{arm} against {base} is inconclusive: too few pairs for a verdict",
    }.get(r.verdict.word, f"{arm} against {base} is inconclusive at {margin_text(margin)}")
    (k1, n1), (k0, n0) = r.counts, r.reference_counts
    if r.table:
        size = f"{r.table.broken} broken, {r.table.repaired} repaired of {count_text(r.table.pairs, 'pair')}"
    else:
        size = f"{k1}/{n1} against {k0}/{n0}"
    delta = f"Δ {delta_text(*r.estimate, margin)} pp {interval_text(r.estimate.interval, margin)}"
    return f"{opening}: {', '.join([delta, size, *lost])} ({r.caveat})."
