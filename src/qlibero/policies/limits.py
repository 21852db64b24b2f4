"""What clients may cost a server: connections, bytes and seconds, counted while the bytes come in.

websockets bounds one message and waits for a whole one; a hundred clients that each send most of a message, or one byte
a minute, are within its bounds. Where room is short the connection that takes most of it has to go, not the one that
came last.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from websockets.asyncio.server import ServerConnection

EARLY_BYTES = 4096
"""May arrive before an answer is sent: pings and the closing handshake, but no further request."""
PARTIAL_BYTES = 1 << 16
"""A message of which so much has come must also end; less costs nothing."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Each is far above what evaluations need, and far below what a machine has."""

    connections: int = 256
    waiting: int = 128
    """Requests that wait for the policy at once."""
    held_bytes: int = 64 << 20
    """Of unanswered messages, whole or not, of all connections together; while one is read it takes up to three times
    its size."""
    message_s: float = 30.0
    """From the first to the last byte of one message."""
    idle_s: float = 60.0
    """A connection that has been silent for so long makes room for a new one where all are taken."""


class Gone(Exception):
    """The client has left before its answer."""


class Crowd:
    """All connections of one server."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.members: set[LimitedConnection] = set()

    async def watch(self) -> None:
        """Cut off, for ever, messages that do not end."""
        while True:
            await asyncio.sleep(min(1.0, self.limits.message_s / 4))
            now = time.monotonic()
            for member in list(self.members):
                if member.began is not None and not member.busy and now - member.began > self.limits.message_s:
                    member.cut(f"a message was not complete after {self.limits.message_s:g} s")

    def enter(self, new: LimitedConnection) -> None:
        """Take a connection in, in the place of the most idle one where all are taken; else as a spare one, which may
        ask for the server's health and nothing more."""
        if len(self.members) >= self.limits.connections:
            now = time.monotonic()
            idle = [m for m in self.members if not m.busy and (not m.open or now - m.heard > self.limits.idle_s)]
            if idle:
                min(idle, key=lambda member: (member.open, member.heard)).cut("silent, and its place was needed")
        new.spare = len(self.members) >= self.limits.connections
        self.members.add(new)

    def leave(self, one: LimitedConnection) -> None:
        self.members.discard(one)

    def make_room(self) -> None:
        """Cut off whoever holds most until all that is held fits."""
        while self.members and sum(member.held for member in self.members) > self.limits.held_bytes:
            max(self.members, key=lambda member: member.held).cut("the server holds too many bytes, most of them its")


class LimitedConnection(ServerConnection):
    """A connection that knows what it costs. `spare` where all places are taken, `open` once it may send requests,
    `busy` while one is answered."""

    def __init__(self, crowd: Crowd, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.crowd = crowd
        self.held, self.heard = 0, time.monotonic()
        self.began: float | None = None
        self.open = self.busy = self.spare = False
        self._request_bytes = 0
        self.work: asyncio.Future[Any] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.crowd.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.crowd.leave(self)
        if self.work is not None and not self.work.done():
            self.work.set_exception(Gone())
            self.work.exception()  # asked for here, so that it is no unheard one where nobody waits yet
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.heard = time.monotonic()
        self.held += len(data)
        if self.busy and (early := self.held - self._request_bytes) > EARLY_BYTES:
            self.cut(f"{early} bytes of a further request came before the answer to the last one")
        elif self.held > PARTIAL_BYTES:
            self.began = self.began or self.heard
            self.crowd.make_room()
        if self in self.crowd.members:  # else it has just been cut off: what came is dropped
            super().data_received(data)

    @contextmanager
    def answering(self, message: bytes | str, work: asyncio.Future[Any]) -> Iterator[None]:
        """While `message` is answered; `work` is told when the client leaves meanwhile."""
        self.busy, self.work, self.held = True, work, len(message)
        self._request_bytes = len(message)
        try:
            yield
        finally:
            self.busy, self.work, self.began = False, None, None
            self.held, self.heard = max(0, self.held - self._request_bytes), time.monotonic()

    def cut(self, reason: str) -> None:
        """End the connection at once, without the closing handshake, which a hostile client would not finish."""
        _log.warning("cut off %s: %s", self.remote_address, reason)
        self.crowd.leave(self)
        self.transport.abort()


def connections_of(crowd: Crowd) -> type[LimitedConnection]:
    """What websockets makes of each client that comes to this crowd."""

    class Admitted(LimitedConnection):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(crowd, *arguments, **options)

    return Admitted
