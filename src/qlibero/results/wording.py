"""Results in words: the one sentence per arm and the line on what could have been found. Minus signs are real ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qlibero.console import count_text
from qlibero.results.paired_outcomes import FEWEST_PAIRS, Power, Word
from qlibero.results.speed import Speed
from qlibero.results.unlike import unlike_text
from qlibero.stats.sampling import population

if TYPE_CHECKING:
    from qlibero.results.comparison import ArmComparison, Comparison, SequentialTest
    from qlibero.stats.proportions import Interval


def points(x: float, digits: int = 1) -> str:
    """0.014 → "+1.4": percentage points, always with a sign."""
    return f"{100 * x:+.{digits}f}".replace("-", "−")


def percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def margin_text(margin: float) -> str:
    return f"−{100 * margin:g} pp"


def p_text(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def digits_for(interval: Interval, margin: float) -> int:
    """Decimals that show on which side of 0 and of the margin an interval ends: one, unless rounding hides it."""
    for digits in (1, 2, 3):
        rounded = [
            (round(100 * end, digits), round(100 * line, digits)) for end in interval for line in (-margin, 0.0, margin)
        ]
        if all(end != line for end, line in rounded):
            return digits
    return 4


def interval_text(interval: Interval, margin: float) -> str:
    """ "[−2.3, +1.5]" in percentage points."""
    digits = digits_for(interval, margin)
    return f"[{points(interval[0], digits)}, {points(interval[1], digits)}]"


def delta_text(delta: float, interval: Interval, margin: float) -> str:
    """ "−0.4", with as many decimals as its interval."""
    return points(delta, digits_for(interval, margin))


def ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}"


def speed_text(speed: Speed) -> str:
    """How much faster (or slower) a policy call is, with its interval; empty if unknown."""
    if speed.claim == "simulation":
        return "simulation: no speed claim"
    if speed.ratio is None:
        return ""
    if speed.interval is None:
        return f"speed unclear ({count_text(speed.scenes, 'scene')})"
    low, high = speed.interval
    if speed.claim == "slower":
        return f"{ratio_text(1 / speed.ratio)}× slower [{ratio_text(1 / high)}, {ratio_text(1 / low)}]"
    inside = f"[{ratio_text(low)}, {ratio_text(high)}]"
    if speed.claim == "faster":
        return f"{ratio_text(speed.ratio)}× faster {inside}"
    return f"as fast {inside}" if speed.claim == "as fast" else f"speed unclear {inside}"


def sentence(arm: ArmComparison) -> str:
    """What an arm's comparison says, in one sentence that stands alone."""
    lost = [f"{count_text(arm.errors.removed_pairs, 'pair')} lost to errors"] if arm.errors.removed_pairs else []
    if arm.unpaired:
        lost.append(f"{len(arm.unpaired):,} unpaired")
    label, reference = arm.label, arm.reference_label
    if arm.estimate is None:
        why = f" ({', '.join(lost)})" if lost else ""
        return f"{label} and {reference} share no finished pair, so nothing can be said{why}."
    margin = arm.question.margin
    pieces = [
        f"Δ {delta_text(*arm.estimate, margin)} pp {interval_text(arm.estimate.interval, margin)}",
        f"{arm.table.broken} broken, {arm.table.repaired} repaired of {count_text(arm.table.pairs, 'pair')}",
        *lost,
    ]
    if arm.control:
        flips = f"{percent((arm.table.broken + arm.table.repaired) / arm.table.pairs)} flip"
        return f"{label} is {reference} against itself, the noise floor: {', '.join([*pieces, flips])}."
    if arm.question.against == "pooled" and arm.references > 1:
        reference = f"the mean of {reference} and {count_text(arm.references - 1, 'A/A arm')}"
    if arm.sequential:
        pieces.append(f"sequential test over {arm.sequential.decision.pairs} of them")
    if arm.note:
        pieces.append(arm.note)
    if arm.unlike:
        pieces.append(unlike_text(arm.unlike))
    if warning := unequal_tasks(arm):
        pieces.append(warning)
    if speed := speed_text(arm.speed):
        pieces.append(speed)
    return f"{_opening(arm, reference)}: {', '.join(pieces)}."


