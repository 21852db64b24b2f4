"""How arms move: success over time, execution quality, where episodes part."""

from __future__ import annotations

from qlibero.registry import SectionPlugin
from qlibero.reporting.execution_text import QUALITY, shift_text
from qlibero.reporting.html import charts
from qlibero.reporting.html.markup import Markup, el, join
from qlibero.reporting.html.report_data import ReportData
from qlibero.reporting.html.sections.parts import legend, named, section, table
from qlibero.results.comparison import ArmComparison
from qlibero.results.execution import Divergence, Shift

PLUGIN = SectionPlugin("execution", "how arms move, and where episodes part", provides="execution", order=60)


def execution(m: ReportData) -> Markup | None:
    horizon = max((r.steps for name in m.arms for r in m.records(name)), default=0)
    if not horizon:
        return None
    scale = charts.Scale(0, horizon)
    curves = []
    for name in m.arms:
        records = [r for r in m.records(name) if r.outcome != "error"]
        if records:
            steps = [r.success_step for r in records if r.succeeded and r.success_step is not None]
            curves.append(charts.curve(charts.success_over_time(steps, len(records), scale), m.colour(name)))
    chart = charts.xy(
        [(y, f"{100 - y} %") for y in (0, 25, 50, 75, 100)],
        el(
            "div",
            charts.plot(*curves, label="Share of episodes that have succeeded by each step, per arm", height=240),
            *charts.grid_lines(scale),
            class_="canvas",
        ),
        charts.axis(scale, "control steps (20 per second)", lambda t: f"{t:g}"),
    )
    return section(
        "execution",
        "Execution",
        legend(m),
        chart,
        _quality(m),
        _parting(m),
        lead="How soon episodes succeed: a curve ends at its arm's success rate. "
        "Movement often changes before success does.",
    )


def _quality(m: ReportData) -> Markup | None:
    rows = [
        [named(m, name), title, *_shifted(r, shift)]
        for name, r in m.compared.items()
        for measure, title in QUALITY.items()
        if (shift := r.quality[measure])
    ]
    if not rows:
        return None
    caption = (
        "Paired shifts with 95 % t intervals, unadjusted. “Beyond A/A”: the arm differs from the reference and, in the "
        "same direction, from the reference run again. Time to success counts a failure as the longest episode"
    )
    head = ["arm", "measure", "pairs", "reference → arm", "shift", "beyond A/A"]
    return join(el("h3", "How it moves"), table(head, rows, caption=caption, stacked=True, sortable=True))


def _shifted(arm: ArmComparison, shift: Shift) -> list[str | int | Markup]:
    beyond = "–" if arm.control or shift.beyond_floor is None else "yes" if shift.beyond_floor else "no"
    between = el("span", f"{shift.reference:.3g} → {shift.arm:.3g}", class_="nobr")
    return [shift.pairs, between, el("span", shift_text(shift), class_="nobr"), beyond]


def _parting(m: ReportData) -> Markup | None:
    """Where the two robots of a pair stop doing the same. The control shows how soon rounding alone gets there."""
    rows = [[named(m, name), *_parted(r.divergence)] for name, r in m.compared.items() if r.divergence.compared]
    if not rows:
        return None
    head = ["arm", "action error on equal observations", "grippers 1 cm apart", "opposed grip"]
    found = {r.label: r.divergence for r in m.compared.values() if r.divergence.compared}
    noise = dict.fromkeys(f"{d.threshold:.2g}, {d.threshold_from}" for d in found.values())
    beyond_what = next(iter(noise)) if len(noise) == 1 else "the noise of its own cell's A/A arm"
    beyond = "; ".join(f"{label}: {_from(d.diverged, d.compared, d.median_step)}" for label, d in found.items())
    return join(
        el("h3", "Where episodes part"),
        table(head, rows, caption="Median over episodes, and in how many it happens", stacked=True),
        el(
            "p",
            "Action error: largest difference of an arm action from the reference's in the first executed chunk, "
            "where both saw the same. Opposed grip: one opens, the other closes. "
            "Once two runs differ by rounding, feedback multiplies it, so A/A pairs part too: "
            "an arm is told by how much sooner and more often it does.",
            class_="fine",
        ),
        el(
            "p",
            f"Actions beyond noise (arm motion differs by more than {beyond_what}): {beyond}.",
            class_="fine",
        ),
    )


def _parted(d: Divergence) -> list[str]:
    return [
        "–" if d.first_chunk_difference is None else f"{d.first_chunk_difference:.2g}",
        _from(d.visibly_diverged, d.compared, d.median_visible_step),
        _from(d.gripper_diverged, d.compared, d.median_gripper_step),
    ]


def _from(parted: int, compared: int, step: float | None) -> str:
    return f"step {step:.0f}, {parted} of {compared}" if step is not None else f"none of {compared}"
