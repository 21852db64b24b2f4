"""Where text for people goes: stderr, as wide as the terminal; a log file gets 160 columns without colour codes.

Rooms only log, to `logging.getLogger(__name__)`. Who shows it, and how, is decided by the program that imports them: by
`log_to` here for the command line.

Rich is imported on first use, because `qlibero --help` must answer at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qlibero.places import pasteable
from qlibero.quoting import visible

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 160
GAP = 2  # between columns
FOLDED = 24  # columns that a path gets at least
SHORT = 10  # characters of a text that does not wrap


def count_text(n: int, what: str) -> str:
    """1 shard, 2,000 shards, 3 trajectories."""
    plural = f"{what[:-1]}ies" if what.endswith("ry") else f"{what}s"
    return f"{n:,} {what if n == 1 else plural}"


def print_line(message: str) -> None:
    """A line of this program's for people."""
    print("\n".join(f"qlibero: {visible(pasteable(message))}".splitlines()), file=sys.stderr)


@contextmanager
def log_to(write: Callable[[str], None]) -> Iterator[None]:
    """Within it `write`, and nobody else, gets what the package logs at level INFO and above."""
    log, handler = logging.getLogger("qlibero"), _Lines(write)
    before = log.handlers, log.level, log.propagate
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.handlers, _, log.propagate = before
        log.setLevel(before[1])


class _Lines(logging.Handler):
    def __init__(self, write: Callable[[str], None]):
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(record.getMessage())


def console() -> Console:
    """A new console on stderr. Escape sequences and other controls in what it is given are shown, not obeyed."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Shown(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else visible(text), style, control)

    found = Shown(file=sys.stderr, highlight=False)
    return found if found.is_terminal else Shown(file=sys.stderr, highlight=False, width=PLAIN_WIDTH)


def table(rows: list[dict[str, Any]], title: str) -> None:
    """Rows as a table whose columns are all keys that occur, long text wrapped between words; where a word would have
    to be broken for it, one row below the other, a line for each key."""
    from rich.markup import escape
    from rich.table import Table

    to = console()
    to.print(title, style="italic", markup=False)  # not the table's own, which wraps at the table's width
    if not rows:
        to.print("none")
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    texts = {key: [key.replace("_", " "), *(_cell(row.get(key)) for row in rows)] for key in columns}
    whole = {key: key in (columns[0], "file") for key in columns}
    least = {key: max(len(text) if whole[key] else _unbroken(text) for text in texts[key]) for key in columns}
    room = to.width - sum(least.values()) - GAP * (len(columns) - 1)
    if len(columns) > 2 and room < 0:
        _one_below_the_other(list(texts.values()), to)
        return
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for key, width in _widths(least, texts, room).items():
        shown.add_column(texts[key][0], overflow="fold", width=width)
    for line in zip(*(column[1:] for column in texts.values()), strict=True):
        shown.add_row(*map(escape, line))  # [cu13] is no markup
    to.print(shown)


def _one_below_the_other(columns: list[list[str]], to: Console) -> None:
    """`columns`: heading, then a text for each row; the first names the rows."""
    from rich.table import Table
    from rich.text import Text

    (_, *names), *others = columns
    for number, name in enumerate(names, 1):
        to.print(Text(name, style="bold", overflow="fold"))
        shown = Table.grid(padding=(0, GAP), pad_edge=False)
        shown.add_column(no_wrap=True)
        shown.add_column(overflow="fold")
        for column in others:
            if column[number]:
                shown.add_row(f"  {column[0]}", Text(column[number]))
        to.print(shown)


def _widths(least: dict[str, int], texts: dict[str, list[str]], room: int) -> dict[str, int]:
    """`room` more columns, each for the text that is cut into most lines: rich's own sharing breaks words, and where
    two columns need more than there is takes one of them away: the wider one folds."""
    widths = least.copy()
    for _ in range(-room):
        widths[max(widths, key=lambda key: widths[key])] -= 1
    wanted = {key: max(map(len, texts[key])) for key in least}
    for _ in range(room):
        key = max(widths, key=lambda key: wanted[key] / widths[key])
        if widths[key] >= wanted[key]:
            break
        widths[key] += 1
    return widths


def _unbroken(text: str) -> int:
    """Columns that a text needs: a short one whole, of a long one each word; paths and addresses fold anywhere."""
    words = [text] if len(text) <= SHORT else text.split()
    return max((min(len(word), FOLDED) if "/" in word else len(word) for word in words), default=0)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        ""
        if value is None
        else visible(", ".join(map(str, value)))
        if isinstance(value, list | tuple)
        else f"{value:,}"
        if isinstance(value, int)
        else pasteable(visible(str(value)))
    )
