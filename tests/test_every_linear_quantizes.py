"""Risk: a linear that a layout, an include or a hint can name cannot be quantized, because somebody asks it for what
only a full-precision linear has (case: the vision tower asked its first q_proj for a weight)."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from pi05_small import PROMPTS, STATISTICS, conv_config, noises, observations, random_model, siglip_config
from quant_settings import quant_of
from torch import nn

from qlibero.kernels.contract import GemmShape
from qlibero.kernels.shapes import Layer
from qlibero.kernels.validation import check, enforce
from qlibero.policies.pi05 import PLUGIN
from qlibero.policies.pi05.linears import QUANTIZABLE, part_of
from qlibero.policies.pi05.model import cast
from qlibero.policies.pi05.normalize import from_openpi
from qlibero.policies.pi05.policy import Pi05Policy
from qlibero.policies.pi05.profiles import PROFILES
from qlibero.policies.pi05.tokenizer import WordTokenizer, split_words
from qlibero.quant.apply import gemm_shapes, quantize_policy
from qlibero.quant.calibrate import calibrate
from qlibero.quant.inspect import hint
from qlibero.quant.linear import QuantLinear
from qlibero.quant.policy_check import check_policy

pytestmark = pytest.mark.slow

CONFIGS = {"siglip": (siglip_config(), "openpi"), "conv": (conv_config(), "qlibero")}


def policy_of(kind: str, dtype: torch.dtype = torch.float32) -> Pi05Policy:
    torch.set_num_threads(1)
    config, profile = CONFIGS[kind]
    return Pi05Policy(
        kind,
        cast(random_model(config), dtype),
        PROFILES[profile],
        {name: from_openpi(values, "quantile", name) for name, values in STATISTICS.items()},
        WordTokenizer(sorted({word for prompt in PROMPTS for word in split_words(prompt)})),
        batch_size=1,
        flow_steps=2,
        identity={"sha256": "1" * 64},
    )


def made(policy: Pi05Policy, **changes):
    spec = quant_of(**{"method": "rtn", "block_size": 16, "rotation_steps": 4, **changes})
    return calibrate(policy, observations(2), noises(2, policy.noise_shape), spec, {"data_sha256": "2" * 64})


def asked(policy: Pi05Policy) -> np.ndarray:
    return policy.infer(observations(1, seed=7), noises(1, policy.noise_shape, seed=7)).actions


def names_in(policy: Pi05Policy) -> list[str]:
    """What may be named: by hand, so that a pattern of `select` that loses some is noticed."""
    return [
        name
        for name, module in policy.model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-2:-1] in (["self_attn"], ["mlp"])
    ]


def test_what_can_be_named_is_what_the_layers_hold():
    for kind, count in (("siglip", 2 * 6 + 2 * 3 * 7), ("conv", 2 * 3 * 7)):
        names = names_in(policy_of(kind))
        assert len(names) == count and all(re.search(QUANTIZABLE, name) for name in names)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("siglip", torch.float32), ("siglip", torch.bfloat16), ("conv", torch.float32)], ids=str
)
def test_each_linear_alone(kind, dtype):
    """Every linear of the model, one at a time: it runs, it decides something, and the packed kernel is `fake`."""
    policy = policy_of(kind, dtype)
    before = asked(policy)
    last = f"language_model.layers.{policy.model.config.llm.depth - 1}."
    idle = {f"{last}{x}" for x in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")}
    idle |= {f"{last}mlp.down_proj"}
    for name in names_in(policy):
        if any(name.endswith(x) for x in idle):
            continue  # no action depends on it, and calibration refuses to quantize nothing
        artifact = made(policy, layout=None, include=(f"{re.escape(name)}$",))
        packed = quantize_policy(policy, artifact, "cpu_int4")
        assert isinstance(packed.model.get_submodule(name), QuantLinear)
        actions = asked(packed)
        assert np.isfinite(actions).all() and not np.array_equal(actions, before), name
        assert np.array_equal(actions, asked(quantize_policy(policy, artifact, "fake"))), name


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": None, "include": ("vision_tower",)},
        {"layout": None, "include": (r"vision.*(q|v)_proj$", r"fc1$")},
        {"layout": None, "include": (r"vision.*layers\.1\.",), "method": "duquant"},
        {"layout": None, "include": ("vision_tower",), "method": "smoothquant", "group_size": 16},
        {"layout": None, "include": ("vision_tower",), "method": "weight_pca", "row_rotation": True},
        {"layout": None, "include": ("vision_tower",), "activation_bits": 16},
        {"layout": None, "include": ("vision_tower",), "per_layer_bits": {"fc2": 8, "k_proj": 16}},
        {"layout": None, "include": ("vision_tower", "language_model", "gemma_expert")},
        {
            "layout": None,
            "include": (r"vision.*out_proj$", "language_model"),
            "exclude": (r"layers\.0\.",),
            "corrections": ("atm", "ohb"),
        },
        *({"layout": layout} for layout in PLUGIN.layouts),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kinds_of_selection_are_validated_alone_and_end_to_end(changes, dtype):
    """As `arms.py` goes about it: shapes to validation, kernels by layer, then the policy check on real activations."""
    policy = policy_of("siglip", dtype)
    artifact = made(policy, **changes)
    tokens = policy.token_counts(PROMPTS)
    layers = [Layer(name, shape, tokens[part_of(name)][:1]) for name, shape in gemm_shapes(artifact).items()]
    backend = "fake" if artifact.spec.activation_bits == 16 else "cpu_int4"
    verdicts = check(layers, backend, "fallback", remember=False)
    enforce(verdicts)
    executed = {v.layer: v.executed for v in verdicts}
    kernels = {x.name: executed.get(x.name, next(iter(executed.values()))) for x in artifact.layers}
    quantized = quantize_policy(policy, artifact, kernels)
    found = check_policy(policy, quantized, artifact, observations(1)[0], noises(1, policy.noise_shape)[0])
    assert found.action_difference == 0.0
    assert not np.array_equal(asked(quantized), asked(policy))


def test_vision_linears_are_validated_on_the_rows_they_really_get():
    policy = policy_of("siglip").with_batch_size(3)
    artifact = made(policy, layout=None, include=("vision_tower", "language_model", "gemma_expert"))
    quantized = quantize_policy(policy, artifact, "fake")
    seen: dict[str, set[int]] = {"llm": set(), "expert": set(), "vision": set()}
    for name, module in quantized.model.named_modules():
        if isinstance(module, QuantLinear):
            prepare = module.prepare

            part = part_of(name)

            def listening(x, prepare=prepare, part=part):
                seen[part].add(x.reshape(-1, x.shape[-1]).shape[0])
                return prepare(x)

            module.prepare = listening
    quantized.infer(observations(3), noises(3, policy.noise_shape))
    for part, rows in policy.token_counts(PROMPTS).items():
        assert seen[part] and seen[part] <= set(rows), part


def test_what_a_hint_names_can_be_returned_to_full_precision():
    policy = policy_of("siglip")
    everything = {"layout": None, "include": ("vision_tower", "language_model", "gemma_expert")}
    artifact = made(policy, **everything, method="smoothquant")
    named = [row["layer"] for row in hint(artifact)]
    assert named
    for name in named:
        less = made(policy, **everything, exclude=(f"{re.escape(name)}$",))
        assert np.isfinite(asked(quantize_policy(policy, less, "cpu_int4"))).all()


def test_shapes_know_no_device_but_the_model_s():
    policy = policy_of("siglip")
    shapes = gemm_shapes(made(policy, layout=None, include=(r"vision.*fc1$",)))
    assert set(shapes.values()) == {GemmShape(48, 32)}
