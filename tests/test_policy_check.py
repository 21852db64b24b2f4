"""The risk: a kernel that is right when it is tried, and not what decides the policy's actions."""

from __future__ import annotations

import pytest
import torch
from pi05_small import noises, observations
from test_fake_equals_kernel import made, small_policy

from qlibero.errors import GuardRefusal
from qlibero.kernels.cpu_int4 import CpuInt4
from qlibero.quant.apply import quantize_policy
from qlibero.quant.linear import QuantLinear
from qlibero.quant.policy_check import check_policy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def policy():
    return small_policy()


def ask(policy, quantized, artifact):
    return check_policy(policy, quantized, artifact, observations(1)[0], noises(1, policy.noise_shape)[0])


@pytest.mark.parametrize(
    "changes", [{}, {"layout": "llm+expert", "group_size": 16}, {"method": "weight_pca", "row_rotation": True}], ids=str
)
def test_an_honest_policy_consumes_int8_in_every_layer_and_changes_no_action(policy, changes):
    artifact = made(policy, **changes)
    quantized = quantize_policy(policy, artifact, "cpu_int4")
    found = ask(policy, quantized, artifact)
    assert found.layers_consuming_int8 == sum(layer.executed for layer in artifact.layers)
    assert found.action_difference == 0.0
    transforms = [m.transform for m in quantized.model.modules() if isinstance(m, QuantLinear)]
    assert not any("quantize" in t.__dict__ for t in transforms)  # nobody listens afterwards


def test_a_layer_that_multiplies_in_bf16_is_named(policy, monkeypatch):
    artifact = made(policy)
    quantized = quantize_policy(policy, artifact, "cpu_int4")
    exact = CpuInt4.matmul

    def rounded(self, codes_x, s_x, packed, s_w, bias=None, out_dtype=torch.float32):
        return exact(self, codes_x, s_x.bfloat16().float(), packed, s_w, bias, out_dtype)

    monkeypatch.setattr(CpuInt4, "matmul", rounded)
    with pytest.raises(GuardRefusal, match=r"kernel cpu_int4 in .*_proj: int8 activations"):
        ask(policy, quantized, artifact)


def test_what_a_run_does_beyond_the_plain_network_is_compared_too(policy):
    """Batches, the compiled flow, fused ops and graphs belong to the sampler, which only `infer` goes through."""
    artifact = made(policy)
    quantized = quantize_policy(policy, artifact, "cpu_int4")
    begin = quantized.sampler.begin

    def slightly_off(*arguments, **named):
        sampling = begin(*arguments, **named)
        actions, times = sampling.result()
        sampling.result = lambda: (actions + 1e-4, times)
        return sampling

    quantized.sampler.begin = slightly_off
    with pytest.raises(GuardRefusal, match="actions differ from `fake`"):
        ask(policy, quantized, artifact)


def test_another_artifact_s_weights_are_noticed(policy):
    quantized = quantize_policy(policy, made(policy), "cpu_int4")
    with pytest.raises(GuardRefusal, match="largest difference"):
        ask(policy, quantized, made(policy, weight_clip=0.8))


def test_a_fused_transform_that_lies_is_refused():
    """All backends share its codes, so it is held against torch itself."""
    from qlibero.errors import GuardRefusal
    from qlibero.kernels.contract import quantize_activations
    from qlibero.quant.transform import Transform, verify_fused

    blocks = torch.linalg.qr(torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(3)))[0].bfloat16()
    transform = Transform(first=blocks, order=torch.randperm(64).int(), second=blocks.flip(0))

    def honest(x):
        return quantize_activations(transform.forward(x.float()))

    def forgets_the_second_rotation(x):
        return quantize_activations(Transform(first=blocks, order=transform.order).forward(x.float()))

    def right_for_one_row(x):
        return honest(x if len(x) == 1 else x.roll(1, 0))

    verify_fused(honest, transform, 64, torch.device("cpu"))
    verify_fused(quantize_activations, Transform(), 64, torch.device("cpu"))  # rtn: nothing before the quantizer
    for liar in (forgets_the_second_rotation, right_for_one_row):
        with pytest.raises(GuardRefusal, match="other codes than torch"):
            verify_fused(liar, transform, 64, torch.device("cpu"))
