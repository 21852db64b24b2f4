"""Success and action error against bits, of a run with one arm for every recipe and number of bits.

python examples/cliff.py logs/cliff --to docs/cliff.png

(`qlibero run configs/experiments/cliff.yaml` makes such a run.) Round-to-nearest is one recipe, whatever else there is
the other; a recipe and a layout are a line. The action error is the one on held-out demonstrations that each arm's
meta.json holds, measured before any rollout.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from qlibero.errors import UserError  # noqa: E402
from qlibero.results.arm_meta import ActionError  # noqa: E402
from qlibero.results.pairing import Arm, collect_arms  # noqa: E402
from qlibero.results.runs import read_run  # noqa: E402
from qlibero.results.summary import counts  # noqa: E402
from qlibero.stats.proportions import wilson  # noqa: E402

COLOURS = {"rtn": "#c8591a", "best": "#0a6fb8"}
LINES = {"llm": "-", "llm+expert": "--"}
MARKS = {"llm": "o", "llm+expert": "s"}
SPREAD = 0.09  # arms of one number of bits stand beside each other


@dataclass(frozen=True)
class Point:
    """An arm: `formats` is its place on the axis (`W4A8`), `error` its action error with 95 % interval, if known."""

    formats: str
    recipe: str
    layout: str
    rate: float
    rate95: tuple[float, float]
    error: ActionError | None


def point(arm: Arm) -> Point | None:
    """None for an arm that is not quantized or has not finished an episode."""
    quant, (won, run, _) = arm.meta.quant, counts(list(arm.records.values()))
    if not quant or not run:
        return None
    precision = f"W{quant.weight_bits}A{quant.activation_bits}"
    formats = precision if quant.number_format == "int" else f"{quant.number_format}\n{precision}"
    recipe = "rtn" if (quant.method, quant.rounding) == ("rtn", "nearest") else "best"
    return Point(formats, recipe, quant.layout or "", won / run, wilson(won, run), arm.meta.action_error)


def places(points: list[Point]) -> list[str]:
    """The axis: integers at 8-bit activations from the most bits to the fewest, then what else there is."""
    found = list(dict.fromkeys(p.formats for p in points))
    falling = sorted((f for f in found if f.startswith("W") and f.endswith("A8")), key=lambda f: -int(f[1]))
    return falling + sorted(set(found) - set(falling), reverse=True)


def draw(run_dir: Path, to: Path) -> None:
    """Two panels over one axis of formats. UserError for a run without quantized arms or a baseline."""
    arms = collect_arms([read_run(run_dir)])
    points = [p for arm in arms.values() if (p := point(arm)) is not None]
    if not points or "baseline" not in arms:
        raise UserError(f"{run_dir}: needs a finished baseline and quantized arms; it has {', '.join(arms) or 'none'}")
    axis = places(points)
    figure, (success, error) = plt.subplots(2, 1, figsize=(8, 6.4), sharex=True, layout="constrained")
    lines: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for p in points:
        lines[p.recipe, p.layout].append(p)
    for number, ((recipe, layout), of) in enumerate(sorted(lines.items(), reverse=True)):
        shift = SPREAD * (number - (len(lines) - 1) / 2)
        label = f"{'round to nearest' if recipe == 'rtn' else 'auto + gptq'}, {layout}"
        _line(success, of, axis, shift, label, {p.formats: (100 * p.rate, *(100 * x for x in p.rate95)) for p in of})
        measured = {p.formats: (p.error.arm, *(p.error.arm95 or (p.error.arm,) * 2)) for p in of if p.error}
        _line(error, of, axis, shift, label, measured)
    _reference(success, arms)
    integers = sum(f.startswith("W") and f.endswith("A8") for f in axis)
    for panel in (success, error):
        panel.grid(axis="y", alpha=0.3)
        panel.axvline(integers - 0.5, color="#999", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    success.set_ylabel("success, %")
    success.set_ylim(-3, 103)
    error.set_yscale("log")
    error.set_ylabel("change of the arm's actions,\nmedian on held-out demonstrations")
    error.set_xticks(range(len(axis)), axis)
    success.legend(fontsize=8, loc="lower left", frameon=False)
    episodes = max(len(arm.records) for arm in arms.values())
    suite = next(iter(arms["baseline"].records)).suite
    success.set_title(f"{suite}, {episodes} episodes an arm; bars are 95 % intervals", fontsize=10)
    figure.savefig(to, dpi=120)
    plt.close(figure)


def _line(panel: Axes, of: list[Point], axis: list[str], shift: float, label: str, found: dict[str, Any]) -> None:
    """Marks with intervals; integers at 8-bit activations are joined, other formats stand alone."""
    recipe, layout = of[0].recipe, of[0].layout
    colour, mark, line = COLOURS[recipe], MARKS.get(layout, "^"), LINES.get(layout, ":")
    joined = [f for f in axis if f in found and f.startswith("W") and f.endswith("A8")]
    panel.plot([axis.index(f) + shift for f in joined], [found[f][0] for f in joined], line, color=colour)
    for name, (middle, low, high) in found.items():
        x = axis.index(name) + shift
        panel.plot([x, x], [low, high], color=colour, alpha=0.4, linewidth=3)
        panel.plot([x], [middle], mark, color=colour, markersize=5)
    panel.plot([], [], f"{mark}{line}", color=colour, label=label)


def _reference(panel: Axes, arms: dict[str, Arm]) -> None:
    """The unquantized policy's interval, and its A/A replicates'."""
    won, run, _ = counts(list(arms["baseline"].records.values()))
    low, high = wilson(won, run)
    panel.axhspan(100 * low, 100 * high, color="#888", alpha=0.18, linewidth=0)
    panel.axhline(100 * won / run, color="#444", linewidth=1, label="full precision")
    again = [counts(list(arm.records.values())) for arm in arms.values() if arm.is_control]
    for k, n, _ in again:
        panel.axhline(100 * k / n, color="#444", linewidth=0.7, linestyle=":")
    if again:
        panel.plot([], [], ":", color="#444", linewidth=0.7, label="full precision again (A/A)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--to", type=Path, required=True, help="the picture")
    arguments = parser.parse_args()
    draw(arguments.run, arguments.to)
