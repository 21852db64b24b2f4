"""Whether an arm's open-loop action error foretells what its episodes do."""

from __future__ import annotations

from dataclasses import dataclass

from qlibero.registry import SectionPlugin
from qlibero.reporting.html import charts
from qlibero.reporting.html.markup import Markup, el, join
from qlibero.reporting.html.report_data import ReportData
from qlibero.reporting.html.sections.parts import legend, named, section, table
from qlibero.results.arm_meta import ActionError, ArmMeta
from qlibero.results.comparison import ArmComparison
from qlibero.stats.proportions import Interval
from qlibero.stats.ranks import rank_correlation

PLUGIN = SectionPlugin("prediction", "whether action errors foretell flips", provides="prediction", order=45)

FEWEST = 3  # arms of which a correlation says something


@dataclass(frozen=True)
class _Foretold:
    """`error` on demonstrations, before any rollout, and what the ledger says."""

    error: ActionError | None
    result: ArmComparison

    @property
    def flipped(self) -> float:
        table = self.result.table
        return (table.broken + table.repaired) / table.pairs

    @property
    def first_chunk(self) -> float | None:
        return self.result.divergence.first_chunk_difference


def prediction(m: ReportData) -> Markup | None:
    """Action error against flipped episodes, an arm a dot, and how well the error of an episode foretells its flip."""
    found = {
        name: _Foretold(_on_demonstrations(m.arms[name].meta, result), result)
        for name, result in m.compared.items()
        if not result.control and result.table.pairs
    }
    found = {name: of for name, of in found.items() if of.error or of.first_chunk is not None}
    if not found:
        return None
    rows = [
        [
            named(m, name),
            "–" if of.error is None else _between(of.error.arm, of.error.arm95, 2),
            "–" if of.first_chunk is None else f"{of.first_chunk:.2g}",
            f"{of.result.table.broken + of.result.table.repaired} of {of.result.table.pairs}",
            "–" if (area := of.result.divergence.flip_auc) is None
            else _between(area, of.result.divergence.flip_auc95, 2),
        ]
        for name, of in found.items()
    ]  # fmt: skip
    head = ["arm", "error on demonstrations", "error in the first chunk", "flipped", "flips foretold, AUC"]
    return section(
        "prediction",
        "Did the action error foretell it?",
        _chart(m, found),
        table(head, rows, sortable=True, stacked=True),
        el(
            "p",
            "Error on demonstrations: before any rollout, median root mean square change of the arm's six numbers. "
            "Error in the first chunk: largest change where both arms answer the same first observation, median over "
            "episodes. AUC: probability that it is greater in an episode that flipped than in one that did not, "
            "with DeLong's 95 % interval; 0.5 tells nothing, and rounding alone flips episodes too.",
            class_="fine",
        ),
        lead=_lead(found),
    )


def _on_demonstrations(meta: ArmMeta, result: ArmComparison) -> ActionError | None:
    """The error that calibration measured, which is that of quantizing alone: of an arm that differs in more from its
    reference (flow steps, weights) it is no error of the arm. How late answers come changes none."""
    other = [name for name, sides in result.unlike.items() if name != "latency_steps" and None not in sides]
    return None if other else meta.action_error


def _points(found: dict[str, _Foretold]) -> tuple[str, dict[str, tuple[float, float]]]:
    """Which error stands for the arms, and (error, flipped share) of each that has it: one measure for all."""
    on_demonstrations = all(of.error for of in found.values())
    what = "on demonstrations, before any rollout" if on_demonstrations else "in the first executed chunk"
    errors = {name: of.error.arm if on_demonstrations and of.error else of.first_chunk for name, of in found.items()}
    return what, {name: (x, found[name].flipped) for name, x in errors.items() if x}


def _lead(found: dict[str, _Foretold]) -> str:
    what, points = _points(found)
    rho = rank_correlation(*zip(*points.values(), strict=True)) if len(points) >= FEWEST else None
    told = [of.result.divergence.flip_auc95 for of in found.values() if of.result.divergence.flip_auc95]
    sure = sum(low > 0.5 for low, _ in told)
    between = "" if rho is None else (
        f"Between arms: the order of {len(points)} arms by their error {what} and by their flips has rank "
        f"correlation {rho:+.2f}. "
    )  # fmt: skip
    within = "" if not told else (
        f"Within an arm: an episode's first error foretells its flip better than chance in {sure} of {len(told)} arms."
    )  # fmt: skip
    return between + within or "Too few arms and flips to say."


def _chart(m: ReportData, found: dict[str, _Foretold]) -> Markup | None:
    what, points = _points(found)
    if len(points) < FEWEST:
        return None
    errors = [x for x, _ in points.values()]
    x = charts.LogScale(min(errors) / 1.3, max(errors) * 1.3)
    floors = {m.floor_of(name) for name in points}
    floor = next(iter(floors)) if len(floors) == 1 else None
    most = max([share for _, share in points.values()] + ([floor.discordance] if floor else []))
    y = charts.Scale(0, 1.08 * most or 0.1)  # nothing flipped: an axis all the same
    marks = [el("i", class_="band", style=f"bottom:0;height:{y(floor.discordance)}%")] if floor else []
    marks += [
        el("i", class_=f"dot {m.colour(name)}", style=f"left:{x(error)}%;bottom:{y(share)}%", title=m.arms[name].label)
        for name, (error, share) in points.items()
    ]
    text = "; ".join(f"{m.arms[name].label}: {100 * s:.1f} % at {e:.2g}" for name, (e, s) in points.items())
    chart = charts.xy(
        [(100 - y(t), f"{100 * t:g} %") for t in y.ticks()],
        el("div", *charts.grid_lines(x), *marks, class_="canvas fixed", role="img", aria_label=text),
        charts.axis(x, f"action error {what}; upwards: flipped pairs, grey: those that A/A flips", lambda t: f"{t:g}"),
    )
    return join(chart, legend(m, list(points), "legend under"))


def _between(value: float, interval: Interval | None, digits: int) -> Markup:
    text = f"{value:.{digits}g}"
    if interval:
        text += f" [{interval[0]:.{digits}g}, {interval[1]:.{digits}g}]"
    return el("span", text, class_="nobr")
