"""How a command ends that has something to show, and how it tells people."""

from __future__ import annotations

import sys
from typing import Any

from qlibero.errors import GuardRefusal, WorkFailed
from qlibero.places import pasteable
from qlibero.quoting import visible

Document = dict[str, Any]


class Incomplete(WorkFailed):
    """The command did what it could and has a result to show, but the work is not all done."""

    def __init__(self, message: str, document: Document):
        super().__init__(message)
        self.document = document


class Unwanted(Incomplete):
    """The work is done, and `compare --fail-on` names a verdict that was found."""

    exit_status = 4


class Refused(GuardRefusal):
    """A guard said no, and `document` holds all that it looked at."""

    def __init__(self, message: str, document: Document):
        super().__init__(message)
        self.document = document


def explain(message: str) -> None:
    """A line for people, on stderr."""
    print("\n".join(f"qlibero: {visible(pasteable(message))}".splitlines()), file=sys.stderr)
