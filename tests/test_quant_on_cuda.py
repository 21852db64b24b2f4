"""Risk: on a GPU, where transform and quantizer are fused kernels, arms see other integers.

Skipped without a GPU; `python -m pytest tests/test_quant_on_cuda.py` on a machine that has one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pi05_small import PROMPTS, STATISTICS, conv_config, noises, observations, random_model
from quant_settings import quant_of

from qlibero.errors import UserError
from qlibero.kernels import cuda_w4a8
from qlibero.kernels.contract import live_bytes
from qlibero.policies.pi05.config import GemmaConfig
from qlibero.policies.pi05.model import cast
from qlibero.policies.pi05.normalize import from_openpi
from qlibero.policies.pi05.policy import Pi05Policy
from qlibero.policies.pi05.profiles import PROFILES
from qlibero.policies.pi05.tokenizer import WordTokenizer, split_words
from qlibero.quant.apply import quantize_policy
from qlibero.quant.calibrate import calibrate
from qlibero.quant.linear import QuantLinear
from qlibero.registry import MethodPlugin, built_in

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def policy() -> Pi05Policy:
    return policy_of(GemmaConfig(256, 3, 512, 8, 32), GemmaConfig(192, 3, 512, 8, 32))


def policy_of(llm: GemmaConfig, expert: GemmaConfig, batch_size: int = 2) -> Pi05Policy:
    config = conv_config(llm=llm, expert=expert)
    model = cast(random_model(config), torch.bfloat16).to("cuda").requires_grad_(False)
    statistics = {name: from_openpi(values, "quantile", name) for name, values in STATISTICS.items()}
    tokenizer = WordTokenizer(sorted({word for prompt in PROMPTS for word in split_words(prompt)}))
    return Pi05Policy(
        "small",
        model,
        PROFILES["qlibero"],
        statistics,
        tokenizer,
        batch_size=batch_size,
        flow_steps=4,
        identity={"sha256": "1" * 64},
    )


@pytest.mark.parametrize(
    "changes",
    [
        *({"method": method} for method in built_in(MethodPlugin)),
        {"layout": "llm+expert", "group_size": 64},
        {"layout": "llm+expert_mlp", "activation_bits": 4},
        {"corrections": ("atm", "ohb"), "layout": "llm+expert"},
        {"method": "weight_pca", "row_rotation": True},
    ],
    ids=str,
)
def test_calibrated_on_the_gpu_and_equal_on_every_exact_backend(policy, changes):
    spec = quant_of(**{"rotation_steps": 16, **changes})
    data = {"data_sha256": "2" * 64}
    artifact = calibrate(policy, observations(3), noises(3, policy.noise_shape), spec, data)
    seen, noise = observations(2, seed=7), noises(2, policy.noise_shape, seed=7)
    reference = quantize_policy(policy, artifact, "int_ref").infer(seen, noise).actions
    for backend in ("fake", "triton_w4a8"):
        actions = quantize_policy(policy, artifact, backend).infer(seen, noise).actions
        assert np.array_equal(actions, reference), backend
    assert not np.array_equal(reference, policy.infer(seen, noise).actions)


@pytest.mark.skipif(cuda_w4a8.missing() is not None, reason=str(cuda_w4a8.missing()))
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("layout", ["llm", "llm+expert"])
@pytest.mark.parametrize("method", ["smooth_hadamard", "duquant", "rtn"])
def test_on_a_hopper_the_cuda_backend_acts_like_the_reference(method, layout, batch_size):
    """Widths that the kernel takes; codes arrive in its own layout, gelu(gate)·up is computed with the transform."""
    policy = policy_of(GemmaConfig(1024, 3, 4096, 8, 128), GemmaConfig(512, 3, 1024, 8, 128), batch_size)
    spec = quant_of(method=method, layout=layout, rotation_steps=4)
    artifact = calibrate(policy, observations(3), noises(3, policy.noise_shape), spec, {"data_sha256": "2" * 64})
    seen, noise = observations(2, seed=7), noises(2, policy.noise_shape, seed=7)
    reference, *others = (
        quantize_policy(policy, artifact, backend).infer(seen, noise).actions
        for backend in ("int_ref", "fake", "triton_w4a8", "cuda_w4a8")
    )
    assert all(np.array_equal(actions, reference) for actions in others)


def test_online_factors_are_not_kept_twice_on_the_gpu(policy):
    artifact = calibrate(
        policy, observations(3), noises(3, policy.noise_shape), quant_of(rotation_steps=16), {"data_sha256": "2" * 64}
    )
    quantized = quantize_policy(policy, artifact, "fake")
    transforms = {
        id(m.transform): m.transform for m in quantized.model.modules() if isinstance(m, QuantLinear)
    }.values()
    quantized.infer(observations(1), noises(1, policy.noise_shape))  # whatever is made on first use is there now
    used = [transform for transform in transforms if transform._fused is not None]  # the last layer stops at its keys
    assert used
    for transform in used:
        read = live_bytes(t for t in vars(transform._fused[1]).values() if isinstance(t, torch.Tensor))
        assert transform.nbytes == read  # the fused kernel's tensors, and none besides


def test_weight_only_layers_run_dequantized_on_the_gpu(policy):
    spec = quant_of(rotation_steps=16, activation_bits=16)
    artifact = calibrate(policy, observations(3), noises(3, policy.noise_shape), spec, {"data_sha256": "2" * 64})
    seen, noise = observations(2, seed=7), noises(2, policy.noise_shape, seed=7)
    found = quantize_policy(policy, artifact, "fake").infer(seen, noise).actions
    assert np.isfinite(found).all() and not np.array_equal(found, policy.infer(seen, noise).actions)
    with pytest.raises(UserError, match="16-bit activations"):
        quantize_policy(policy, artifact, "triton_w4a8")


def test_kernels_that_overlap_change_no_bit(monkeypatch):
    """A batch of one row, of widths that products of few rows take: every kernel of a flow that may overlap does."""
    policy = policy_of(GemmaConfig(256, 3, 512, 8, 64), GemmaConfig(512, 3, 1024, 8, 64), batch_size=1)
    artifact = calibrate(
        policy,
        observations(3),
        noises(3, policy.noise_shape),
        quant_of(rotation_steps=16, layout="llm+expert_mlp"),
        {"data_sha256": "2" * 64},
    )
    seen, noise = observations(1, seed=7), noises(1, policy.noise_shape, seed=7)

    def answers() -> list[np.ndarray]:
        twins = (
            policy.with_model(policy.model),
            *(quantize_policy(policy, artifact, name) for name in ("fake", "triton_w4a8")),
        )
        assert all(twin.sampler.layer_ops.name == "triton" for twin in twins)
        return [twin.infer(seen, noise).actions for twin in twins]

    overlapped = answers()
    monkeypatch.setattr("qlibero.kernels.triton_pdl._can_overlap", lambda device: False)
    assert all(np.array_equal(one, other) for one, other in zip(overlapped, answers(), strict=True))
