"""Chart parts that stay readable at any width: marks are placed in percent, text is HTML at its own size.

Scaled SVG text is unreadable on a phone. So a chart here is a `Scale` (data → percent), HTML marks positioned
by it, and, for curves only, an SVG without text that stretches with the page while its strokes keep their
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from qlibero.reporting.html.markup import Markup, el


@dataclass(frozen=True)
class Scale:
    """Data to percent along an axis, with round ticks."""

    low: float
    high: float

    def __call__(self, x: float) -> float:
        """Percent of the axis, kept within it."""
        return round(100 * min(max((x - self.low) / (self.high - self.low), 0), 1), 2)

    def ticks(self, about: int = 5) -> list[float]:
        step = 10 ** math.floor(math.log10((self.high - self.low) / about))
        step *= min((1, 2, 5, 10), key=lambda m: abs((self.high - self.low) / (step * m) - about))
        first = math.ceil(self.low / step - 1e-9)
        return [round(k * step, 10) for k in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def edges(self, bins: int) -> np.ndarray:
        """Borders of bins of equal width on the page."""
        return np.linspace(self.low, self.high, bins + 1)


@dataclass(frozen=True)
class LogScale(Scale):
    """Equal ratios are equally far apart: for durations, whose medians and stragglers differ by a factor of fifty."""

    def __call__(self, x: float) -> float:
        share = math.log(max(x, self.low) / self.low) / math.log(self.high / self.low)
        return round(100 * min(share, 1), 2)

    def ticks(self, about: int = 7) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
            if len(found) <= about:
                break
        return found if len(found) > 2 else super().ticks(about)  # within a factor of three or so, plain steps

    def edges(self, bins: int) -> np.ndarray:
        return np.geomspace(self.low, self.high, bins + 1)


def scale_over(values: Sequence[float], include: Sequence[float] = (), room: float = 0.06) -> Scale:
    """A scale that holds all values and `include`, with some room at both ends."""
    every = [*values, *include]
    low, high = min(every), max(every)
    pad = room * ((high - low) or abs(high) or 1)
    return Scale(low - pad, high + pad)


def duration_scale(values: Sequence[np.ndarray], high: float) -> LogScale:
    """A logarithmic axis from the quickest thousandth to the percentile `high` of the slowest, in any of `values`."""
    low = min(float(np.percentile(v, 0.1)) for v in values)
    return LogScale(max(low * 0.9, 1e-3), max(float(np.percentile(v, high)) for v in values) * 1.1)


def success_scale(lows: Sequence[float]) -> Scale:
    """Success axis up to 100 %, from the tens below the lowest interval end: differences near 100 % must be seen."""
    return Scale(max(0.0, math.floor(10 * min(lows, default=0) - 1e-9) / 10), 1.0)


def axis(scale: Scale, label: str, form: Callable[[float], str], about: int = 5) -> Markup:
    """Tick labels under a track, and what they measure."""
    ticks = [el("span", form(t), style=f"left:{scale(t)}%") for t in scale.ticks(about)]
    return el(
        "div",
        el("div", *ticks, class_="ticks"),
        el("div", label, class_="axis-label"),
        class_="axis",
        aria_hidden="true",
    )


def grid_lines(scale: Scale, about: int = 5) -> list[Markup]:
    return [el("i", class_="grid", style=f"left:{scale(t)}%") for t in scale.ticks(about)]


def interval(scale: Scale, low: float, high: float, kind: str = "ci", colour: str = "") -> Markup:
    left, right = scale(low), scale(high)
    return el("i", class_=f"{kind} {colour}".strip(), style=f"left:{left}%;width:{round(right - left, 2)}%")


def mark(scale: Scale, x: float, kind: str = "dot", colour: str = "") -> Markup:
    return el("i", class_=f"{kind} {colour}".strip(), style=f"left:{scale(x)}%")


def xy(labels: Iterable[tuple[float, str]], canvas: Markup, foot: Markup) -> Markup:
    """A chart in two dimensions: labels at the left, each so many percent from the top, and an axis at its foot."""
    beside = [el("span", text, style=f"top:{top}%") for top, text in labels]
    return el("div", el("div", beside, class_="ylabels", aria_hidden="true"), canvas, foot, class_="xy")


def track(*marks: Markup | None, label: str, class_: str = "track") -> Markup:
    """A strip with marks on it. `label` is what a screen reader says instead."""
    return el("div", *marks, class_=class_, role="img", aria_label=label)


def curve(points: Sequence[tuple[float, float]], colour: str, filled: bool = False) -> Markup:
    """A line (or area down to 100) through percent coordinates, y downwards."""
    d = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    if filled:
        d += f"L{points[-1][0]:g} 100L{points[0][0]:g} 100Z"
    return el("path", d=d, class_=f"{'area' if filled else 'line'} {colour}", vector_effect="non-scaling-stroke")


def plot(*children: Markup, label: str, height: int) -> Markup:
    """A stretching SVG in percent coordinates, without text."""
    return el(
        "svg",
        *children,
        viewBox="0 0 100 100",
        preserveAspectRatio="none",
        class_="plot",
        role="img",
        aria_label=label,
        style=f"height:{height}px",
    )


def density(
    values: np.ndarray, scale: Scale, bins: int = 70, weights: np.ndarray | None = None
) -> list[tuple[float, float]]:
    """Outline of a histogram over the scale, peak at the top; the honest picture of a latency distribution."""
    heights, edges = np.histogram(values, bins=scale.edges(bins), weights=weights)
    if heights.max() == 0:
        return [(0.0, 100.0), (100.0, 100.0)]
    tops = 100 - 96 * heights / heights.max()
    points = [(scale(float(edges[0])), 100.0)]
    for left, right, top in zip(edges[:-1], edges[1:], tops, strict=True):
        points += [(scale(float(left)), round(float(top), 1)), (scale(float(right)), round(float(top), 1))]
    return [*points, (scale(float(edges[-1])), 100.0)]


def success_over_time(success_steps: Sequence[int], episodes: int, scale: Scale) -> list[tuple[float, float]]:
    """Share of episodes that have succeeded by each step; failures never do, so it ends at the success rate."""
    points, done = [(scale(scale.low), 100.0)], 0
    for step in sorted(success_steps):
        points.append((scale(step), round(100 - 100 * done / episodes, 2)))
        done += 1
        points.append((scale(step), round(100 - 100 * done / episodes, 2)))
    return [*points, (100.0, round(100 - 100 * done / episodes, 2))]
