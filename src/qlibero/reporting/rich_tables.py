"""Tables for a terminal whose columns of numbers never fold, under headings that may be wider than they are."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from qlibero.results.paired_outcomes import Word
from qlibero.results.wording import p_text

COLOURS = {Word.NON_INFERIOR: "green", Word.INFERIOR: "red", Word.WORSE: "red", Word.NOISE_FLOOR: "cyan"}
OPEN = "yellow"


class TitledTable(Table):
    """A table under a `heading` that may be wider than it."""

    heading = ""

    def __rich_console__(self, to: Console, options: ConsoleOptions) -> RenderResult:
        if self.heading:
            yield Text(self.heading, style="italic")
        yield from super().__rich_console__(to, options)


def titled_table(title: str, first: str) -> Table:
    """A table whose first column, names, folds where room is short; `fixed_column` adds those that never do."""
    table = TitledTable(box=None, pad_edge=False, header_style="bold")
    table.heading = title
    table.add_column(first, overflow="fold")
    return table


def fixed_column(table: Table, title: str, justify: str = "left") -> None:
    table.add_column(title, justify=justify, overflow="fold", no_wrap=True)


def word_text(word: Word) -> Text:
    return Text(word, style=COLOURS.get(word, OPEN))


def bare_p(p: float | None) -> str:
    return "" if p is None else p_text(p).removeprefix("p ").removeprefix("= ")
