"""Tables for a terminal whose columns of numbers never fold, under headings that may be wider than they are."""

from __future__ import annotations

import re
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from qlibero.quoting import visible
from qlibero.results.paired_outcomes import Word
from qlibero.results.wording import p_text

COLOURS = {Word.NON_INFERIOR: "green", Word.INFERIOR: "red", Word.WORSE: "red", Word.NOISE_FLOOR: "cyan"}
OPEN = "yellow"


class Name:
    """A name that goes on in the next line, where room is short, after a blank, - _ + / or a point; never within a word
    that has room."""

    def __init__(self, name: str):
        self.name = visible(name)
        self.parts = re.findall(r".+?(?:[-_+/. ]+|$)", self.name)

    def __rich_console__(self, to: Console, options: ConsoleOptions) -> RenderResult:
        lines = [""]
        for part in self.parts:
            if cell_len(lines[-1] + part.rstrip()) > options.max_width and lines[-1].strip():
                lines.append("")
            lines[-1] += part
        yield Text("\n".join(lines), overflow="fold")

    def __rich_measure__(self, to: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(max(map(cell_len, self.parts), default=0), cell_len(self.name))


class TitledTable(Table):
    """A table under a `heading` that may be wider than it; the first cell of each row is a name."""

    heading = ""

    def add_row(self, name: str, *cells: Any, **kwargs: Any) -> None:  # type: ignore[override]
        super().add_row(Name(name), *cells, **kwargs)

    def __rich_console__(self, to: Console, options: ConsoleOptions) -> RenderResult:
        if self.heading:
            yield Text(self.heading, style="italic")
        yield from super().__rich_console__(to, options)


def titled_table(title: str, first: str) -> TitledTable:
    """A table whose first column, names, breaks where room is short; `fixed_column` adds those that never do."""
    table = TitledTable(box=None, pad_edge=False, header_style="bold")
    table.heading = title
    table.add_column(first, overflow="fold")
    return table


def fixed_column(table: Table, title: str, justify: JustifyMethod = "left") -> None:
    table.add_column(title, justify=justify, overflow="fold", no_wrap=True)


def word_text(word: Word) -> Text:
    return Text(word, style=COLOURS.get(word, OPEN))


def bare_p(p: float | None) -> str:
    return "" if p is None else p_text(p).removeprefix("p ").removeprefix("= ")
