"""What the program is busy with, said by whoever is busy and shown by whoever watches.

Start-up goes through rooms that know nothing of a terminal (calibration, kernel validation, simulators), so there is
one place to say "calibrating, 12 of 84" and one to listen. Without a listener nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def doing(what: str, done: int = 0, total: int = 0) -> None:
    """`what` is under way, `done` parts of `total` (0: nobody knows)."""
    if (listener := _listener.get()) is not None:
        listener(what, done, total)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Within it, `listener(what, done, total)` hears what this thread is doing."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
