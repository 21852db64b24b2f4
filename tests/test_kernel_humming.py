"""Risk: the adapter asks humming 0.1.19 for something else than the contract's product.

The package needs a GPU even to be constructed. Here stands a layer with its interface, as its source has it:
offset-binary codes in, int8 tokens and (M, 1) scales, bf16 out, rounded after each scale, K split unless it is told not
to.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from qlibero.kernels.contract import GemmShape, Support
from qlibero.kernels.exactness import try_kernel
from qlibero.kernels.humming import Humming


class HummingLayer(nn.Module):
    made = 0

    def __init__(self, *, shape_n, shape_k, weight_config, input_config, torch_dtype):
        super().__init__()
        assert input_config == {"dtype": "int8"} and torch_dtype == torch.bfloat16
        HummingLayer.made += 1
        self.zero = 1 << (int(weight_config["dtype"].removeprefix("int")) - 1)
        self.shape = (shape_n, shape_k)
        self.humming_config = SimpleNamespace(should_apply_bs_on_c=True)
        self.register_buffer("locks", torch.zeros(8, dtype=torch.int32))

    def load_from_tensors(self, tensors):
        weight, scale = tensors["weight"], tensors["weight_scale"]
        assert (
            weight.shape == self.shape
            and weight.dtype == torch.int32
            and 0 <= weight.min()
            and weight.max() < 2 * self.zero
        )
        assert scale.shape == (self.shape[0], 1) and scale.dtype == torch.bfloat16
        self.weight = nn.Parameter((weight - self.zero).to(torch.int8), requires_grad=False)

    def transform(self):
        self.weight_scale = None  # whoever forgets to set it afterwards fails

    def forward(self, inputs, *, input_scale, compute_config):
        assert inputs.dtype == torch.int8 and inputs.is_contiguous()
        assert (
            input_scale.shape == (len(inputs), 1) and input_scale.dtype == torch.float32 and input_scale.is_contiguous()
        )
        parts = 1 if json.loads(compute_config).get("use_batch_invariant") else 2
        y = 0
        for x, w in zip(inputs.chunk(parts, 1), self.weight.chunk(parts, 1), strict=True):
            acc = x.double() @ w.double().t()
            y = y + (acc.float() * input_scale).bfloat16() * self.weight_scale
        return y


@pytest.fixture
def humming(monkeypatch):
    package, ops, layer, transform = (ModuleType(f"humming{name}") for name in ("", ".ops", ".layer", ".transform"))
    package.ops, ops.pack_weight = ops, lambda codes, bits: codes
    layer.HummingLayer = HummingLayer
    transform.transform_humming_weight_scale = lambda scale, to_apply_on_c: scale.t().contiguous()
    for module in (package, ops, layer, transform):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Humming, "supports", lambda self, shape: Support(True))
    HummingLayer.made = 0
    return Humming()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_adapter_passes_validation_and_a_weight_is_packed_once(humming, bits):
    finding = try_kernel(humming, GemmShape(64, 192, bits), (1, 10, 33))
    assert finding.ok, finding.reason
    assert HummingLayer.made == 3  # one to read back and one for each kind of codes, however many scales came


def test_a_split_k_would_be_refused(humming, monkeypatch):
    monkeypatch.setattr("qlibero.kernels.humming.COMPUTE", "{}")
    assert not try_kernel(humming, GemmShape(64, 192), (10,)).ok


def test_all_that_the_package_keeps_is_counted(humming):
    packed = humming.pack(torch.zeros(64, 192, dtype=torch.int8))
    assert packed.nbytes == 64 * 192 + 8 * 4  # codes and locks; the scales are the run's own
