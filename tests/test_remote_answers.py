"""Risk: a server's answer for another robot is cut to seven numbers, and its failures are counted as the policy's."""

from __future__ import annotations

import contextlib
import json
import threading

import msgpack
import numpy as np
import pytest
import yaml
from websockets.sync.server import serve

from qlibero import cli
from qlibero.errors import GuardRefusal, WorkFailed
from qlibero.policies.base import blank_observation
from qlibero.policies.remote import RemotePolicy


def encode(value):
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def a(*shape, value=0.25, dtype=np.float32):
    return np.full(shape, value, dtype)


@contextlib.contextmanager
def foreign(*answers, metadata=None):
    """A server of the protocol as websockets makes it; answers in turn, the last one for ever. Yields its URL."""
    given = list(answers)

    def handle(wire):
        wire.send(metadata if isinstance(metadata, bytes | str) else msgpack.packb(metadata, default=encode))
        for _ in wire:
            answer = given.pop(0) if len(given) > 1 else given[0]
            wire.send(answer if isinstance(answer, bytes | str) else msgpack.packb(answer, default=encode))

    server = serve(handle, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
    finally:
        server.shutdown()
        thread.join()


def ask(url, calls=1):
    policy = RemotePolicy(url, timeout_s=5.0)
    try:
        for _ in range(calls):
            chunk = policy.infer(
                [blank_observation("pick up the milk")], np.zeros((1, *policy.noise_shape), np.float32)
            )
        return chunk
    finally:
        policy.close()


GOOD = {
    "ten": a(10, 7),
    "one": a(1, 7),
    "fifty": a(50, 7),
    "double": a(10, 7, dtype=np.float64),
    "half": a(10, 7, dtype=np.float16),
    "whole numbers": a(10, 7, value=1, dtype=np.int8),
    "lists": a(10, 7).tolist(),
    "a little beyond": a(10, 7, value=-1.7),
}


@pytest.mark.parametrize("what", GOOD)
@pytest.mark.parametrize("timing", [{}, {"server_timing": None}, {"server_timing": {"infer_ms": "soon"}}], ids=str)
def test_what_is_seven_numbers_is_taken_as_it_is(what, timing):
    with foreign({"actions": GOOD[what], **timing}) as url:
        chunk = ask(url)
    assert np.array_equal(chunk.actions[0], np.asarray(GOOD[what], np.float32)) and chunk.phases_ms["server"] == 0.0


BAD = {
    "14 numbers": ({"actions": a(10, 14)}, r"actions has shape \(10, 14\), expected \(H, 7\)"),
    "8 numbers": ({"actions": a(10, 8)}, r"\(10, 8\)"),
    "32 numbers": ({"actions": a(10, 32)}, r"\(10, 32\)"),
    "6 numbers": ({"actions": a(10, 6)}, r"\(10, 6\)"),
    "a batch": ({"actions": a(1, 10, 7)}, r"\(1, 10, 7\)"),
    "a batch of seven": ({"actions": a(7, 7, 7)}, r"\(7, 7, 7\)"),
    "one action alone": ({"actions": a(7)}, r"\(7,\)"),
    "none": ({"actions": a(0, 7)}, r"\(0, 7\).*at least one row"),
    "a number": ({"actions": 0.5}, "actions is float"),
    "ragged lists": ({"actions": [[0.1] * 7, [0.1] * 6]}, "rows of actions differ in length|shape"),
    "lists of text": ({"actions": [["0.1"] * 7] * 10}, "actions are of type <U3"),
    "booleans": ({"actions": a(10, 7, value=True, dtype=bool)}, "actions are of type bool"),
    "a mapping": ({"actions": {"arm": a(10, 6), "gripper": a(10, 1)}}, "actions is dict"),
    "nothing": ({"actions": None}, "actions is NoneType"),
    "another key": ({"action": a(10, 7), "x": 1}, r"no key actions \(its keys: action, x\)"),
    "an error as a key": ({"error": "CUDA out of memory"}, "it says: CUDA out of memory"),
    "a list": ([a(10, 7)], "answer is list"),
    "NaN": ({"actions": a(10, 7, value=np.nan)}, r"\(10, 7\) holds NaN"),
    "one infinity": ({"actions": np.where(np.arange(70).reshape(10, 7) == 33, np.inf, 0.1)}, "holds NaN or infinity"),
    "joint angles in degrees": ({"actions": a(10, 7, value=-170.0)}, "actions holds 170"),
    "far too large": ({"actions": a(10, 7, value=1e6)}, "actions holds 1e"),
    "no message": (b"\x00\x01junk", "not a message of openpi's protocol"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_is_refused_at_the_first_call(what):
    answer, says = BAD[what]
    with foreign(answer) as url, pytest.raises(GuardRefusal, match=says) as refused:
        ask(url)
    assert url in str(refused.value) and len(str(refused.value)) < 500


METADATA = {
    "another robot": ({"action_dim": 14, "action_horizon": 50}, "action_dim 14"),
    "another robot's text": ({"action_dim": "14"}, "action_dim '14'"),
    "another chunk": ({"action_horizon": 50}, "10 rows, but 50 were declared"),
    "a list": ([1], "metadata is list"),
    "a text": ("hello", "metadata is str"),
    "no message": (b"\xc1", "not a message"),
    "qlibero's without its shape": ({"qlibero": {"provenance": {"name": "x"}}}, "lacks a noise_shape"),
    "qlibero's without a name": ({"qlibero": {"noise_shape": [10, 7], "provenance": {}}}, "provenance.name"),
    "qlibero's as a list": ({"qlibero": [1]}, "qlibero lacks"),
    "qlibero's of a giant": ({"qlibero": {"noise_shape": [1 << 40, 7], "provenance": {"name": "x"}}}, "noise_shape"),
}


@pytest.mark.parametrize("what", METADATA)
def test_metadata_that_contradicts_is_refused(what):
    said, says = METADATA[what]
    said = msgpack.packb(said) if isinstance(said, str) else said
    with foreign({"actions": a(10, 7)}, metadata=said) as url, pytest.raises(GuardRefusal, match=says):
        ask(url)


@pytest.mark.parametrize("said", [None, {}, {"qlibero": None}, {"action_dim": 7, "needs_wrist_camera": True}], ids=str)
def test_metadata_that_says_nothing_or_agrees_is_fine(said):
    with foreign({"actions": a(10, 7)}, metadata=said) as url:
        assert ask(url).actions.shape == (1, 10, 7)


def test_later_answers_may_not_change_their_shape_and_nan_is_left_to_its_episode():
    good, nan = {"actions": a(10, 7)}, {"actions": a(10, 7, value=np.nan)}
    with foreign(good, nan) as url:
        assert np.isnan(ask(url, 2).actions).all()
    for later, says in ((a(5, 7), "5 rows, but 10"), (a(10, 14), r"\(10, 14\)")):
        with foreign(good, {"actions": later}) as url, pytest.raises(GuardRefusal, match=says):
            ask(url, 2)


def test_a_servers_long_error_is_cut():
    with foreign("x" * 1_000_000) as url, pytest.raises(WorkFailed, match="reported an error") as failed:
        ask(url)
    assert len(str(failed.value)) < 5000


@pytest.mark.parametrize(
    "answer, replan, status, says",
    [
        ({"actions": a(10, 14)}, 5, 3, r"actions has shape (10, 14)"),
        ({"actions": a(1, 7)}, 5, 2, "policy.replan_steps is 5, but a chunk of this policy has 1 action:"),
        ({"actions": a(10, 7)}, 11, 2, "policy.replan_steps is 11, but a chunk of this policy has 10 actions"),
    ],
    ids=["another robot", "a chunk of one", "a chunk of ten"],
)
def test_nothing_is_recorded_for_a_policy_that_does_not_fit(
    answer, replan, status, says, tmp_path, tiny_experiment, capfd
):
    settings = yaml.safe_load(tiny_experiment.read_text())
    with foreign(answer) as url:
        settings |= {"policy": {"type": "remote", "url": url, "replan_steps": replan}, "backends": ["baseline"]}
        settings |= {"tasks": [0], "episodes_per_task": 1, "workers": 1}
        settings.pop("quant")
        (tmp_path / "remote.yaml").write_text(yaml.safe_dump(settings))
        assert cli.main(["run", str(tmp_path / "remote.yaml"), "--out", str(tmp_path / "out")]) == status
    assert says in json.loads(capfd.readouterr().out)["error"]["message"]
    assert not any(path.stat().st_size for path in (tmp_path / "out").rglob("episodes-*.jsonl"))


def test_a_policy_of_our_own_is_refused_before_it_is_calibrated(tmp_path, tiny_experiment, capfd):
    out = str(tmp_path / "out")
    assert cli.main(["run", str(tiny_experiment), "--set=policy.replan_steps=50", "--out", out]) == 2
    assert "policy.replan_steps is 50, but a chunk of this policy has 10" in capfd.readouterr().out
    assert not any(path.stat().st_size for path in (tmp_path / "out").rglob("episodes-*.jsonl"))
