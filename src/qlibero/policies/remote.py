"""A policy that lives behind an openpi-protocol server: openpi, qlibero's own server, or any other.

What a remote policy cannot give is said in its provenance instead of being pretended: unless the server
advertises `noise`, its flow noise is its own, so runs are neither repeatable nor paired (contract 2), and no
kernel can be verified from here (contract 4). Chunking stays on this side: the engine executes the first
actions of each chunk.
"""

from __future__ import annotations

import hashlib
import queue
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from qlibero.documents import JsonObject
from qlibero.errors import GuardRefusal, UserError, WorkFailed
from qlibero.frames import FrameFormat
from qlibero.policies.answer import declared_horizon, read_actions, read_metadata
from qlibero.policies.base import Chunk, Observation, blank_observation
from qlibero.policies.wire import NOT_FINITE, pack, short, unpack

OPENPI_FRAMES = FrameFormat(224, "pil")
"""What openpi's own LIBERO client sends."""
OPENPI_NOISE_SHAPE = (10, 32)
"""Drawn but not sent when the server does not take noise: the engine needs some shape."""
MAX_ANSWER_BYTES = 8 << 20
_RETRY_S = 0.5


class RemotePolicy:
    """Speaks openpi's protocol with up to `batch_size` connections at once (each has one request in flight).

    A lost connection is opened again, and its request repeated, until `timeout_s` has passed. Every connection must
    be greeted as the first one was: a server that comes back with other metadata is another policy.
    """

    model = None

    def __init__(self, url: str, *, batch_size: int = 1, timeout_s: float = 60.0, api_key: str | None = None):
        self.url, self.batch_size, self._timeout_s = url, batch_size, timeout_s
        self._api_key = api_key
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._idle: queue.LifoQueue[ClientConnection] = queue.LifoQueue()
        self._threads = ThreadPoolExecutor(batch_size, "remote")
        connection, self._greeting = self._open(time.monotonic() + timeout_s)
        self._idle.put(connection)
        self.metadata = read_metadata(_understood(self._greeting, url), url)
        self._horizon, self._heard = declared_horizon(self.metadata), False
        ours = self.metadata.get("qlibero")
        self._ours: JsonObject | None = ours
        self.frame_format = None if ours else OPENPI_FRAMES  # our server gets the frames as they are and does it itself
        self.noise_shape: tuple[int, int] = tuple(ours["noise_shape"]) if ours else OPENPI_NOISE_SHAPE
        where = urlsplit(url)
        self.name = f"remote-{ours['provenance']['name']}" if ours else f"remote-{where.hostname}-{where.port or 80}"

    def close(self) -> None:
        """Close idle connections."""
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get_nowait().close()

    def with_batch_size(self, batch_size: int) -> RemotePolicy:
        """The same server asked with another number of requests at once."""
        twin = RemotePolicy(self.url, batch_size=batch_size, timeout_s=self._timeout_s, api_key=self._api_key)
        self._recognize(twin._greeting)
        return twin

    def rearranged(self, replicate: int) -> RemotePolicy:
        """See `Pi05Policy.rearranged`; how its server arranges what it computes is not to be had from here."""
        return self.with_batch_size(self.batch_size + replicate)

    def provenance(self) -> JsonObject:
        """See `Policy.provenance`; `guarantees` says which of the contracts hold across the wire."""
        theirs = self._ours["provenance"] if self._ours else {}
        return {
            "type": "remote",
            "name": self.name,
            "url": self.url,
            "sha256": theirs.get("sha256"),
            "server": theirs,
            "metadata_sha256": hashlib.sha256(_bytes_of(self._greeting)).hexdigest(),
            "guarantees": {
                "noise": bool(self._ours),
                "kernel_attestation": False,
                "company": bool(self._ours),
                "said": "the server takes our noise; its kernels cannot be verified from here"
                if self._ours
                else "the server draws its own noise: neither repeatable nor paired; its weights and kernels are "
                "what it says they are",
            },
        }

    def warmup_observations(self, prompts: Sequence[str]) -> list[Observation]:
        """See `Policy.warmup_observations`; what the server prepares, nobody knows here."""
        return [blank_observation(prompt) for prompt in prompts]

    def infer(self, observations: Sequence[Observation], noise: np.ndarray) -> Chunk:
        """See `Policy.infer`.

        `WorkFailed` when the server reports an error or stays away, `GuardRefusal` when its answer is not (H, 7)
        numbers within a controller's bounds, or not as long as the first one.
        """
        started = time.perf_counter()
        requests = [self._request(o, z) for o, z in zip(observations, noise, strict=True)]
        prepared = time.perf_counter()
        answers = list(self._threads.map(self._ask, requests))
        actions = []
        for answer in answers:
            actions.append(read_actions(answer, self.url, self._horizon, first=not self._heard))
            self._horizon, self._heard = len(actions[-1]), True
        server = max(map(_server_ms, answers))
        total = (time.perf_counter() - prepared) * 1e3
        return Chunk(
            np.stack(actions), {"preprocess": (prepared - started) * 1e3, "server": server, "wire": total - server}
        )

    def _request(self, observation: Observation, noise: np.ndarray) -> bytes:
        images = {"observation/image": observation.image, "observation/wrist_image": observation.wrist_image}
        if self.frame_format is not None:
            images = {key: self.frame_format.of(image) for key, image in images.items()}
        request = {**images, "observation/state": observation.state, "prompt": observation.prompt}
        if self._ours is not None:
            request["noise"] = noise
        return pack(request)

    def _ask(self, request: bytes) -> JsonObject:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                connection = self._idle.get_nowait()
            except queue.Empty:
                connection, greeting = self._open(deadline)
                try:
                    self._recognize(greeting)
                except GuardRefusal:
                    connection.close()
                    raise
            try:
                connection.send(request)
                answer = connection.recv(timeout=max(deadline - time.monotonic(), 0.001))
            except TimeoutError:
                connection.close()
                raise WorkFailed(f"{self.url} did not answer within {self._timeout_s:g} s (policy.timeout_s)") from None
            except (ConnectionClosed, OSError) as error:
                if time.monotonic() > deadline:
                    raise WorkFailed(f"{self.url}: connection lost, and lost again: {error}") from None
                time.sleep(min(_RETRY_S, max(deadline - time.monotonic(), 0)))
                continue
            if isinstance(answer, str):
                connection.close()
                if NOT_FINITE in answer:
                    return {"actions": np.full((self.noise_shape[0], 7), np.nan, np.float32)}
                raise WorkFailed(f"the policy server at {self.url} reported an error:\n{answer.strip()[-4000:]}")
            self._idle.put(connection)
            understood: JsonObject = _understood(answer, self.url)
            return understood

    def _recognize(self, greeting: str | bytes) -> None:
        """`GuardRefusal` when this is not the metadata that the run began with."""
        if greeting == self._greeting:
            return
        before, after = (_provenance(_understood(frame, self.url)) for frame in (self._greeting, greeting))
        changes = [
            short(f"{key} was {before.get(key)!r}, is {after.get(key)!r}")
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        ]
        raise GuardRefusal(
            f"the server at {self.url} is not the one that this run began with: its metadata has changed"
            + (f" ({'; '.join(changes)})" if changes else "")
            + "; serve the first one again, or give the new one a run directory of its own"
        )

    def _open(self, deadline: float) -> tuple[ClientConnection, str | bytes]:
        while True:
            try:
                connection = connect(
                    self.url,
                    compression=None,
                    max_size=MAX_ANSWER_BYTES,
                    additional_headers=self._headers,
                    ping_interval=None,
                    open_timeout=max(deadline - time.monotonic(), 0.1),
                )
                return connection, connection.recv(timeout=max(deadline - time.monotonic(), 0.1))
            except InvalidURI as error:
                raise UserError(f"policy.url: {error}") from None
            except InvalidStatus as error:
                if error.response.status_code == 401:
                    raise UserError(
                        f"{self.url} wants a token: set policy.api_key_env to the variable that holds it"
                    ) from None
                problem: Exception = error
            except (OSError, TimeoutError, ConnectionClosed, InvalidHandshake) as error:
                problem = error
            if time.monotonic() >= deadline:
                raise WorkFailed(
                    f"no policy server at {self.url} within {self._timeout_s:g} s (policy.timeout_s): {problem}"
                )
            time.sleep(_RETRY_S)


def _bytes_of(frame: str | bytes) -> bytes:
    return frame.encode() if isinstance(frame, str) else frame


def _understood(frame: str | bytes, url: str) -> Any:
    try:
        return unpack(_bytes_of(frame))
    except ValueError as problem:
        raise GuardRefusal(f"{url}: {problem}") from None


def _server_ms(answer: JsonObject) -> float:
    """What the server says its call took (ms); 0 where it says nothing that is a time."""
    timing = answer.get("server_timing")
    said = timing.get("infer_ms") if isinstance(timing, dict) else None
    return float(said) if isinstance(said, int | float) and 0 <= said < 1e9 else 0.0


def _provenance(metadata: Any) -> JsonObject:
    """What a server says of its policy: qlibero's own says it all, of another one it is whatever the metadata holds."""
    if not isinstance(metadata, dict):
        return {}
    ours = metadata.get("qlibero")
    theirs = ours.get("provenance") if isinstance(ours, dict) else None
    return theirs if isinstance(theirs, dict) else metadata
