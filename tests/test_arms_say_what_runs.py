"""Risk: a record credits a kernel, or a saving, that an arm did not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pi05_small import PROMPTS, STATISTICS, conv_config, observations, random_model

from qlibero.config.schema import Experiment
from qlibero.errors import GuardRefusal, UserError
from qlibero.policies.pi05.checkpoint import write_checkpoint
from qlibero.policies.pi05.tokenizer import WordTokenizer, split_words
from qlibero.quant import prepare
from qlibero.quant.observations import write_demonstrations
from qlibero.run import arms

LINEARS = 7 * conv_config().llm.depth


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("c")
    words = WordTokenizer(sorted({w for p in PROMPTS for w in split_words(p)}))
    write_checkpoint(path, random_model(conv_config()), name="small", statistics=STATISTICS, tokenizer=words.to_json())
    return path


@pytest.fixture
def load(checkpoint, tmp_path_factory, monkeypatch, said):
    """Arms of a tiny policy as a run loads them: (meta by arm, what was said)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "kernels"))
    monkeypatch.setattr(prepare, "ARTIFACTS", tmp_path_factory.getbasetemp() / "artifacts")
    monkeypatch.setattr(arms, "task_language", lambda suite, task: PROMPTS[0])

    def loading(backends, calibration=None, on_failure="refuse", **quant):
        if calibration:
            quant["calibration"] = {"path": calibration, "samples": 4}
        experiment = Experiment.model_validate(
            {
                "name": "x",
                "suite": "libero_object",
                "tasks": [0],
                "policy": {"type": "pi05", "checkpoint": checkpoint},
                "quant": {"method": "rtn", "layout": "llm", **quant},
                "backends": backends,
                "on_failure": on_failure,
            }
        )
        return arms.load_arms(experiment, experiment.arms())[1], said

    return loading


@pytest.mark.parametrize("backend", ["fake", "auto"])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_weight_only_arms_say_that_no_kernel_ran_and_that_nothing_was_saved(load, backend, weight_bits):
    meta, said = load([backend], weight_bits=weight_bits, activation_bits=16)
    found = meta[backend]
    assert {kernel["kernel"] for kernel in found["kernels"].values()} == {"dequantized"} and found["kernels_hash"]
    assert all("16-bit activations" in kernel["reason"] for kernel in found["kernels"].values())
    assert found["memory"]["ratio"] == 2.0  # float32 on a CPU, beside bf16
    assert f"{LINEARS} linears on dequantized" in said[-1]


def test_weight_only_arms_refuse_a_kernel_s_name(load):
    for backend in ("cpu_int4", "triton_w4a8", "humming"):
        with pytest.raises(GuardRefusal, match="has nothing to do"):
            load([backend], activation_bits=16)
    meta, _ = load(["humming"], activation_bits=16, on_failure="fallback")
    assert {kernel["verdict"] for kernel in meta["humming"]["kernels"].values()} == {"fall back to dequantized"}


def test_a_real_kernel_s_memory_is_measured_beside_bf16_and_the_policy_is_checked(load, tmp_path, monkeypatch):
    heard = []
    plain = arms.check_policy
    monkeypatch.setattr(arms, "check_policy", lambda *a: heard.append(a[3]) or plain(*a))
    meta, _ = load(
        ["fake", "cpu_int4"],
        calibration=write_demonstrations(tmp_path / "seen.npz", observations(4), "random, for tests"),
    )
    memory = {name: found["memory"] for name, found in meta.items()}
    assert memory["cpu_int4"]["weight_bytes"] * 4 == memory["cpu_int4"]["bf16_bytes"] == memory["fake"]["bf16_bytes"]
    assert memory["fake"]["ratio"] > 2 and memory["cpu_int4"]["ratio"] < 0.36
    assert meta["fake"]["witness"] is None and meta["cpu_int4"]["witness"]["action_difference"] == 0.0
    # a run says what its arms do to actions, on the one demonstration of four that fitted nothing
    assert meta["fake"]["action_error"] == meta["cpu_int4"]["action_error"]
    assert meta["fake"]["action_error"]["observations"] == 1 and meta["fake"]["action_error"]["arm"] > 0
    (observation,) = heard  # a demonstration's, under an instruction of this experiment
    assert observation.prompt == PROMPTS[0] and observation.image.std() > 0


def test_an_arm_in_which_no_layer_runs_is_no_arm(load):
    with pytest.raises(UserError, match="nothing for a kernel to do"):
        load(["fake"], layout=None, include=[r"layers\.2\.mlp\.down_proj"], exclude=["gemma_expert"])
