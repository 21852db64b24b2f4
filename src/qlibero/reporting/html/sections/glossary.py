"""What the words of the page mean."""

from __future__ import annotations

from qlibero.registry import SectionPlugin
from qlibero.reporting.html.markup import Markup, el, join
from qlibero.reporting.html.report_data import ReportData
from qlibero.reporting.html.sections.parts import section

PLUGIN = SectionPlugin("reading", "how to read the page", provides="reading", order=900)


def reading(m: ReportData) -> Markup:
    at = f"{m.margins}, the margin" if m.compared else "the margin"
    terms = [
        (
            "pair",
            "The same suite, task, initial state and seed in both arms, "
            "with equal scene fingerprints and the same policy noise.",
        ),
        (
            "broken, repaired",
            "The reference succeeds and the arm fails; the reverse. "
            "Everything the comparison knows is in these two counts.",
        ),
        ("Δ", "(repaired − broken) / pairs, in percentage points. Negative: the arm loses."),
        (
            "non-inferior",
            f"The whole 95 % Tango interval of Δ lies above {at}. “Not significant” is not non-inferior.",
        ),
        (
            "inferior",
            f"The whole interval lies below {at}.",
        ),
        (
            "worse",
            "A loss is proven (interval below 0 and p ≤ 0.05), but whether it exceeds the margin is open.",
        ),
        (
            "inconclusive",
            "Neither; the power line says what these pairs could have found. “(errors)”: counting the errors against "
            "the arm would change the verdict. “(conflict)”: one episode was recorded twice with different results. "
            "“(few pairs)”: fewer than 20. “(futile)”: the test under `stop:` gave up.",
        ),
        (
            "interim",
            "Planned episodes are missing. Stopping a run at the first good look would call up to 12 % of "
            "inferior arms non-inferior, so there is no verdict before all have run (or under `stop:`).",
        ),
        (
            "after Holm",
            "The more arms are tested, the likelier one passes by luck. Holm's adjustment over all claims of a "
            "comparison (one an arm, or arms × suites with `primary: per-suite`) keeps the chance of any such pass at "
            "2.5 %; intervals are shown unadjusted.",
        ),
        (
            "McNemar",
            "Exact two-sided test that breaking and repairing are equally likely, Holm-adjusted over the same family.",
        ),
        (
            "new tasks",
            "How Δ would come out on other tasks of this kind, as if these had been drawn at random: whole tasks are "
            "the units, so ten tasks are ten values. Verdicts answer the declared `estimand`; by default, new initial "
            "states of these tasks.",
        ),
        (
            "A/A, noise floor",
            "The reference run again, its sums in another order. "
            "What it flips is rounding noise that no kernel is to blame for. "
            "It is not under test: it has no verdict, and its latency is that of its batches. Its true difference is "
            "0, so the grey band is centred there: as wide as 95 % of reruns spread. Whether an arm flips more than "
            "A/A does is tested by itself, exactly.",
        ),
        (
            "sequential test",
            "Under `stop:` an arm ends when it is decided. Its interval holds at all looks at once "
            "and agrees with the verdict.",
        ),
        (
            "sharper, pooled",
            "Δ against the mean of the reference and its A/A arms, whose own luck averages out: more power, no further "
            "rollouts. Verdicts use it only with `compare_with: pooled`.",
        ),
        (
            "speed",
            "Per scene the ratio of median call times at equal batch size; its interval is a bootstrap over scenes. "
            "“As fast” when it lies within ±2 %, “unclear” when it holds 1 and does not. Backends that imitate a "
            "kernel's integers (fake) make no claim.",
        ),
        (
            "beyond A/A",
            "A shift of execution quality counts when the arm differs from the reference and, in the same direction, "
            "from the reference run again: on few scenes the reference differs from itself, too.",
        ),
        (
            "where episodes part",
            "1 cm apart: the two grippers are more than 1 cm from each other at the same step. "
            "Opposed grip: one opens, the other closes. "
            "Actions beyond noise: arm motions differ by more than the 99th percentile of A/A "
            "in its first executed chunk, where both runs answer the same observation; "
            "the gripper's command is left out of it.",
        ),
        (
            "error",
            "A simulator or transport failed. Neither success nor failure; "
            "a verdict that errors could change is inconclusive.",
        ),
        (
            "jerk, path, flips",
            "Mean third difference of the gripper position × 20³ m/s³ up to the pair's earlier end; "
            "metres travelled; open-close changes.",
        ),
    ]
    return section(
        "reading",
        "How to read this",
        el("dl", [join(el("dt", t), el("dd", d)) for t, d in terms], class_="terms"),
    )
