"""Any policy, quantized or not, behind openpi's websocket protocol; several clients' requests share a batch.

The protocol (openpi 15a9616): the server speaks first, one binary frame with its metadata; then one answer a
request. An error is a *text* frame that says what was wrong (to a client on this machine with the
traceback, which openpi's server sends to everybody), followed by close code 1011. `GET /healthz` answers
200 "OK". Beyond it, and advertised in the metadata: an optional key `noise` (H, D) makes the answer a
function of the request alone.

openpi's own server computes inside its event loop, so that clients wait for each other and no ping is
answered meanwhile. Here one thread computes, and takes whatever has arrived, up to the policy's batch size,
in one call. When that call fails, its requests are computed one by one, so that only the failing one is told.
Where `on_call` refuses what a call gave, nothing more is answered and the server ends.
Another thread reads the messages and prepares their frames, small ones first; the event loop only carries bytes, and
`limits` bounds what those may cost.
"""

from __future__ import annotations

import asyncio
import hmac
import http
import ipaddress
import itertools
import json
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as listen
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from qlibero import files
from qlibero.documents import JsonObject
from qlibero.errors import GuardRefusal, WorkFailed
from qlibero.policies.base import Observation, Policy
from qlibero.policies.limits import Crowd, Gone, LimitedConnection, connections_of
from qlibero.policies.listening import ServerSettings
from qlibero.policies.request import read_noise, read_observation
from qlibero.policies.wire import NOT_FINITE, pack, short, unpack

CLOSE_INTERNAL_ERROR, CLOSE_TRY_AGAIN_LATER = 1011, 1013
_TRACEBACK_LINES = 12
_log = logging.getLogger(__name__)
_handshakes = logging.getLogger(f"{__name__}.handshakes")
_handshakes.setLevel(logging.CRITICAL)  # websockets logs a traceback for each stranger that speaks no HTTP


OnCall = Callable[[list[Observation], np.ndarray, np.ndarray, float], None]


