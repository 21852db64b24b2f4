"""Risk: the compiled flow of the CPU is not the flow of the network, or hides a NaN."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from pi05_small import conv_config, random_inputs, random_model, siglip_config

from qlibero.policies.pi05.config import GemmaConfig
from qlibero.policies.pi05.fast import cpu_flow
from qlibero.policies.pi05.model import cast
from qlibero.policies.pi05.sampler import Sampler

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


WIDER = conv_config(llm=GemmaConfig(96, 4, 128, 8, 32), expert=GemmaConfig(72, 4, 100, 8, 32), action_horizon=7)


@pytest.mark.parametrize("masked", [False, True], ids=["exact length", "padded"])
@pytest.mark.parametrize("config", [conv_config(), siglip_config(), WIDER], ids=["conv", "siglip", "odd sizes"])
def test_compiled_flow_is_the_torch_flow(config, masked):
    model, inputs = random_model(config), random_inputs(config, 2, 9)
    sampler = Sampler(model)
    assert sampler.cpu_flow is not None
    mask = torch.arange(9)[None].expand(2, -1) < torch.tensor([[9], [5]]) if masked else None
    compiled, _ = sampler(inputs["images"], inputs["tokens"], inputs["noise"], token_mask=mask, state=inputs["state"])
    sampler = Sampler(model)
    sampler.cpu_flow = None
    plain, _ = sampler(inputs["images"], inputs["tokens"], inputs["noise"], token_mask=mask, state=inputs["state"])
    assert plain.abs().max() > 0.5
    torch.testing.assert_close(compiled, plain, atol=3e-6, rtol=0)


def test_a_nan_anywhere_in_the_prefix_reaches_the_actions():
    config = conv_config()
    model, inputs = random_model(config), random_inputs(config, 1, 9)
    sampler = Sampler(model)
    sampler(inputs["images"], inputs["tokens"], inputs["noise"], state=inputs["state"])
    w = sampler.workspace(1, 2, 9, False)
    for buffer in (w.keys[1], w.values[0]):
        saved = buffer.clone()
        with torch.inference_mode():
            buffer[0, 3, 1] = float("nan")
            w.x.copy_(inputs["noise"])
            sampler.cpu_flow.run(w.x, w.keys, w.values, w.cos, w.sin, w.mask)
            assert torch.isnan(w.x).any()
            buffer.copy_(saved)


def test_exponential_is_accurate_and_lets_nan_through():
    x = np.concatenate([np.linspace(-100, 80, 20001), [np.nan, -np.inf]]).astype(np.float32)
    out, bits = np.empty_like(x), np.empty(len(x), np.int32)
    cpu_flow._exp(x, out, bits)
    exact = np.exp(np.maximum(x[:-2].astype(np.float64), -87.0))
    assert np.max(np.abs(out[:-2] - exact) / exact) < 4e-7
    assert np.isnan(out[-2]) and out[-1] < 1e-37


def test_results_say_which_flow_ran_and_why():
    """A quantized expert takes the torch path, which is slower: an arm's latency must not be read without it."""
    config = conv_config()
    plain = Sampler(random_model(config)).execution()
    assert plain["flow"] == "numba" and plain["glue"] == "torch" and plain["glue_reason"] == "no GPU"
    quantized = random_model(config)
    inner = quantized.expert.layers[0].mlp.down_proj
    quantized.expert.layers[0].mlp.down_proj = torch.nn.Sequential(inner)
    said = Sampler(quantized).execution()
    assert said["flow"] == "torch" and said["flow_reason"] == "1 of 21 linears of the expert are quantized"
    half = Sampler(cast(random_model(config), torch.bfloat16)).execution()
    assert half["flow"] == "torch" and "bfloat16" in half["flow_reason"]


COLD_OR_WARM = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[1])
from pi05_small import random_inputs, random_model, siglip_config
from qlibero.policies.pi05.fast import cpu_flow
from qlibero.policies.pi05.sampler import Sampler
torch.set_num_threads(1)
config = siglip_config()
inputs = random_inputs(config, 1, 9)
actions, _ = Sampler(random_model(config))(inputs["images"], inputs["tokens"], inputs["noise"], state=inputs["state"])
calls = [line for code in cpu_flow._flow.inspect_asm().values() for line in code.splitlines()
         if "call" in line and "cpu_flow" in line]
print(hashlib.sha256(actions.numpy().tobytes()).hexdigest(), sum(cpu_flow._flow.stats.cache_hits.values()), calls)
"""


def test_a_freshly_compiled_flow_and_one_from_the_cache_give_the_same_bits(tmp_path):
    """The first process of a checkout must not act differently from all later ones."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COLD_OR_WARM, os.path.dirname(__file__)]
    cold, warm = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split(maxsplit=2)
        for _ in range(2)
    )
    assert (cold[1], warm[1]) == ("0", "1"), "the first process must have compiled, the second must not"
    assert cold[0] == warm[0]
    assert cold[2].strip() == "[]", "the flow calls a function of ours: two copies of it may round differently"
