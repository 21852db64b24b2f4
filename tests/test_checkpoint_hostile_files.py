"""Risk: a structured file that nobody sanitised ends in a traceback, a hang, or a value taken for another."""

from __future__ import annotations

import os

import pytest
from pi05_small import conv_config
from test_checkpoint_formats import load, ours, settings

from qlibero.errors import UserError, WorkFailed
from qlibero.policies.pi05.verify import verify_checkpoint
from qlibero.policies.structured import Strict, fit, parse_json, read_json

BOMBS = {
    "lists": b"[" * 100_000 + b"]" * 100_000,
    "maps": b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    "just too deep": b'{"a":' * 40 + b"1" + b"}" * 40,
    "digits": b'{"a":' + b"9" * 5_000 + b"}",
    "bytes": bytes(range(256)),
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "twice": b'{"a": 1, "a": 2}',
    "utf-16": '{"a": 1}'.encode("utf-16")[:7],
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "assets/qlibero/libero/norm_stats.json"])
def test_every_json_file_of_a_checkpoint_is_read_within_bounds(tmp_path, file, name):
    path = ours(tmp_path / "c")
    (path / file).write_bytes(BOMBS[name])
    with pytest.raises(UserError, match=file.split("/")[-1]):
        load(path)
    if file == "config.json":
        with pytest.raises(UserError):
            verify_checkpoint(path)
    else:
        assert not verify_checkpoint(path)["ok"]


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(UserError, match="not a file"):
            read_json(path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(WorkFailed, match="cannot read"):
        read_json(tmp_path / "loop")


@pytest.mark.parametrize("key", ["llm.width", "llm.depth", "vision.cameras", "vocab_size", "state_dim"])
@pytest.mark.parametrize("value", [None, "8", -1, 0.5, True, [], 2**70], ids=str)
def test_an_architecture_of_other_types_or_sizes_is_refused_by_key(tmp_path, key, value):
    path = ours(tmp_path / "c")
    architecture = conv_config().to_dict()
    inner = architecture
    *outer, last = key.split(".")
    for name in outer:
        inner = inner[name]
    inner[last] = value
    settings(path, architecture=architecture)
    with pytest.raises(UserError, match=f"config.json: architecture.{key}"):
        load(path)


class Pair(Strict):
    a: int
    b: float = 0.0


def test_a_fault_is_named_by_its_key_and_never_longer_than_a_line():
    assert fit(Pair, {"a": 1, "b": 2}, "f") == Pair(a=1, b=2.0)
    for content, message in (
        ({}, "f: a is missing"),
        ({"a": 1, "c": 1}, "f: c is not a known key"),
        ({"a": "x" * 10_000}, "f: a is x"),
        ({"a": 1, "b": float("inf")}, "f: b is inf"),
        ([], "f: the file is"),
    ):
        with pytest.raises(UserError) as error:
            fit(Pair, content, "f")
        assert str(error.value).startswith(message) and len(str(error.value)) < 200
    with pytest.raises(UserError, match="the key 'a' stands|the key a stands"):
        parse_json('{"a": 1, "a": 1}', "f")
