"""Risk: a policy behaves otherwise when it is served, or a server does what its protocol does not say."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import msgpack
import numpy as np
import pytest
import torch
from pi05_small import PROMPTS, STATISTICS, conv_config, noises, observations, random_model
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from qlibero import cli
from qlibero.errors import GuardRefusal, UserError, WorkFailed
from qlibero.frames import resize_pil
from qlibero.policies.listening import ServerSettings
from qlibero.policies.pi05.normalize import from_openpi
from qlibero.policies.pi05.policy import Pi05Policy
from qlibero.policies.pi05.profiles import PROFILES
from qlibero.policies.pi05.tokenizer import WordTokenizer, split_words
from qlibero.policies.remote import RemotePolicy
from qlibero.policies.server import PolicyServer
from qlibero.policies.wire import pack, unpack
from qlibero.run import arms

pytestmark = pytest.mark.slow

TOKEN = "a-token-for-tests"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def policy() -> Pi05Policy:
    words = WordTokenizer(sorted({w for p in PROMPTS for w in split_words(p)}))
    statistics = {name: from_openpi(entry, "quantile", "test") for name, entry in STATISTICS.items()}
    made = Pi05Policy(
        "small",
        random_model(conv_config()),
        PROFILES["qlibero"],
        statistics,
        words,
        batch_size=4,
        flow_steps=10,
        identity={"sha256": "0" * 64},
    )
    made.infer(observations(1), noises(1, made.noise_shape))  # served policies are warm: they know what runs
    return made


class Served:
    """A server in a thread of this process, which counts the policy's calls."""

    def __init__(self, policy, port: int = 0, **settings):
        self.batches: list[int] = []
        outer = self

        class Counting:
            noise_shape, batch_size, name = policy.noise_shape, policy.batch_size, policy.name
            provenance = staticmethod(policy.provenance)

            def infer(self, observations, noise):
                outer.batches.append(len(observations))
                return policy.infer(observations, noise)

        self._ready = threading.Event()
        self._server = PolicyServer(Counting(), ServerSettings(port=port, **settings))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    async def _main(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await self._server.run(lambda port: self._ready.set(), self._stop)

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(20)
        self.port = self._server.port
        self.url = f"ws://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)


def framed(observation):
    """The observation with its frames as openpi's LIBERO client makes them: 224 px, PIL's antialiased bilinear."""
    small = {key: resize_pil(getattr(observation, key), 224) for key in ("image", "wrist_image")}
    return replace(observation, **small)


def element(observation) -> dict:
    """What openpi's LIBERO client sends."""
    observation = framed(observation)
    return {
        "observation/image": observation.image,
        "observation/wrist_image": observation.wrist_image,
        "observation/state": observation.state.astype(np.float64),
        "prompt": observation.prompt,
    }


def test_remote_answers_are_the_in_process_answers(policy):
    seen, z = observations(5), noises(5, policy.noise_shape)
    with Served(policy) as server:
        remote = RemotePolicy(server.url, batch_size=3, timeout_s=30.0)
        assert remote.noise_shape == policy.noise_shape
        answer = remote.infer(seen, z)
        remote.close()
    assert np.array_equal(answer.actions, policy.infer(seen, z).actions)
    said = remote.provenance()
    assert said["guarantees"]["noise"] and not said["guarantees"]["kernel_attestation"] and said["sha256"] == "0" * 64
    assert json.dumps(said)


def test_clients_share_batches_and_nobody_notices(policy):
    seen, z = observations(8), noises(8, policy.noise_shape)
    with Served(policy) as server:
        remote = RemotePolicy(server.url, batch_size=8, timeout_s=30.0)
        answer = remote.infer(seen, z)
        remote.close()
        assert sum(server.batches) == 8 and max(server.batches) > 1
    assert np.array_equal(answer.actions, policy.infer(seen, z).actions)


EMPTY = np.zeros((0, 0, 3), np.uint8)
BAD = {
    "an empty image": ({"observation/image": EMPTY}, r"observation/image has shape \(0, 0, 3\)"),
    "an image that is not square": (
        {"observation/wrist_image": np.zeros((64, 32, 3), np.uint8)},
        "observation/wrist_image has shape",
    ),
    "a float image in 0…255": ({"observation/image": np.full((8, 8, 3), 200.0)}, "outside 0…1"),
    "a NaN in a float image": ({"observation/image": np.full((8, 8, 3), np.nan)}, "outside 0…1"),
    "an image of int64": ({"observation/image": np.zeros((8, 8, 3), np.int64)}, "int64"),
    "a NaN state": ({"observation/state": np.full(8, np.nan)}, "observation/state holds NaN"),
    "a NaN noise": ({"noise": np.full((10, 7), np.nan, np.float32)}, "noise holds NaN"),
    "noise of another shape": ({"noise": np.zeros((3, 7), np.float32)}, r"noise has shape \(3, 7\)"),
    "an instruction that is no text": ({"prompt": 7}, "prompt is int"),
    "a word that the policy does not know": ({"prompt": "juggle the zebra"}, "zebra"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_costs_nobody_else_theirs(policy, what):
    """Two good clients and a bad one in one batch: two answers, and an error that names what was wrong."""
    change, message = BAD[what]
    started, go = threading.Event(), threading.Event()

    class Slow:
        """Holds its first call until everybody has asked, so that the next batch has all of them."""

        noise_shape, batch_size, name = policy.noise_shape, 4, "slow"
        provenance = staticmethod(policy.provenance)

        def infer(self, observations, noise):
            started.set()
            assert go.wait(20)
            return policy.infer(observations, noise)

    seen, z = observations(3), noises(3, policy.noise_shape)
    with Served(Slow()) as server, contextlib.ExitStack() as stack:
        wires = [stack.enter_context(connect(server.url, compression=None)) for _ in range(4)]
        for wire in wires:
            wire.recv()
        wires[0].send(pack({**element(seen[0]), "noise": z[0]}))
        assert started.wait(20)
        for wire, one, noise in zip(wires[1:3], seen[1:], z[1:], strict=True):
            wire.send(pack({**element(one), "noise": noise}))
        wires[3].send(pack({**element(seen[0]), **change}))
        time.sleep(0.2)
        go.set()
        answers = [unpack(wire.recv(timeout=20))["actions"] for wire in wires[:3]]
        error = wires[3].recv(timeout=20)
        assert isinstance(error, str) and re.search(message, error), error
    alone = [policy.infer([framed(one)], noise[None]).actions[0] for one, noise in zip(seen, z, strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(answers, alone, strict=True))


def test_the_protocol_frame_by_frame(policy):
    (seen,) = observations(1)
    with Served(policy) as server:
        with connect(server.url, compression=None, max_size=None) as wire:
            assert unpack(wire.recv())["qlibero"]["noise_shape"] == [10, 7]  # the server speaks first
            for turn in range(2):
                wire.send(pack(element(seen)))
                answer = unpack(wire.recv())
                assert answer["actions"].shape == (10, 7) and answer["policy_timing"]["infer_ms"] > 0
                assert ("prev_total_ms" in answer["server_timing"]) == (turn == 1)
            wire.send(pack({"prompt": "nothing else"}))
            error = wire.recv()
            assert isinstance(error, str) and "lacks observation/image" in error and "Traceback" in error
            with pytest.raises(ConnectionClosed) as closed:
                wire.recv()
            assert closed.value.rcvd.code == 1011
        health = http.client.HTTPConnection("127.0.0.1", server.port)
        health.request("GET", "/healthz")
        reply = health.getresponse()
        assert (reply.status, reply.read()) == (200, b"OK\n")


def test_health_is_answered_while_the_policy_computes(policy):
    class Slow:
        noise_shape, batch_size, name = policy.noise_shape, 1, "slow"
        provenance = staticmethod(policy.provenance)

        def infer(self, observations, noise):
            time.sleep(2)
            return policy.infer(observations, noise)

    (seen,) = observations(1)
    with Served(Slow()) as server, connect(server.url, compression=None) as wire:
        wire.recv()
        wire.send(pack(element(seen)))
        started = time.monotonic()
        health = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        health.request("GET", "/healthz")
        assert health.getresponse().status == 200
        assert time.monotonic() - started < 1.5
        wire.recv()


def test_strangers_are_kept_out(policy):
    with pytest.raises(UserError, match="give a token"):
        ServerSettings(host="0.0.0.0").require_possible()
    ServerSettings(host="0.0.0.0", port=0, token=TOKEN).require_possible()
    with Served(policy, token=TOKEN) as server:
        with pytest.raises(InvalidStatus):
            connect(server.url)
        with pytest.raises(UserError, match="wants a token"):
            RemotePolicy(server.url, timeout_s=5.0)
        RemotePolicy(server.url, timeout_s=20.0, api_key=TOKEN).close()


def test_messages_are_bounded_and_never_code(policy):
    with Served(policy, max_message_bytes=10_000) as server, connect(server.url, compression=None) as wire:
        wire.recv()
        wire.send(b"x" * 20_000)
        with pytest.raises(ConnectionClosed) as closed:
            wire.recv()
        assert closed.value.rcvd.code == 1009
    for dtype in ("|O", "O", "V8", "<c16", 7):
        evil = msgpack.packb({b"__ndarray__": True, b"data": b"\0" * 16, b"dtype": dtype, b"shape": [1]})
        with pytest.raises(ValueError):
            unpack(evil)
    with pytest.raises(ValueError, match="is not 4 bytes"):
        unpack(msgpack.packb({b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": [1 << 40]}))
    for dtype, number in (("|u1", 256), ("|u1", -1), ("<i8", float("inf")), ("<i8", 1 << 63), ("<f4", [1])):
        with pytest.raises(ValueError, match="not a message of openpi's protocol"):
            unpack(msgpack.packb({b"__npgeneric__": True, b"data": number, b"dtype": dtype}))


def test_a_restarted_server_is_found_again(policy):
    seen, z = observations(2), noises(2, policy.noise_shape)
    with Served(policy) as first:
        port = first.port
        remote = RemotePolicy(first.url, batch_size=2, timeout_s=30.0)
        before = remote.infer(seen, z).actions
    with Served(policy, port=port):
        assert np.array_equal(remote.infer(seen, z).actions, before)
    remote.close()


@pytest.mark.parametrize("change", [{"sha256": "1" * 64}, {"flow_steps": 5}], ids=str)
def test_a_server_that_comes_back_as_another_policy_is_refused(policy, change):
    """A restart with another checkpoint on the same port must not finish the first one's episodes."""
    seen, z = observations(2), noises(2, policy.noise_shape)
    with Served(policy) as first:
        remote = RemotePolicy(first.url, batch_size=2, timeout_s=30.0)
        remote.infer(seen, z)
        port = first.port
    said = policy.provenance()
    other = Served(policy, port=port)
    other._server.metadata = {"qlibero": {"noise_shape": [10, 7], "provenance": {**said, **change}}}
    with other:
        for _ in range(2):
            with pytest.raises(GuardRefusal, match=f"{next(iter(change))} was .* is {next(iter(change.values()))!r}"):
                remote.infer(seen, z)
        with pytest.raises(GuardRefusal, match="not the one that this run began with"):
            remote.with_batch_size(3)
    assert remote.provenance()["sha256"] == said["sha256"]
    remote.close()


def test_a_server_error_is_an_error_here(policy):
    (seen,) = observations(1)
    unknown = type(seen)(seen.image, seen.wrist_image, seen.state, "juggle the zebra")
    with Served(policy) as server:
        remote = RemotePolicy(server.url, timeout_s=20.0)
        with pytest.raises(WorkFailed, match="zebra"):
            remote.infer([unknown], noises(1, policy.noise_shape))
        remote.infer([seen], noises(1, policy.noise_shape))  # and the next request finds a connection
        remote.close()
    with pytest.raises(WorkFailed, match="no policy server"):
        RemotePolicy("ws://127.0.0.1:9", timeout_s=0.3)


def test_a_foreign_server_gets_openpis_request_and_no_promises(policy):
    """A server with empty metadata, like openpi's own: 224 px, no noise key, and the provenance says what is lost."""
    heard = []

    class Foreign(PolicyServer):
        async def _answer(self, frame, work):
            heard.append(unpack(frame))
            return {"actions": np.zeros((10, 7)), "server_timing": {"infer_ms": 1.0}}

    served = Served(policy)
    served._server.__class__, served._server.metadata = Foreign, {}
    with served as server:
        remote = RemotePolicy(server.url, timeout_s=20.0)
        assert remote.infer(observations(1), noises(1, remote.noise_shape)).actions.shape == (1, 10, 7)
        remote.close()
    assert heard[0]["observation/image"].shape == (224, 224, 3) and "noise" not in heard[0]
    assert (
        not remote.provenance()["guarantees"]["noise"]
        and "neither repeatable" in remote.provenance()["guarantees"]["said"]
    )


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"port": 99999}, "--port 99999"),
        ({"port": -1}, "--port -1"),
        ({"host": "no.such.host.invalid"}, "--host no.such.host.invalid"),
        ({"host": "192.0.2.1", "token": "t"}, "no address of this machine"),
        ({"host": "0.0.0.0"}, "give a token"),
        ({"host": ""}, "give a token"),
        ({"host": "::"}, "give a token"),
        ({"ready_file": "/nowhere/ready.json"}, "--ready-file"),
    ],
    ids=str,
)
def test_a_server_that_could_not_listen_is_refused_before_a_policy_is_loaded(
    settings, message, tiny_experiment, capfd, monkeypatch
):
    monkeypatch.setattr(arms, "load_arms", lambda *_: pytest.fail("the policy was loaded first"))
    if "token" in settings:
        monkeypatch.setenv("QLIBERO_TEST_TOKEN", settings.pop("token"))
        settings = {**settings, "token-env": "QLIBERO_TEST_TOKEN"}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    assert cli.main(["serve", str(tiny_experiment), *flags]) == 2
    out, err = capfd.readouterr()
    assert message in json.loads(out)["error"]["message"] and "Traceback" not in err


def test_a_port_in_use_fails_before_a_policy_is_loaded(tiny_experiment, capfd, monkeypatch):
    monkeypatch.setattr(arms, "load_arms", lambda *_: pytest.fail("the policy was loaded first"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(tiny_experiment), "--port", str(port)]) == 1
    message = json.loads(capfd.readouterr().out)["error"]["message"]
    assert f"127.0.0.1:{port}" in message and "another --port" in message


def test_ready_file(policy, tmp_path):
    ready = tmp_path / "ready.json"
    with Served(policy, ready_file=ready) as server:
        assert json.loads(ready.read_text())["port"] == server.port
    assert not ready.exists()


def test_the_stock_client_is_served(policy, tmp_path):
    """openpi-client 0.1.2 as published, unchanged; installed without its numpy < 2 requirement."""
    package = ["--no-deps", "--target", tmp_path, "openpi-client==0.1.2"]
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", *map(str, package)], capture_output=True, text=True
    )
    assert installed.returncode == 0, f"without the stock client nothing is shown: {installed.stderr}"
    seen, z = framed(observations(1)[0]), noises(1, policy.noise_shape)
    np.savez(tmp_path / "in.npz", image=seen.image, wrist=seen.wrist_image, state=seen.state, noise=z[0])
    client = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
i = np.load({str(tmp_path / "in.npz")!r})
c = WebsocketClientPolicy(host="127.0.0.1", port=int(sys.argv[1]), api_key={TOKEN!r})
assert c.get_server_metadata()["qlibero"]["noise_shape"] == [10, 7]
e = {{"observation/image": i["image"], "observation/wrist_image": i["wrist"],
     "observation/state": i["state"], "prompt": {seen.prompt!r}}}
a = c.infer({{**e, "noise": i["noise"]}})["actions"]
b = c.infer(e)["actions"]
np.savez({str(tmp_path / "out.npz")!r}, a=a, b=b)
try:
    c.infer({{"prompt": "x"}})
except RuntimeError as error:
    assert "Error in inference server" in str(error)
else:
    raise SystemExit("the error did not reach the client")
"""
    with Served(policy, token=TOKEN) as server:
        done = subprocess.run(
            [sys.executable, "-c", client, str(server.port)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
    out = np.load(tmp_path / "out.npz")
    assert np.array_equal(out["a"], policy.infer([seen], z).actions[0]) and not np.array_equal(out["a"], out["b"])
