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
WHOLE_WORD = 24  # words up to this length are not broken while there is room for the columns' longest ones


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
    """A new console on stderr."""
    from rich.console import Console

    stream: Any = _Visible(sys.stderr)
    found = Console(file=stream, highlight=False)
    return found if found.is_terminal else Console(file=stream, highlight=False, width=PLAIN_WIDTH)


class _Visible:
    """A stream on which names from configs and from other people's files cannot turn the writing direction."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        return int(self._stream.write(visible(text, colours=True)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def table(rows: list[dict[str, Any]], title: str) -> None:
    """Rows as a table whose columns are all keys that occur; long text wraps between words."""
    from rich.markup import escape
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        texts = [column.replace("_", " "), *(_cell(row.get(column)) for row in rows)]
        longest = max((len(word) for text in texts for word in text.split()), default=0)
        shown.add_column(
            texts[0], overflow="fold", no_wrap=column in (columns[0], "file"), min_width=min(longest, WHOLE_WORD)
        )
    for row in rows:
        shown.add_row(*(escape(_cell(row.get(column))) for column in columns))  # [cu13] is no markup
    to = console()
    to.print(title, style="italic", markup=False)  # not the table's own, which wraps at the table's width
    to.print(shown)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        ""
        if value is None
        else ", ".join(map(str, value))
        if isinstance(value, list | tuple)
        else f"{value:,}"
        if isinstance(value, int)
        else pasteable(str(value))
    )
