"""Risk: a pattern matches nothing, or something else, and a "quantized" policy quietly runs in full precision."""

from __future__ import annotations

import json

import pytest
import torch
from pi05_small import conv_config, random_model, siglip_config
from quant_settings import quant_of

from qlibero.config.quantization import Quant
from qlibero.errors import UserError
from qlibero.policies.pi05 import PLUGIN
from qlibero.policies.pi05.config import PI05_FULL
from qlibero.policies.pi05.linears import EXPERT, LLM, Network
from qlibero.policies.pi05.model import Pi05Model
from qlibero.quant.inspect import readable
from qlibero.quant.layout import select


@pytest.fixture(scope="module")
def full_size() -> Pi05Model:
    with torch.device("meta"):
        return Pi05Model(PI05_FULL)


# counts, parameters and executed linears of facts known about pi0.5
@pytest.mark.parametrize(
    ("name", "count", "millions", "executed"),
    [
        ("llm", 126, 1981.8, 121),
        ("expert", 126, 311.4, 126),
        ("llm+expert_mlp", 180, 2208.3, 175),
        ("llm+expert", 252, 2293.2, 247),
    ],
)
def test_named_layouts_of_the_full_size_model(full_size, name, count, millions, executed):
    selection = select(Network(full_size), quant_of(layout=name))
    assert len(selection.choices) == count and len(selection.executed) == executed and selection.kept == ()
    modules = {name: module for name, module in full_size.named_modules()}
    assert round(sum(modules[c.name].weight.numel() for c in selection.choices) / 1e6, 1) == millions
    idle = {c.name.removeprefix(f"{LLM}17.") for c in selection.choices if not c.executed}
    assert idle == (
        set()
        if name == "expert"
        else {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    )


@pytest.mark.parametrize("config", [conv_config(), siglip_config()])
def test_the_same_names_on_small_policies(config):
    model, depth = Pi05Model(config), config.llm.depth
    per_layer = {"llm": 7, "expert": 7, "llm+expert_mlp": 10, "llm+expert": 14}
    for name in PLUGIN.layouts:
        selection = select(Network(model), quant_of(layout=name, method="rtn"))
        assert len(selection.choices) == per_layer[name] * depth
        groups = selection.groups()
        assert all(len(members) == 3 for group, members in groups.items() if group.endswith(".qkv"))
        assert all(len(members) == 2 for group, members in groups.items() if group.endswith(".gate_up"))


def test_selected_linears_that_no_action_depends_on_really_do_not_matter():
    """`executed` is a claim about the sampler: perturbing every idle linear must change no bit of an action."""
    from pi05_small import noises, observations
    from test_fake_equals_kernel import small_policy

    policy = small_policy()
    before = policy.infer(observations(1), noises(1, policy.noise_shape)).actions
    idle = [c for c in select(policy, quant_of(layout="llm+expert", method="rtn")).choices if not c.executed]
    assert len(idle) == 5
    for choice in idle:
        policy.model.get_submodule(choice.name).weight.data.add_(1.0)
    policy = policy.with_model(policy.model)
    assert (policy.infer(observations(1), noises(1, policy.noise_shape)).actions == before).all()


def test_every_name_that_inspect_prints_can_be_written_where_the_docs_say(full_size):
    every = select(Network(full_size), quant_of(layout="llm+expert")).choices
    printed = [row["layer"] for row in readable([{"layer": choice.name} for choice in every])]
    assert len(set(printed)) == 252 and {"language_model.1.v_proj", "gemma_expert.17.mlp.up_proj"} <= set(printed)
    for choice, name in list(zip(every, printed, strict=True))[7:252:49]:  # layer 1 is not also 10 to 17
        chosen = select(Network(full_size), quant_of(layout="llm+expert", per_layer_bits={name: 16}))
        assert chosen.kept == (choice.name,)


def test_include_exclude_and_per_layer_bits(full_size):
    mlp = select(Network(full_size), quant_of(layout=None, include=(r"gemma_expert.*mlp\.(gate|up|down)_proj",)))
    assert len(mlp.choices) == 54 and all(c.name.startswith(EXPERT) for c in mlp.choices)
    vision = select(Network(full_size), quant_of(include=(r"vision_tower.*\.fc[12]$",), method="rtn"))
    assert len(vision.choices) == 54
    less = select(Network(full_size), quant_of(exclude=(r"layers\.0\.", "o_proj")))
    assert len(less.choices) == 126 - 7 - 17
    mixed = select(
        Network(full_size),
        quant_of(per_layer_bits={r"down_proj": 8, r"layers\.[01]\.": 16, r"layers\.1\.mlp\.up": 4}),
    )
    bits = {c.name: c.weight_bits for c in mixed.choices}
    assert len(mixed.kept) == 13 and len(bits) == 113 and bits[f"{LLM}1.mlp.up_proj"] == 4
    assert {b for n, b in bits.items() if n.endswith("down_proj")} == {8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": None, "include": ("paligemma.language",)}, "include: 'paligemma.language' does not match"),
        ({"layout": None, "include": ("multi_modal_projector",)}, "projector, norms and heads are never quantized"),
        ({"exclude": ("vision",)}, "exclude: 'vision' does not match"),
        ({"per_layer_bits": {"gemma_expert": 8}}, "per_layer_bits: 'gemma_expert' does not match"),
        ({"exclude": (".",)}, "leave no linear"),
        ({"block_size": 96}, "block_size 96 does not divide the 2048 inputs"),
        ({"group_size": 96, "method": "rtn"}, "group_size 96 does not divide"),
    ],
)
def test_what_matches_nothing_is_an_error(full_size, changes, message):
    with pytest.raises(UserError, match=message):
        select(Network(full_size), quant_of(**changes))


