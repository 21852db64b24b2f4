"""Paired differences as a forest plot, with every number behind them."""

from __future__ import annotations

from typing import Any

from qlibero.reporting import charts
from qlibero.reporting.markup import Markup, el, join
from qlibero.reporting.material import Material
from qlibero.reporting.sections.parts import numbers, section, swatch
from qlibero.results.phrases import margin_text, p_text, points


def difference_scale(m: Material) -> charts.Scale:
    ends = [
        x for r in m.compared.values() if r["pairs"] for x in (*r["tango95"], *(r["clusters"]["t95"] or ()))
    ]
    return charts.scale_over(ends or [0.0], include=(-m.margin, 0.0, m.margin))


def difference(
    m: Material, name: str, row: dict[str, Any], scale: charts.Scale, clusters: bool = True
) -> Markup:
    low, high = row["tango95"]
    t95 = row["clusters"]["t95"] if clusters and "clusters" in row else None
    floor = m.comparison["noise_floor"]
    label = f"Δ {points(row['delta'])} pp, 95 % interval {points(low)} to {points(high)} pp, margin {margin_text(m.margin)}"
    return charts.track(
        charts.interval(scale, *floor["tango95"], kind="floor") if floor and name != floor["arm"] else None,
        charts.interval(scale, scale.low, -m.margin, kind="beyond"),
        charts.mark(scale, -m.margin, "margin"),
        charts.mark(scale, 0, "zero"),
        charts.interval(scale, *t95, kind="wide", colour=m.colour(name)) if t95 else None,
        charts.interval(scale, low, high, "ci", m.colour(name)),
        charts.mark(scale, row["delta"], "dot", m.colour(name)),
        label=label,
        class_="track tall",
    )


def differences(m: Material) -> Markup | None:
    if not m.comparison:
        return None
    rows, figures = [], []
    scale = difference_scale(m)
    for name, r in m.compared.items():
        if not r["pairs"]:
            continue
        suites = r["suites"] if len(r["suites"]) > 1 else {}
        for title, row in (("", r), *suites.items()):
            label = join(swatch(m, name), r["label"], el("small", title) if title else None)
            low, high = row["tango95"]
            count = el("span", f"{points(row['delta'])} [{points(low)}, {points(high)}]", class_="count")
            rows.append(
                el(
                    "div",
                    el("h3", label),
                    el("div", difference(m, name, row, scale), count, class_="lane"),
                    class_="row",
                )
            )
        for suite, row in r["suites"].items():
            figures.append(
                [
                    r["label"],
                    suite,
                    row["pairs"],
                    row["both_succeed"],
                    row["broken"],
                    row["repaired"],
                    row["both_fail"],
                    points(row["delta"], 2),
                    _pp(row["tango95"]),
                    _pp(row["newcombe95"]),
                    p_text(row["mcnemar_p"]),
                    p_text(row["mcnemar_p_holm"]) if "mcnemar_p_holm" in row else "control",
                    p_text(row["noninferiority_p"]),
                    _pp(row["clusters"]["t95"]),
                    _pp(row["clusters"]["bootstrap95"]),
                    row["verdict"],
                ]
            )
    head = [
        "arm",
        "suite",
        "pairs",
        "both succeed",
        "broken",
        "repaired",
        "both fail",
        "Δ pp",
        "Tango 95 %",
        "Newcombe 95 %",
        "McNemar",
        "Holm",
        "non-inferiority",
        "tasks: t 95 %",
        "tasks: bootstrap 95 %",
        "verdict",
    ]
    tasks = [
        [
            r["label"],
            f"{t['suite']} {t['task']}",
            t["pairs"],
            t["broken"],
            t["repaired"],
            points(t["delta"]),
            _pp(t["tango95"]),
        ]
        for r in m.compared.values()
        for t in r["tasks"]
    ]
    return section(
        "differences",
        "Paired differences",
        el(
            "div",
            rows,
            el(
                "div",
                el("span"),
                charts.axis(scale, "Δ success, percentage points", _tick),
                class_="row foot",
            ),
            class_="rows",
        ),
        numbers("2×2 tables, intervals and p-values", head, figures),
        numbers(
            "By task (descriptive)",
            ["arm", "task", "pairs", "broken", "repaired", "Δ pp", "Tango 95 %"],
            tasks,
            sortable=True,
        ),
        lead=f"Arm minus {m.comparison['reference_label']} on the same episodes. Thick bars: 95 % Tango interval for these tasks (unadjusted; "
        "p-values are Holm-adjusted over arms × suites in the table). Thin bars: for tasks like these (whole tasks as units). "
        f"Dashed line: the margin, {margin_text(m.margin)}."
        + (" Grey band: the noise floor." if m.comparison["noise_floor"] else ""),
    )


def _tick(delta: float) -> str:
    return (
        "0" if abs(delta) < 1e-9 else points(delta, 0 if abs(100 * delta - round(100 * delta)) < 1e-6 else 1)
    )


def _pp(interval: list[float] | None) -> str:
    return f"[{points(interval[0], 2)}, {points(interval[1], 2)}]" if interval else "–"