def _opening(arm: ArmComparison, reference: str) -> str:
    v, label, margin = arm.verdict, arm.label, arm.question.margin
    on = f"on {population(arm.question.estimand, len(arm.tasks))}"
    at = f"at {margin_text(margin)} {on}"
    if v.word == Word.NON_INFERIOR:
        said = (
            f"{label} is better than {reference} {on}"
            if v.qualifier == "better"
            else (f"{label} is non-inferior to {reference} {at}" + (f", {v.qualifier}" if v.qualifier else ""))
        )
        return said + (f", {after_holm(arm)}" if arm.passed_holm is False else "")
    if v.word == Word.INFERIOR:
        return f"{label} is inferior to {reference} by more than {100 * margin:g} pp {on}"
    if v.word == Word.WORSE:
        holm = arm.adjusted.mcnemar_p if arm.adjusted and arm.family > 1 else None
        seen = arm.seen.difference_p
        assert seen is not None, "a difference was found"
        p = p_text(seen) + (f", after Holm {p_text(holm)}" if holm is not None else "")
        return f"{label} is worse than {reference} {on} ({p}); whether by more than {100 * margin:g} pp is open"
    if v.word == Word.INTERIM:
        return f"{label} against {reference} has no verdict yet (interim{': ' * bool(v.because)}{v.because})"
    if v.word == Word.FEW:
        return f"{label} against {reference} is inconclusive {on}: fewer than {FEWEST_PAIRS} pairs carry no verdict"
    because = {Word.ERRORS: " because of its errors", Word.CONFLICT: f": {v.because}"}.get(v.word, "")
    because = because or (f" ({v.because})" if v.because else "")
    return f"{label} against {reference} is inconclusive {at}{because}"


def after_holm(arm: ArmComparison) -> str:
    """Why an arm that is non-inferior by itself is not when all claims of the comparison are counted."""
    over = f"Holm over {arm.family} {'arms' if arm.question.primary == 'pooled' else 'arms × suites'}"
    if arm.adjusted:
        impossible = "" if arm.adjusted.possible else "; with so few pairs not even an arm without a flip could pass"
        return f"but not after {over} ({p_text(arm.adjusted.noninferiority_p)} > 0.025{impossible})"
    passed = sum(bool(suite.adjusted and suite.adjusted.passed) for suite in arm.suites.values())
    return f"but after {over} in {passed} of {count_text(len(arm.suites), 'suite')}"


def grouped_text(found: Comparison) -> str:
    """Which arms were put into one comparison, and of which runs: `baseline of logs/a, fake of logs/a and logs/b`."""
    sides = (f"{name} of {' and '.join(runs) or 'no run'}" for name, runs in found.grouped.items())
    return f"compared: {', '.join(sides)}"


def unequal_tasks(arm: ArmComparison) -> str:
    """A warning where some task has less than half the pairs of another: each pair counts alike, so Δ leans to it."""
    fewest, most = arm.task_pairs
    return f"tasks have {fewest} to {count_text(most, 'pair')} and weigh accordingly" if 2 * fewest < most else ""


def detectable_line(d: Power) -> str:
    """The minimum detectable difference and the chance to show non-inferiority, in words."""
    flips = f"{percent(d.discordance)} flips ({d.discordance_from})"
    if d.difference is not None:
        found = f"the smallest difference found with 80 % power is {100 * d.difference:.1f} pp"
    elif d.one_way_difference is not None:
        found = (
            "a difference is found with 80 % power only if every flip goes one way and it reaches "
            f"{100 * d.one_way_difference:.1f} pp"
        )
    else:
        found = "no difference whatever can be found"
    return (
        f"With {count_text(d.pairs, 'pair')} and {flips}, {found}; truly equal arms would be shown non-inferior at "
        f"{margin_text(d.margin)} with {100 * d.noninferiority_power:.0f} % chance (80 % takes "
        f"{count_text(d.pairs_for_noninferiority, 'pair')})"
        + (", all for one look at the end: the sequential test takes more." if d.sequential else ".")
    )