def test_a_model_with_other_names_is_refused():
    with pytest.raises(UserError, match="found 0 linears under .*language_model.layers"):
        select(Network(torch.nn.Sequential(torch.nn.Linear(64, 64))), quant_of())
    model = random_model(conv_config())
    del model.llm.layers[1].mlp.up_proj
    with pytest.raises(UserError, match=r"found 20 linears .* expected 3 layers × 7 = 21"):
        select(Network(model), quant_of(method="rtn"))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "gptq"},
        {"activation_bits": 5},
        {"alpha": 1.5},
        {"layout": None},
        {"layout": None, "include": ("(",)},
        {"per_layer_bits": {"x": 7}},
        {"weight_bits": 7},
        {"rounding": "floor"},
        {"number_format": "fp4"},
        {"method": "smoothquant", "smoothing": "none"},
        {"row_rotation": True},
        {"weight_clip": 0.0},
    ],
)
def test_impossible_specs_are_refused(changes):
    with pytest.raises(UserError, match="quant"):
        Quant.of_identity(quant_of().identity() | changes)


def test_a_spec_survives_json_and_its_hash_sees_every_field():
    spec = quant_of(per_layer_bits={"b": 8, "a": 16}, layout=None, include=("x",), exclude=("y",))
    assert Quant.of_identity(json.loads(json.dumps(spec.identity()))).hash == spec.hash
    changes = {
        "method": "rtn",
        "layout": "expert",
        "exclude": ("x",),
        "weight_bits": 8,
        "alpha": 0.6,
        "per_layer_bits": {"x": 8},
        "group_size": 64,
        "block_size": 32,
        "weight_clip": 0.9,
        "activation_clip": 0.9,
        "rounding": "gptq",
        "smoothing": "rms",
        "symmetric": False,
        "sequential": True,
        "rotation_steps": 9,
        "corrections": ["atm"],
        "calibration_samples": 1,
        "calibration_seed": 1,
    }
    hashes = {quant_of(**{key: value}).hash for key, value in changes.items()} | {quant_of().hash}
    hashes |= {quant_of(activation_bits=16).hash, quant_of(method="weight_pca", row_rotation=True).hash}
    hashes.add(quant_of(layout=None, include=("x",)).hash)
    hashes.add(quant_of(number_format="fp8").hash)
    assert len(hashes) == len(changes) + 5
    assert quant_of(per_layer_bits={"b": 8, "a": 16}).hash != quant_of(per_layer_bits={"a": 16, "b": 8}).hash


def test_the_keys_that_corrections_had_before_they_were_plug_ins_are_understood():
    assert quant_of(atm=False, ohb=False).hash == quant_of().hash
    assert quant_of(atm=True, ohb=True).corrections == ("atm", "ohb") and quant_of(ohb=True).corrections == ("ohb",)
    assert quant_of(atm=True, corrections=["ohb"]).hash == quant_of(corrections=["ohb", "atm"]).hash
    with pytest.raises(ValueError, match=r"write corrections: \[atm\]"):
        quant_of(atm="yes")
    with pytest.raises(ValueError, match="scale one projection twice"):
        quant_of(corrections=["atm", "atm"])
