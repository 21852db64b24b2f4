"""How a command ends that has something to show."""

from __future__ import annotations

from qlibero.documents import JsonObject
from qlibero.errors import GuardRefusal, WorkFailed

Document = JsonObject


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
