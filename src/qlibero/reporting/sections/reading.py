"""What the words of the page mean."""

from __future__ import annotations

from qlibero.reporting.markup import Markup, el, join
from qlibero.reporting.material import Material
from qlibero.reporting.sections.parts import section


def reading(m: Material) -> Markup:
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
            f"The whole interval lies below {at}. Otherwise the result is inconclusive, and the power line says why.",
        ),
        (
            "after Holm",
            "The more arms are tested, the likelier one passes by luck. Holm's adjustment over all arms × suites of a "
            "comparison keeps the chance of any such pass at 2.5 %; intervals are shown unadjusted.",
        ),
        (
            "McNemar",
            "Exact two-sided test that breaking and repairing are equally likely, Holm-adjusted over the same family.",
        ),
        (
            "tasks like these",
            "Mean of the per-task differences ± t·s/√tasks. It asks how Δ would come out on other tasks of this kind, "
            "as if these had been drawn at random, and knows only as many values as there are tasks. "
            "With few flips spread evenly it is often narrower than Tango: "
            "that is no stronger evidence, and no verdict uses it.",
        ),
        (
            "A/A, noise floor",
            "The reference run again in batches of another size. "
            "What it flips is rounding noise that no kernel is to blame for. "
            "It is not under test: it has no verdict, and its latency is that of its batches.",
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
