"""Risk: `kernels`, `quantize`, `inspect` say other than what they found, or blame a kernel for a bad request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlibero import cli
from qlibero.kernels import shapes

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture
def ask(capfd, monkeypatch, tmp_path):
    """A command: (exit status, its JSON line, what people read). A few layers stand for all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    every = shapes.compact_layers
    monkeypatch.setattr(shapes, "compact_layers", lambda *a: every(*a)[:3])

    def asking(*arguments: str | Path) -> tuple[int, Any, str]:
        status = cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert out.count("\n") == 1
        return status, json.loads(out), err

    return asking


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(("check", "--device", "cuda"), "torch sees no GPU", marks=without_gpu),
        pytest.param(("bench", "--device", "cuda"), "torch sees no GPU", marks=without_gpu),
        (("check", "--activation-bits", "16"), "invalid choice: 16"),
        (("check", "--group-size", "0"), "group_size 0 does not divide the layer's input width"),
        (("bench", "--group-size", "7"), "group_size 7 does not divide the layer's input width"),
        (("check", "--backend", "int5"), "there is no kernel 'int5'"),
        (("bench", "--device", "cpu", "--backend", "bitblas"), "nothing to time: bitblas: not installed: pip install"),
    ],
)
def test_a_wrong_request_is_not_the_kernels_fault(ask, arguments, says):
    status, document, err = ask("kernels", *arguments)
    assert status == 2 and says in document["error"]["message"] and says in err and "Traceback" not in err
    assert err.count("qlibero: ") == 1


def test_check_shows_what_passed_and_under_the_name_that_was_asked_for(ask):
    asked = ("kernels", "check", "--device", "cpu", "--backend", "cpu_int4", "--backend", "auto")
    status, document, err = ask(*asked)
    assert status == 0 and {v["verdict"] for v in document["verdicts"]} == {"pass"}
    assert [v["requested"] for v in document["verdicts"]] == ["cpu_int4"] * 3 + ["auto"] * 3
    (row,) = (line.split() for line in err.splitlines() if line.startswith("auto"))
    assert row[1] in ("cpu_int4", "w8a8") and row[2:4] == ["3", "3"]
    assert all(v["cached"] for v in ask(*asked)[1]["verdicts"] if v["requested"] == "cpu_int4")
    assert not ask(*asked, "--forget")[1]["verdicts"][0]["cached"]


@without_gpu
def test_a_refusal_comes_with_every_verdict_and_no_advice_for_experiments(ask):
    status, document, err = ask("kernels", "check", "--backend", "cpu_int4", "--backend", "triton_w4a8")
    assert status == 3 == document["error"]["exit_status"] and document["error"]["kind"] == "GuardRefusal"
    assert [v["verdict"] for v in document["verdicts"]] == ["pass"] * 3 + ["refuse"] * 3
    assert "triton_w4a8 was refused in 3 of 6 layers" in err and "on_failure" not in err and "quant.exclude" not in err


def test_bench_says_what_it_left_out_and_why(ask):
    status, document, err = ask("kernels", "bench", "--device", "cpu", "--backend", "cpu_int4", "--backend", "humming")
    assert status == 0 and {t["backend"] for t in document["timings"]} == {"unquantized", "cpu_int4"}
    assert "not installed" in document["left_out"]["humming"] and "not timed here" in err and "humming-kernels" in err


def test_quantize_and_inspect(ask, tiny_experiment, tmp_path):
    status, document, err = ask("quantize", tiny_experiment, "--out", tmp_path / "artifacts")
    (made,) = document["artifacts"]
    assert (
        status == 0 and made["arms"] == ["fake"] and made["made"] and f"duquant W4A8 search llm: {made['path']}" in err
    )
    assert "worst SQNR dB" in err and Path(made["path"]).is_file()
    assert not ask("quantize", tiny_experiment, "--out", tmp_path / "artifacts")[1]["artifacts"][0]["made"]

    status, shown, err = ask("inspect", made["path"], "--sort", "max_error", "--diff", made["path"])
    errors = [row["max_error"] for row in shown["layers"] if row["max_error"] is not None]
    assert status == 0 and errors == sorted(errors, reverse=True) and len(shown["layers"]) == 14
    assert "q_proj" in err and "the noisiest layers" in err and shown["diff"]["settings"] == {}
    status, only_json, err = ask("inspect", made["path"], "--sort", "max_error", "--diff", made["path"], "--json")
    assert status == 0 and only_json == shown and err == ""
    assert ask("inspect", made["path"], "--sort", "loudness")[0] == 2
    assert ask("inspect", tmp_path / "nothing")[0] == 2
    Path(made["path"]).write_bytes(Path(made["path"]).read_bytes()[:-1])
    assert ask("inspect", made["path"])[0] == 3
