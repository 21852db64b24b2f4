"""Risk: the success rate measured with `fake` is not the success rate of the kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pi05_small import PROMPTS, STATISTICS, conv_config, noises, observations, random_model
from quant_settings import quant_of

from qlibero.kernels import load
from qlibero.kernels.contract import GemmShape
from qlibero.policies.pi05.normalize import from_openpi
from qlibero.policies.pi05.policy import Pi05Policy
from qlibero.policies.pi05.profiles import PROFILES
from qlibero.policies.pi05.tokenizer import WordTokenizer, split_words
from qlibero.quant.apply import gemm_shapes, memory, quantize_policy
from qlibero.quant.calibrate import calibrate
from qlibero.quant.linear import QuantLinear, Weights, assemble
from qlibero.registry import MethodPlugin, built_in

pytestmark = pytest.mark.slow

BACKENDS = ("fake", "int_ref", "cpu_int4")


def small_policy() -> Pi05Policy:
    """A random 0.5 M parameter policy, ready to be asked."""
    torch.set_num_threads(1)
    statistics = {name: from_openpi(values, "quantile", name) for name, values in STATISTICS.items()}
    tokenizer = WordTokenizer(sorted({word for prompt in PROMPTS for word in split_words(prompt)}))
    return Pi05Policy(
        "small",
        random_model(conv_config()),
        PROFILES["qlibero"],
        statistics,
        tokenizer,
        batch_size=1,
        flow_steps=4,
        identity={"sha256": "1" * 64},
    )


@pytest.fixture(scope="module")
def policy() -> Pi05Policy:
    return small_policy()


def made(policy: Pi05Policy, **changes):
    spec = quant_of(**{"block_size": 16, "rotation_steps": 16, **changes})
    return calibrate(policy, observations(3), noises(3, policy.noise_shape), spec, {"data_sha256": "2" * 64})


def asked(policy) -> np.ndarray:
    return policy.infer(observations(2, seed=7), noises(2, policy.noise_shape, seed=7)).actions


@pytest.mark.parametrize(
    "changes",
    [
        *({"method": method} for method in built_in(MethodPlugin)),
        {"layout": "llm+expert", "group_size": 16},
        {"layout": "llm+expert_mlp", "activation_bits": 4},
        {"rounding": "gptq", "weight_clip": 0.9},
        {"method": "weight_pca", "row_rotation": True},
        {"corrections": ("atm", "ohb"), "layout": "llm+expert", "activation_bits": 4},
        {"per_layer_bits": {"k_proj": 16, "q_proj": 8, r"layers\.1\.mlp": 16}},
        {"activation_clip": 0.9},
        {"layout": None, "include": (r"layers\.0\.mlp", "gemma_expert.*o_proj"), "method": "hadamard"},
    ],
    ids=str,
)
def test_actions_are_equal_bit_for_bit(policy, changes):
    artifact = made(policy, **changes)
    reference = asked(quantize_policy(policy, artifact, "int_ref"))
    for backend in BACKENDS:
        kernels = {x.name: "fake" if backend == "cpu_int4" and x.weight_bits == 8 else backend for x in artifact.layers}
        assert np.array_equal(asked(quantize_policy(policy, artifact, kernels)), reference), backend
    assert not np.array_equal(reference, asked(policy))


@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize(("n", "k"), [(320, 256), (768, 256), (256, 768), (192, 512)])
def test_layer_outputs_are_equal_bit_for_bit(n, k, group_size):
    """The embedded policy's own widths, with a batch's ragged token counts and outlier-heavy input."""
    from qlibero.kernels.contract import quantize_weights
    from qlibero.quant.methods import GroupData, fit
    from qlibero.quant.transform import InputTransform

    g = torch.Generator().manual_seed(n + k)
    x = torch.randn(154, k, generator=g) * torch.exp(torch.randn(k, generator=g) * 2)
    w = torch.randn(n, k, generator=g)
    size = x.abs().amax(0), x.abs().mean(0), x.square().mean(0).sqrt()
    t = InputTransform(fit(GroupData((w,), *size, x, 0), quant_of(rotation_steps=4)), k)
    codes, scales = quantize_weights(t.factors().weights(w).float(), 4, group_size)
    outputs = {}
    for name in BACKENDS:
        kernel = load(name)
        assert kernel.supports(GemmShape(n, k, group_size=group_size)).ok
        (module,) = assemble(
            kernel,
            t,
            [Weights(codes, scales)],
            weight_bits=4,
            activation_bits=8,
            activation_clip=1.0,
            dtype=torch.float32,
        )
        outputs[name] = [module(x[:m]) for m in (154, 10, 1)]
        prepared = module.prepare(x)
        assert prepared.codes.dtype == torch.int8
        # the kernel really got integers: its accumulator is the integer product
        acc = kernel.accumulate(prepared.codes, module.product.packed)
        if group_size is None:
            assert torch.equal(acc.to(torch.int32), prepared.codes.int() @ codes.int().T)
    for name in BACKENDS:
        for ours, reference in zip(outputs[name], outputs["int_ref"], strict=True):
            assert torch.equal(ours, reference), name


def test_the_packed_kernel_really_saves_memory_and_shares_the_rest(policy):
    artifact = made(policy, method="rtn")
    quantized = quantize_policy(policy, artifact, "cpu_int4")
    measured = memory(quantized.model, artifact)
    assert (
        measured.weights * 4 == measured.bf16 and measured.summary()["ratio"] <= 0.36
    )  # scales weigh more at 64 inputs
    shared = {id(p) for p in policy.model.parameters()}
    assert all(id(p) in shared for p in quantized.model.parameters())
    replaced = {layer.name for layer in artifact.layers}
    assert {n for n, m in quantized.model.named_modules() if isinstance(m, QuantLinear)} == replaced
    assert not any(isinstance(m, QuantLinear) for m in policy.model.modules())
    assert (
        set(gemm_shapes(artifact)) == {x.name for x in artifact.layers if x.executed}
        and len(gemm_shapes(artifact)) == 16
    )


def test_calibration_is_a_function_of_its_inputs_and_leaves_no_trace(policy):
    before = asked(policy)
    first, second = made(policy), made(policy)
    assert first.sha256 == second.sha256
    assert np.array_equal(asked(policy), before)
    assert not any(m._forward_pre_hooks for m in policy.model.modules()) and "run_llm" not in vars(policy.model)
    assert made(policy, calibration_seed=1).sha256 != first.sha256


def test_what_calibration_runs_is_what_the_policy_runs(policy):
    """Calibration asks the plain model, one unpadded observation at a time; the sampler, batches and padding
    included, must mean the same computation, or statistics would be of another network."""
    z = noises(3, policy.noise_shape)
    eager = np.stack([policy.sample_eagerly(o, n).numpy() for o, n in zip(observations(3), z, strict=True)])
    for asked_in_batches in (policy, policy.with_batch_size(3)):
        actions = asked_in_batches.infer(observations(3), z).actions
        expected = policy._statistics["actions"].denormalize(eager)[..., :7]
        assert np.abs(actions - expected).max() < 1e-5
    padded, alone = made(policy.with_batch_size(3)), made(policy)
    assert padded.layers == alone.layers and padded.calibration["tokens"] == alone.calibration["tokens"]


def test_corrections_undo_a_known_distortion(policy):
    """A student whose q_proj is 10 % too loud and whose o_proj 20 % too quiet gets exactly those factors back."""
    from qlibero.quant.corrections import AttentionSeen, atm, ohb

    def temperatures(teacher, student):
        return atm.factors(AttentionSeen(logit_std=teacher), AttentionSeen(logit_std=student))

    def balance(teacher, student):
        (factor,) = ohb.factors(AttentionSeen(output_rms=teacher), AttentionSeen(output_rms=student))
        return factor

    assert temperatures(torch.tensor([1.0, 1.0, 1.0, 9.0]), torch.tensor([1.1, 1.03, 0.1, 1.0]))[1:] == [
        1.0,
        1.25,
        1.25,
    ]
    assert temperatures(torch.tensor([1.0]), torch.tensor([1.1])) == [pytest.approx(1 / 1.1, abs=1e-5)]
    assert balance(1.0, 0.8) == pytest.approx(1.25, abs=1e-5) and balance(1.0, 1.02) == 1.0
    assert balance(1.0, 0.01) == pytest.approx(np.exp(0.3), abs=1e-5)
    artifact = made(
        policy, corrections=("atm", "ohb"), layout="llm+expert_mlp", activation_bits=4, method="rtn", rounding="nearest"
    )
    plain = made(policy, layout="llm+expert_mlp", activation_bits=4, method="rtn", rounding="nearest")
    assert artifact.corrections and not plain.corrections
    name, factors = next((n, f) for n, f in artifact.corrections.items() if n in {x.name for x in artifact.layers})
    rows = torch.tensor(factors).repeat_interleave(artifact.layer(name).out_features // len(factors))
    scaled, before = artifact.scales(name) / plain.scales(name), rows
    assert torch.allclose(scaled, before, rtol=0.01)  # the factors are in the scales (bfloat16)
    kept = {n: f for n, f in artifact.corrections.items() if n not in {x.name for x in artifact.layers}}
    quantized = quantize_policy(policy, artifact, "fake")
    for name, factors in kept.items():  # linears outside the layout: scaled copies, the original untouched
        original, copy = policy.model.get_submodule(name), quantized.model.get_submodule(name)
        rows = torch.tensor(factors).repeat_interleave(len(original.weight) // len(factors))
        assert torch.equal(copy.weight, original.weight * rows[:, None])


def test_episodes_of_a_packed_kernel_are_those_of_fake(tiny_experiment, tmp_path):
    """Real LIBERO, real packed weights: not similar success rates but the same actions, step by step."""
    from qlibero.config.load import load_experiment
    from qlibero.results.ledger import read_ledger
    from qlibero.run.experiment import run_experiment

    sets = ["backends=[baseline,fake,cpu_int4]", "tasks=[0]", "episodes_per_task=2", "quant.layout=llm+expert"]
    assert run_experiment(load_experiment(tiny_experiment, sets), tmp_path).complete
    arms = {
        arm: {record.key: (record.action_digest, record.outcome, record.steps) for record in read_ledger(tmp_path, arm)}
        for arm in ("baseline", "fake", "cpu_int4")
    }
    assert len(arms["fake"]) == 2 and arms["fake"] == arms["cpu_int4"]
    assert all(arms["fake"][key][0] != arms["baseline"][key][0] for key in arms["fake"])