def excess_text(arm: ArmComparison) -> str:
    """Whether the arm flips more episodes than the reference run again; "" without an A/A arm."""
    if arm.excess is None:
        return ""
    e = arm.excess
    more = "more than" if e.p <= 0.05 else "not shown to be more than"
    return (
        f"{percent(e.arm)} of {count_text(e.scenes, 'scene')} flip, {more} the {percent(e.floor)} of A/A "
        f"({p_text(e.p)})"
    )


def band_text(arm: ArmComparison) -> str:
    """How large a difference rounding alone makes; "" without an A/A arm."""
    if arm.band is None:
        return ""
    return f"rounding alone moves Δ within ±{100 * arm.band[1]:.1f} pp in 95 % of reruns"


def copies_text(copies: Mapping[str, str]) -> str:
    """Which A/A arms count for nothing of their own; "" where every one is another draw."""
    if not copies:
        return ""
    said = ", ".join(f"{arm} is {other}" for arm, other in copies.items())
    return f"Equal in every episode, to the bit: {said}. What is one arithmetic counts once in the noise floor."


def pooled_text(arm: ArmComparison) -> str:
    """Δ against the mean of the reference and its A/A arms; "" without one, or where that is the verdict's own."""
    if arm.pooled is None or arm.question.against == "pooled":
        return ""
    found, margin = arm.pooled, arm.question.margin
    if found.delta is None or found.interval is None:
        return ""
    return (
        f"against the mean of {arm.reference_label} and {count_text(arm.references - 1, 'A/A arm')}: "
        f"Δ {delta_text(found.delta, found.interval, margin)} pp {interval_text(found.interval, margin)}"
    )


def ruling_text(test: SequentialTest) -> str:
    """Why a sequential test says neither "non-inferior" nor "inferior"; "" where it says one."""
    d = test.decision
    if d.verdict is None:
        following = f", next look at {d.next_look:,}" if d.next_look and d.next_look > d.position else ""
        return f"{d.position:,} of at most {count_text(test.spendable, 'pair')}, no decision{following}"
    if d.verdict == "futile":
        return (
            f"given up after {d.position:,} of {count_text(test.spendable, 'pair')}: neither verdict had "
            "a fair chance left"
        )
    if d.verdict == "undecided":
        return f"undecided after {count_text(d.position, 'pair')}, all that may be spent"
    return ""


def sequential_text(test: SequentialTest) -> str:
    """The sequential decision in words, with the interval that belongs to it."""
    d = test.decision
    evidence = (
        f"{'e' if d.method == 'evalues' else 'z'} = {max(d.noninferior, d.inferior):.3g}, needs {d.threshold:.3g}"
    )
    if d.looks is not None:
        evidence = f"look {d.look} of {d.looks}: {evidence}" if d.look else "not looked at yet"
    if d.interval is not None:
        low, high = d.interval
        evidence += f", Δ in [{points(low)}, {points(high)}] pp at {100 * d.confidence:g} % over all looks"
    at = margin_text(test.margin)
    against = f", {count_text(d.errors, 'pair')} with errors counted against it" if d.errors else ""
    if d.verdict is None:
        retried = (
            f"; {count_text(d.errors, 'pair')} ended in errors, which the same command tries again" if d.errors else ""
        )
        following = f"; the next look is at {d.next_look:,}" if d.next_look else ""
        return f"no decision yet at {at} after {count_text(d.position, 'pair')} ({evidence}){following}{retried}"
    if d.verdict == "undecided":
        capped = (test.max_pairs or test.declared_pairs) < test.declared_pairs
        where = f"at the cap of {test.max_pairs}" if capped else "after all"
        return f"undecided {where} pairs, at {at} ({evidence})"
    if d.verdict == "futile":
        return (
            f"futile: neither verdict at {at} had a fair chance left after {count_text(d.position, 'pair')} "
            f"({evidence}); "
            f"{count_text(test.episodes_saved, 'episode')} saved"
        )
    return (
        f"{d.verdict} at {at} after {count_text(d.position, 'pair')} in the declared order of {test.declared_pairs} "
        f"({evidence}){against}; {count_text(test.episodes_saved, 'episode')} saved"
    )
