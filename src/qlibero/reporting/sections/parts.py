"""What every section of the report is built from: headings, tables, legends."""

from __future__ import annotations

import re
from typing import Any

from qlibero.reporting.markup import Markup, el
from qlibero.reporting.material import Material

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


def numbers(
    title: str, head: list[str], rows: list[list[Any]], sortable: bool = False, open_: bool = False
) -> Markup:
    """The figures of a chart as a table, folded away."""
    return el("details", el("summary", title), table(head, rows, sortable), class_="numbers", open=open_)


def table(head: list[str], rows: list[list[Any]], sortable: bool = False, caption: str = "") -> Markup:
    def heading(i: int, text: str) -> Markup:
        return el("th", el("button", text, type="button") if sortable else text, scope="col", data_column=i)

    body = [el("tr", el("th", row[0], scope="row"), [el("td", cell) for cell in row[1:]]) for row in rows]
    inside = el(
        "table",
        el("caption", caption) if caption else None,
        el("thead", el("tr", [heading(i, text) for i, text in enumerate(head)])),
        el("tbody", body),
        class_="sortable" if sortable else None,
    )
    return el("div", inside, class_="scroll", tabindex="0", role="region", aria_label=caption or head[0])


def swatch(m: Material, arm: str) -> Markup:
    return el("span", class_=f"swatch {m.colour(arm)}", aria_hidden="true")


def legend(m: Material, arms: list[str] | None = None) -> Markup:
    names = list(m.arms) if arms is None else arms
    return el("ul", [el("li", swatch(m, n), m.arms[n].label) for n in names], class_="legend")


def unbroken(text: str) -> str:
    """No line break inside an interval or between a number and its unit."""
    text = re.sub(r"\[[^\]]*\]", lambda found: found[0].replace(" ", NBSP), text)
    return re.sub(r"(?<=[\d)]) (?=(?:pp|%|pairs|×)\b|%)|(?<=Δ) | (?=\[)", NBSP, text)
