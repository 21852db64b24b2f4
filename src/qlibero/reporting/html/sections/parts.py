"""What every section of the report is built from: headings, tables, legends."""

from __future__ import annotations

import re
from typing import Any

from qlibero.reporting.html.markup import Markup, el, join
from qlibero.reporting.html.report_data import ReportData

NBSP = "\u00a0"


def section(id_: str, title: str, *children: Any, lead: Any = None) -> Markup:
    """A part of the page; its id, capitalised, names it in the navigation."""
    return el(
        "section",
        el("h2", title),
        el("p", lead, class_="lead") if lead else None,
        *children,
        id=id_,
        aria_label=title,
    )


def numbers(title: str, head: list[str], rows: list[list[Any]], open_: bool = False, **how: Any) -> Markup:
    """The figures of a chart as a table, folded away. `how`: what `table` takes."""
    return el("details", el("summary", title), table(head, rows, **how), class_="numbers", open=open_)


def table(
    head: list[str], rows: list[list[Any]], sortable: bool = False, caption: str = "", stacked: bool = False
) -> Markup:
    """A table that scrolls sideways where it must, with a shadow where there is more. `stacked`: on a phone every row
    becomes a block of "heading value" lines, for tables whose rows are read one by one.

    The caption stands before the scrolling box: inside it would be cut where the table is.
    """

    def heading(text: str) -> Markup:
        return el("th", el("button", text, type="button") if sortable else text, scope="col")

    body = [
        el(
            "tr",
            el("th", row[0], scope="row"),
            [
                el("td", cell, data_label=name if stacked else None)
                for name, cell in zip(head[1:], row[1:], strict=True)
            ],
        )
        for row in rows
    ]
    inside = el(
        "table",
        el("thead", el("tr", map(heading, head))),
        el("tbody", body),
        class_=" ".join(["sortable"] * sortable + ["stacked"] * stacked) or None,
    )
    return join(
        el("p", caption, class_="caption") if caption else None,
        el("div", inside, class_="scroll", tabindex="0", role="region", aria_label=caption or head[0]),
    )


def rows(*children: Any, axis: Markup | None = None, wide: bool = False) -> Markup:
    """Rows of a chart over one axis. `wide`: the counts beside the tracks are whole phrases."""
    foot = el("div", el("span"), axis, class_="row foot") if axis else None
    return el("div", *children, foot, class_="rows wide-counts" if wide else "rows")


def row(title: Any, *lanes: Markup, class_: str = "row") -> Markup:
    return el("div", el("h3", title), el("div", lanes, class_="lanes"), class_=class_)


def lane(strip: Markup, count: Any, title: str | None = None) -> Markup:
    return el("div", strip, el("span", count, class_="count", title=title), class_="lane")


def swatch(m: ReportData, arm: str) -> Markup:
    return el("span", class_=f"swatch {m.colour(arm)}", aria_hidden="true")


def named(m: ReportData, arm: str, *more: Any) -> Markup:
    return join(swatch(m, arm), m.arms[arm].label, *more)


def legend(m: ReportData, arms: list[str] | None = None, class_: str = "legend") -> Markup:
    names = list(m.arms) if arms is None else arms
    return el("ul", [el("li", named(m, n)) for n in names], class_=class_)


def unbroken(text: str) -> str:
    """No line break inside an interval or between a number and its unit."""
    text = re.sub(r"\[[^\]]*\]", lambda found: found[0].replace(" ", NBSP), text)
    return re.sub(r"(?<=[\d)]) (?=(?:pp|%|pairs|×)\b|%)|(?<=Δ) | (?=\[)", NBSP, text)
