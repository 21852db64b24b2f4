"""Where and how a policy server listens, and whether it can: asked before minutes go into loading a policy."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

from qlibero.errors import QliberoError, UserError, WorkFailed
from qlibero.policies.limits import Limits

MAX_MESSAGE_BYTES = 8 << 20
"""Two 1024 px frames and to spare; a request at 256 px has 0.4 MB."""


@dataclass(frozen=True)
class ServerSettings:
    """Where and how to listen. `port` 0 takes a free one; `ready_file` then tells launchers which."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    """Clients send it as `Authorization: Api-Key <token>`; required to listen anywhere but on loopback."""
    ready_file: Path | None = None
    """Written (JSON: host, port, pid) once connections are accepted, removed at the end."""
    max_message_bytes: int = MAX_MESSAGE_BYTES
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    """Of the noise of requests that bring none."""

    def require_possible(self) -> None:
        """Refuse what cannot become a server, so that nobody waits for a policy to be loaded first.

        Raises `UserError` for a port, host or ready file that cannot be, and for strangers without a token;
        `WorkFailed` for a port that is taken.
        """
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port {self.port}: ports are 1 to 65535, and 0 takes a free one")
        folder = self.ready_file.parent if self.ready_file is not None else None
        if folder is not None and not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise UserError(f"--ready-file {self.ready_file}: {folder} is no directory to write in")
        try:
            # as asyncio resolves it: an empty host is every interface, a name may be several addresses
            found = socket.getaddrinfo(self.host or None, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError:
            raise UserError(f"--host {self.host}: no such host is known here; 127.0.0.1 is this machine") from None
        loopback = all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)
        if self.token is None and not loopback:
            raise UserError(
                f"serving on {self.host or 'every interface'} lets anybody who reaches it use the policy: give a "
                "token (--token-env), or listen on 127.0.0.1 (and tunnel)"
            )
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise self.cannot_listen(error) from None

    def cannot_listen(self, error: OSError) -> QliberoError:
        """The system's refusal, as an error with its hint."""
        if error.errno == errno.EADDRNOTAVAIL:
            return UserError(
                f"--host {self.host}: this is no address of this machine; 127.0.0.1 is one, and 0.0.0.0 is all of them"
            )
        return WorkFailed(
            f"cannot listen on {self.host}:{self.port}: {os.strerror(error.errno or 0)}; choose another --port "
            "(0 takes a free one)"
        )