@dataclass
class _Job:
    observation: Observation
    noise: np.ndarray
    answer: asyncio.Future[tuple[np.ndarray, float]]

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class PolicyServer:
    """Serves one policy. `serve` is the blocking form; this class is for embedding in an event loop."""

    def __init__(self, policy: Policy, settings: ServerSettings, on_call: OnCall | None = None):
        """`on_call` is told each call's observations, noise, actions and seconds before anybody gets the answer."""
        self.policy, self.settings, self._on_call = policy, settings, on_call
        self._refusal: GuardRefusal | None = None
        self.port: int | None = None
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._crowd = Crowd(settings.limits)
        self._frames: asyncio.PriorityQueue[tuple[int, int, str | bytes, asyncio.Future[Any]]] = asyncio.PriorityQueue()
        self._arrivals = itertools.count()
        self._random = np.random.default_rng(settings.seed)
        self._batch = getattr(policy, "batch_size", 1)
        self.metadata: JsonObject = {
            "qlibero": {"noise_shape": list(policy.noise_shape), "provenance": policy.provenance()}
        }
        """The first frame, the same for every connection. Clients that know nothing of it ignore it."""

    async def run(self, ready: Callable[[int], None], stop: asyncio.Event) -> None:
        """Listen until `stop` is set; `ready` is told the port."""
        settings = self.settings
        settings.require_possible()
        try:
            server = await listen(
                self._converse,
                settings.host,
                settings.port,
                compression=None,
                max_size=settings.max_message_bytes,
                process_request=self._admit,
                create_connection=connections_of(self._crowd),
                max_queue=None,  # `limits` counts bytes; a paused connection would not notice that its client left
                ping_interval=None,
                logger=_handshakes,
            )
        except OSError as error:
            raise settings.cannot_listen(error) from error
        self.port = server.sockets[0].getsockname()[1]
        with ThreadPoolExecutor(1, "policy") as thread, ThreadPoolExecutor(1, "reader") as reader:
            worker = asyncio.create_task(self._work(thread))
            reading = asyncio.create_task(self._read_frames(reader))
            stopping = asyncio.create_task(stop.wait())
            watching = asyncio.create_task(self._crowd.watch())
            try:
                _announce(settings, self.port)
                ready(self.port)
                await asyncio.wait({worker, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if worker.done():
                    worker.result()
            finally:
                for task in (worker, stopping, watching, reading):
                    task.cancel()
                server.close()
                await server.wait_closed()
                if settings.ready_file:
                    settings.ready_file.unlink(missing_ok=True)

    # -- connections -------------------------------------------------------------------------------------------------
    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        assert isinstance(connection, LimitedConnection)
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if connection.spare:
            taken = f"no connection is free: at most {self.settings.limits.connections} at a time\n"
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, taken)
        if self.settings.token is not None:
            given = "\0".join(request.headers.get_all("Authorization"))  # two are none: who would know which counts?
            wanted = f"Api-Key {self.settings.token}"
            if not hmac.compare_digest(given.encode(errors="surrogateescape"), wanted.encode()):
                return connection.respond(http.HTTPStatus.UNAUTHORIZED, "Authorization: Api-Key <token> is required\n")
        return None

    async def _converse(self, connection: ServerConnection) -> None:
        assert isinstance(connection, LimitedConnection)
        connection.open, previous_ms = True, None
        try:
            await connection.send(pack(self.metadata))
            async for frame in connection:
                started = time.monotonic()
                work = asyncio.get_running_loop().create_future()
                with connection.answering(frame, work):
                    if self._jobs.qsize() >= self.settings.limits.waiting:
                        await connection.close(CLOSE_TRY_AGAIN_LATER, "too many requests are waiting")
                        return
                    try:
                        answer = await self._answer(frame, work)
                    except Gone:
                        return
                    except Exception as error:
                        _log.warning("a request of %s failed: %s", connection.remote_address, _named(error))
                        await connection.send(_told(error, connection.remote_address))
                        await connection.close(CLOSE_INTERNAL_ERROR, "Internal server error, see the previous frame.")
                        return
                    if previous_ms is not None:
                        answer["server_timing"]["prev_total_ms"] = previous_ms
                    await connection.send(pack(answer))
                previous_ms = (time.monotonic() - started) * 1e3
        except ConnectionClosed:
            return

    async def _answer(self, frame: str | bytes, work: asyncio.Future[tuple[np.ndarray, float]]) -> JsonObject:
        """The answer to a request; `work` is what the policy gives for it, and may fail with `Gone` meanwhile."""
        started = time.monotonic()
        read = asyncio.get_running_loop().create_future()
        self._frames.put_nowait((len(frame), next(self._arrivals), frame, read))
        observation, noise = await read
        if noise is None:
            noise = self._random.standard_normal(self.policy.noise_shape, dtype=np.float32)
        self._jobs.put_nowait(_Job(observation, noise, work))
        actions, infer_ms = await work
        waited_ms = (time.monotonic() - started) * 1e3
        return {
            "actions": actions,
            "policy_timing": {"infer_ms": infer_ms},
            "server_timing": {"infer_ms": waited_ms},
        }

    async def _read_frames(self, thread: ThreadPoolExecutor) -> None:
        while True:
            _, _, frame, read = await self._frames.get()
            try:
                read.set_result(await asyncio.get_running_loop().run_in_executor(thread, self._read, frame))
            except Exception as error:
                read.set_exception(error)
            del frame, read  # else it is held until the next one comes

    def _read(self, frame: str | bytes) -> tuple[Observation, np.ndarray | None]:
        if isinstance(frame, str):
            raise ValueError("a request is one binary frame; this was text")
        request = unpack(frame)
        seen, noise = read_observation(request), read_noise(request, self.policy.noise_shape)
        if (wanted := getattr(self.policy, "frame_format", None)) is not None:  # here: the policy's thread has its GPU
            seen = replace(seen, image=wanted.of(seen.image), wrist_image=wanted.of(seen.wrist_image))
        return seen, noise

    # -- the one thread that computes --------------------------------------------------------------------------------
    async def _work(self, thread: ThreadPoolExecutor) -> None:
        while True:
            jobs = [await self._jobs.get()]
            while len(jobs) < self._batch and not self._jobs.empty():
                jobs.append(self._jobs.get_nowait())
            jobs = [job for job in jobs if not job.answer.done()]  # done: its client has left
            if not jobs:
                continue
            try:
                await self._compute(thread, jobs)
            except Exception as error:
                if error is self._refusal:
                    for job in [*jobs, *(self._jobs.get_nowait() for _ in range(self._jobs.qsize()))]:
                        job.fail(error)
                    raise
                if len(jobs) == 1:
                    jobs[0].fail(error)
                    continue
                # One client's request must not cost the others theirs: alone, only the one to blame fails.
                for job in jobs:
                    try:
                        await self._compute(thread, [job])
                    except Exception as its_own:
                        job.fail(its_own)

    async def _compute(self, thread: ThreadPoolExecutor, jobs: list[_Job]) -> None:
        found, seconds = await asyncio.get_running_loop().run_in_executor(
            thread, self._infer, [job.observation for job in jobs], np.stack([job.noise for job in jobs])
        )
        infer_ms = seconds * 1e3
        for job, actions in zip(jobs, found, strict=True):
            if not np.isfinite(actions).all():
                job.fail(WorkFailed(NOT_FINITE))  # never sent, as it may go to a robot
            elif not job.answer.done():
                job.answer.set_result((actions, infer_ms))

    def _infer(self, observations: list[Observation], noise: np.ndarray) -> tuple[np.ndarray, float]:
        started = time.monotonic()
        actions = self.policy.infer(observations, noise).actions
        seconds = time.monotonic() - started
        if self._on_call is not None:
            try:
                self._on_call(observations, noise, actions, seconds)
            except GuardRefusal as refusal:
                self._refusal = refusal
                raise
        return actions, seconds


def serve(
    policy: Policy,
    settings: ServerSettings,
    ready: Callable[[int], None] = lambda port: None,
    on_call: OnCall | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM. `WorkFailed` when the port cannot be had, `GuardRefusal` from `on_call`."""

    async def main() -> None:
        stop = asyncio.Event()
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(name, stop.set)
        await PolicyServer(policy, settings, on_call).run(ready, stop)

    asyncio.run(main())


def _announce(settings: ServerSettings, port: int) -> None:
    if settings.ready_file is None:
        return
    files.replace(settings.ready_file, json.dumps({"host": settings.host, "port": port, "pid": os.getpid()}) + "\n")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {short(str(error))}"


def _told(error: Exception, address: Any) -> str:
    """What the client of a failed request is told: where it failed only on this machine."""
    if not (isinstance(address, tuple) and ipaddress.ip_address(address[0]).is_loopback):
        return _named(error)
    lines = traceback.format_tb(error.__traceback__)[-_TRACEBACK_LINES:]
    return "Traceback (most recent call last):\n" + "".join(lines) + _named(error)
