"""The fast sampler must be the same function as the plain model, and the model must be openpi's network by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pi05_small import conv_config, random_inputs, random_model, siglip_config
from torch import nn

from qlibero.policies.pi05.config import PI05_FULL, Pi05Config
from qlibero.policies.pi05.layers import MASKED, attend, fuse, modulated, project, rope_tables, rotate
from qlibero.policies.pi05.model import Pi05Model, cast, initialize, is_float32_island
from qlibero.policies.pi05.sampler import Sampler


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def euler(model: Pi05Model, inputs: dict, steps: int = 10, **masks) -> torch.Tensor:
    """The definition: prefix once, `steps` Euler steps from noise."""
    with torch.inference_mode():
        prefix = model.prefix(inputs["images"], inputs["tokens"], state=inputs["state"], **masks)
        x = inputs["noise"].clone()
        for i in range(steps):
            x = x - model.velocity(prefix, x, torch.full((len(x),), 1.0 - i / steps)) / steps
    return x


def test_full_size_network_has_openpis_tensors():
    with torch.device("meta"):
        model = Pi05Model(PI05_FULL)
    names = dict(model.state_dict())
    assert len(names) == 811
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 456
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 3353.4
    llm, expert = (
        "paligemma_with_expert.paligemma.model.language_model.",
        "paligemma_with_expert.gemma_expert.model.",
    )
    vit = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
    expected = {
        f"{llm}embed_tokens.weight": (257152, 2048),
        f"{llm}layers.17.self_attn.k_proj.weight": (256, 2048),
        f"{llm}layers.0.mlp.down_proj.weight": (2048, 16384),
        f"{llm}norm.weight": (2048,),
        f"{expert}layers.0.self_attn.o_proj.weight": (1024, 2048),
        f"{expert}norm.dense.bias": (3072,),
        f"{expert}layers.17.post_attention_layernorm.dense.weight": (3072, 1024),
        f"{vit}embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        f"{vit}embeddings.position_embedding.weight": (256, 1152),
        f"{vit}encoder.layers.26.self_attn.out_proj.bias": (1152,),
        f"{vit}encoder.layers.0.mlp.fc1.weight": (4304, 1152),
        f"{vit}post_layernorm.weight": (1152,),
        "action_in_proj.weight": (1024, 32),
        "time_mlp_out.weight": (1024, 1024),
        "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.weight": (2048, 1152),
    }
    assert {name: tuple(names[name].shape) for name in expected} == expected


@pytest.mark.parametrize("config", [conv_config(), siglip_config()], ids=["conv", "siglip"])
def test_sampler_is_the_model(config):
    model, inputs = random_model(config), random_inputs(config, 2, 9)
    expected = euler(model, inputs)
    got, times = Sampler(model)(inputs["images"], inputs["tokens"], inputs["noise"], state=inputs["state"])
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(got, expected, atol=3e-6, rtol=0)
    assert {"vision", "prefix", "flow"} <= set(times)


def test_padding_is_invisible():
    config = conv_config()
    model, inputs = random_model(config), random_inputs(config, 2, 7)
    exact, _ = Sampler(model)(inputs["images"], inputs["tokens"], inputs["noise"], state=inputs["state"])
    junk = torch.randint(0, config.vocab_size, (2, 9))
    mask = torch.arange(16)[None].expand(2, -1) < 7
    padded, _ = Sampler(model)(
        inputs["images"],
        torch.cat([inputs["tokens"], junk], 1),
        inputs["noise"],
        token_mask=mask,
        state=inputs["state"],
    )
    torch.testing.assert_close(padded, exact, atol=3e-6, rtol=0)


def test_masked_camera_can_be_left_out():
    config = siglip_config()
    model, inputs = random_model(config), random_inputs(config, 2, 7, cameras=3)
    cameras = torch.tensor([[True, True, False]] * 2)
    with_mask = euler(model, inputs, camera_mask=cameras)
    without = euler(model, {**inputs, "images": inputs["images"][:, :2]})
    torch.testing.assert_close(with_mask, without, atol=3e-6, rtol=0)


def test_several_flow_samples_share_a_prefix():
    config = conv_config()
    model, inputs = random_model(config), random_inputs(config, 2, 7)
    samples = 3
    x = torch.randn(2 * samples, config.action_horizon, config.action_dim)
    t = torch.rand(2 * samples)
    with torch.no_grad():
        together = model.velocity(model.prefix(inputs["images"], inputs["tokens"], state=inputs["state"]), x, t)
        for row in range(2):
            own = {k: v[row : row + 1] for k, v in inputs.items()}
            prefix = model.prefix(own["images"], own["tokens"], state=own["state"])
            for k in range(samples):
                i = row * samples + k
                alone = model.velocity(prefix, x[i : i + 1], t[i : i + 1])
                torch.testing.assert_close(together[i : i + 1], alone, atol=3e-6, rtol=0)


def test_every_parameter_that_reaches_the_actions_is_trained():
    config = conv_config()
    model, inputs = random_model(config), random_inputs(config, 2, 7)
    prefix = model.prefix(inputs["images"], inputs["tokens"], state=inputs["state"])
    loss = model.velocity(prefix, inputs["noise"], torch.tensor([0.3, 0.8])).square().mean()
    (loss + prefix.vision.heat.square().mean()).backward()
    last = f"language_model.layers.{config.llm.depth - 1}."
    unread = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()}
    assert {n.partition("language_model.")[2] for n in unread} == {
        f"layers.{config.llm.depth - 1}.{n}.weight"
        for n in (
            "self_attn.q_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
            "post_attention_layernorm",
        )
    } | {"norm.weight"}, last


def test_attention_is_plain_softmax_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 11, 8), torch.randn(2, 11, 8)
    mask = torch.where(torch.rand(2, 1, 11) < 0.7, 0.0, MASKED)
    scores = torch.einsum("bthd,bpd->bhtp", q, k) * 8**-0.5 + mask[:, None]
    expected = torch.einsum("bhtp,bpd->bthd", scores.softmax(-1), v).flatten(2)
    torch.testing.assert_close(attend(q, k, v, mask), expected, atol=1e-6, rtol=0)


def test_rotation_is_rotate_half():
    x, positions = torch.randn(1, 6, 2, 8), torch.arange(6)[None]
    angles = positions[0, :, None] / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    first, second = x[..., :4], x[..., 4:]
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    torch.testing.assert_close(rotate(x, *rope_tables(positions, 8, torch.float32)), expected, atol=1e-6, rtol=0)


def test_adaptive_norm_on_the_cpu_is_the_norm():
    x, scale, shift = torch.randn(3, 5, 48) * 7, torch.randn(3, 1, 48), torch.randn(3, 1, 48)
    expected = x / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale + shift
    torch.testing.assert_close(modulated(x, scale, shift), expected.float(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_fused_linears_still_answer_one_by_one(bias):
    a, b = nn.Linear(6, 4, bias=bias), nn.Linear(6, 3, bias=bias)
    x = torch.randn(2, 6)
    expected = a(x), b(x)
    fuse(a, b)
    assert a.weight.untyped_storage().data_ptr() == b.weight.untyped_storage().data_ptr()
    heard = []
    with torch.no_grad():
        for got, wanted in zip(project(x, a, b), expected, strict=True):
            torch.testing.assert_close(got, wanted)
        handle = b.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0]))
        project(x, a, b)
        assert len(heard) == 1  # a listener sees its own call
        handle.remove()
        b.weight = nn.Parameter(b.weight * 2)  # a replaced weight is used, not the old view
        torch.testing.assert_close(project(x, a, b)[1], nn.functional.linear(x, b.weight, b.bias))


def test_bfloat16_keeps_openpis_float32_islands():
    model = cast(initialize(Pi05Model(siglip_config()), 0), torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, _ in model.named_parameters() if is_float32_island(name)}
    for part in (
        "patch_embedding.weight",
        "layers.0.input_layernorm.dense.weight",
        "layers.2.post_attention_layernorm.weight",
        "gemma_expert.model.norm.dense.bias",
        "action_out_proj.weight",
        "time_mlp_in.weight",
    ):
        assert any(name.endswith(part) for name in kept), part
    for part in (
        "q_proj.weight",
        "layer_norm1.weight",
        "post_layernorm.weight",
        "multi_modal_projector.linear.weight",
        "embed_tokens.weight",
    ):
        assert not any(name.endswith(part) for name in kept), part
    inputs = random_inputs(siglip_config(), 1, 5)
    got, _ = Sampler(model)(inputs["images"], inputs["tokens"], inputs["noise"])
    assert got.dtype == torch.float32 and torch.isfinite(got).all()


def test_weights_from_a_seed_are_the_same_weights():
    first, second = (initialize(Pi05Model(conv_config()), 3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert Pi05Config.from_dict(conv_config().to_dict()) == conv_config()
    assert np.isfinite(sum(float(t.sum()) for t in first.values()))
