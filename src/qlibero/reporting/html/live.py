"""`qlibero open`: the report in a browser of this machine, renewed whenever the ledgers grow.

The page asks for `/state`, a digest of the result files' names, sizes and times, and fetches `/` when it is another.
Loopback only. Other pages of the same browser cannot read it: the Host header must be ours, so a name that some site
points at 127.0.0.1 is refused, and without CORS headers no script of another origin sees an answer.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from qlibero.errors import QliberoError, UserError
from qlibero.reporting.html.document import MEGABYTES, document, fitting
from qlibero.reporting.html.markup import el, join
from qlibero.reporting.html.report_data import flipped_videos, gather
from qlibero.results.paired_outcomes import check_margin
from qlibero.results.selection import select

#: what a report reads, below a run directory; a sweep's cells lie one deeper
READ = (
    "experiment.yaml",
    "environment.json",
    "*/meta*.json",
    "*/episodes-*.jsonl",
    "*/videos/*.mp4",
    "meta*.json",
    "episodes-*.jsonl",
    "videos/*.mp4",
)  # of an arm that is named itself
HOST = "127.0.0.1"


class LiveReport:
    """The page of some run directories as they are now, made anew only when they have changed."""

    def __init__(
        self,
        paths: Sequence[Path],
        reference: str | None = None,
        margin: float | None = None,
        labels: Mapping[str, str] | None = None,
    ):
        self.paths, self.reference, self.labels = paths, reference, labels
        self.margin = None if margin is None else check_margin(margin)
        self._lock, self._made = threading.Lock(), ("", b"")

    def state(self) -> str:
        """16 hex digits of the result files' names, sizes and times of change."""
        digest = hashlib.sha256()
        for path in self.paths:
            for found in sorted(
                found for pattern in READ for below in ("", "*/") for found in path.glob(below + pattern)
            ):
                try:
                    about = found.stat()
                except OSError:  # replaced just now
                    continue
                digest.update(f"{found}\0{about.st_size}\0{about.st_mtime_ns}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def page(self) -> bytes:
        """The whole HTML page; before the first episode one that says so."""
        with self._lock:
            state = self.state()
            if self._made[0] != state:
                self._made = state, self._render(state)
            return self._made[1]

    def _render(self, state: str) -> bytes:
        try:
            material = gather(select(self.paths, self.labels), self.reference, self.margin)
            return fitting(material, flipped_videos(material), MEGABYTES * 1e6, state)[0]
        except QliberoError as problem:
            body = el("main", el("h1", "No results yet"), el("p", str(problem)), el("p", "This page waits for them."))
            return document(self.paths[0].resolve().name, join(body), {}, state).encode()


def serve(report: LiveReport, ready: Callable[[str], None]) -> None:
    """Answer on a free port of this machine until interrupted; `ready` gets the address."""

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "qlibero", ""
        timeout = 20  # seconds that a silent client may hold a thread

        def do_GET(self) -> None:
            if self.headers.get("Host") not in hosts:
                return self._answer(403, "text/plain", b"this is not the host you asked for")
            try:
                if self.path == "/":
                    return self._answer(200, "text/html; charset=utf-8", report.page())
                if self.path == "/state":
                    return self._answer(200, "text/plain", report.state().encode())
            except OSError as problem:  # a file system that is away for a moment
                return self._answer(503, "text/plain; charset=utf-8", str(problem).encode(errors="replace"))
            return self._answer(204 if self.path == "/favicon.ico" else 404, "text/plain", b"")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            for name, value in (
                ("Content-Type", kind),
                ("Content-Length", str(len(body))),
                ("Cache-Control", "no-store"),
                ("X-Content-Type-Options", "nosniff"),
                ("X-Frame-Options", "DENY"),
                ("Cross-Origin-Resource-Policy", "same-origin"),
            ):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A page that asks every second is nothing to write down."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A browser that has gone away is no error of ours."""

    with Server((HOST, 0), Handler) as server:
        port = server.server_address[1]
        hosts = {f"{HOST}:{port}", f"localhost:{port}"}
        ready(f"http://{HOST}:{port}/")
        server.serve_forever()


def require_directories(paths: Sequence[Path]) -> None:
    """Raises UserError for what is not there: waiting for it would hide a misspelt name."""
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such run directory; `qlibero run` prints the one it writes")
