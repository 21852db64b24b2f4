"""Risk: pi0 is run as if it were a pi0.5, or its checkpoints are taken for one; and a second family of policies needs
more than its own room. Small random networks in exactly the formats that exist."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pi0_by_the_book
import pytest
import torch
import yaml
from pi05_small import PROMPTS, STATISTICS, noises, observations, random_model
from quant_settings import quant_of
from safetensors.torch import save_file

from qlibero.errors import UserError
from qlibero.kernels import validation
from qlibero.kernels.shapes import Layer
from qlibero.policies import files_of, load_policy, verify, weights_sha256
from qlibero.policies.base import Observation
from qlibero.policies.pi0 import Pi0
from qlibero.policies.pi0.model import PI0_FULL, Pi0Config, Pi0Model
from qlibero.policies.pi05 import Pi05
from qlibero.policies.pi05.config import GemmaConfig, SiglipConfig
from qlibero.policies.pi05.sampler import Sampler
from qlibero.policies.pi05.tokenizer import WordTokenizer, split_words
from qlibero.quant.apply import gemm_shapes, quantize_policy
from qlibero.quant.calibrate import calibrate
from qlibero.quant.policy_check import check_policy
from qlibero.registry import MethodPlugin, built_in

INSTRUCTION = "turn on the stove"
WORDS = WordTokenizer(sorted({w for p in PROMPTS for w in split_words(p)}))
CONFIG = Pi0Config(
    llm=GemmaConfig(64, 3, 96, 4, 16),
    expert=GemmaConfig(48, 3, 64, 4, 16),
    vision=SiglipConfig(32, 2, 48, 16, 14, 28),
    vocab_size=300,
    action_horizon=6,
)
EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network() -> Pi0Model:
    return random_model(CONFIG, model=Pi0Model)


def openpi(path: Path) -> Path:
    """As openpi's converter and `save_model` leave one: the embedding under lm_head, an unused head."""
    state = {name: t.clone() for name, t in network().state_dict().items()}
    state["paligemma_with_expert.paligemma.lm_head.weight"] = state.pop(EMBEDDING)
    state["paligemma_with_expert.gemma_expert.lm_head.weight"] = torch.ones(300, 48)
    assets = path / "assets" / "physical-intelligence" / "libero"
    assets.mkdir(parents=True)
    save_file(state, path / "model.safetensors")
    says = {
        "action_dim": 32,
        "action_horizon": 6,
        "paligemma_variant": "gemma_2b",
        "precision": "float32",
        "pi05": False,
    }
    (path / "config.json").write_text(json.dumps(says))
    (assets / "norm_stats.json").write_text(json.dumps({"norm_stats": STATISTICS}))
    (path / "tokenizer.json").write_text(WORDS.to_json())
    return path


def lerobot(path: Path) -> Path:
    """As LeRobot's `save_pretrained` leaves one: everything prefixed, both heads, statistics beside the processors."""
    state = {f"model.{name}": t.clone() for name, t in network().state_dict().items()}
    state["model.paligemma_with_expert.paligemma.lm_head.weight"] = torch.ones(300, 64)
    path.mkdir(parents=True)
    save_file(state, path / "model.safetensors")
    visual = {"type": "VISUAL", "shape": [3, 256, 256]}
    says = {
        "type": "pi0",
        "chunk_size": 6,
        "n_action_steps": 6,
        "max_state_dim": 32,
        "max_action_dim": 32,
        "tokenizer_max_length": 48,
        "input_features": {
            "observation.images.image": visual,
            "observation.images.image2": visual,
            "observation.state": {"type": "STATE", "shape": [8]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [7]}},
    }
    (path / "config.json").write_text(json.dumps(says))
    norm = {"eps": 1e-8, "features": {}, "norm_map": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}}
    texts = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "pi0_new_line_processor", "config": {}},
        {"registry_name": "tokenizer_processor", "config": {"max_length": 48, "padding_side": "right"}},
    ]
    for which, step, feature, entry, before in (
        ("preprocessor", "normalizer_processor", "observation.state", STATISTICS["state"], texts),
        ("postprocessor", "unnormalizer_processor", "action", STATISTICS["actions"], []),
    ):
        file = f"policy_{which}_step_5_{step}.safetensors"
        save_file({f"{feature}.{key}": torch.tensor(value) for key, value in entry.items()}, path / file)
        steps = [*before, {"registry_name": step, "config": norm, "state_file": file}]
        (path / f"policy_{which}.json").write_text(json.dumps({"name": f"policy_{which}", "steps": steps}))
    (path / "tokenizer.json").write_text(WORDS.to_json())
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pi0")
    return {"openpi": openpi(folder / "openpi"), "lerobot": lerobot(folder / "lerobot")}


@pytest.fixture(scope="module")
def policy(checkpoints):
    return load_policy(Pi0(type="pi0", checkpoint=checkpoints["openpi"], profile="openpi-pi0"))


def seen(count: int, seed: int = 0) -> list[Observation]:
    return observations(count, seed)


# -------------------------------------------------------------------------------------------------- mathematics
@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_a_chunk_is_that_of_the_formulas(padded):
    model = network()
    g = torch.Generator().manual_seed(5)
    images = torch.rand(2, 2, 3, 28, 28, generator=g) * 2 - 1
    tokens = torch.randint(1, 300, (2, 9), generator=g)
    live = torch.arange(9)[None] < torch.tensor([[9], [5]] if padded else [[9], [9]])
    state, noise = torch.randn(2, 32, generator=g), torch.randn(2, 6, 32, generator=g)
    expected = pi0_by_the_book.actions(model.state_dict(), images, tokens, live, state, noise)
    assert (expected - noise).abs().max() > 1  # the flow moves
    mask = live if padded else None
    got, _ = Sampler(model)(images, tokens, noise, token_mask=mask, state=state)
    assert (got.double() - expected).abs().max() < 2e-5
    prefix = model.prefix(images, tokens, mask, state=state)
    x = noise
    for step in range(10):
        x = x - model.velocity(prefix, x, torch.full((2,), 1.0 - step / 10)) / 10
    assert (x.double() - expected).abs().max() < 2e-5
    other = pi0_by_the_book.actions(model.state_dict(), images, tokens, live, state + 1, noise)
    assert (other - expected).abs().max() > 1e-3  # and the state is heard


def test_the_published_network_has_its_published_size():
    with torch.device("meta"):
        tensors = Pi0Model(PI0_FULL).state_dict()
    assert len(tensors) == 776 and round(sum(t.numel() for t in tensors.values()) / 1e6, 1) == 3238.0
    assert tensors["action_time_mlp_in.weight"].shape == (1024, 2048) and tensors["state_proj.weight"].shape == (
        1024,
        32,
    )


# --------------------------------------------------------------------------------------------------- checkpoints
def test_both_formats_hold_the_same_network_and_say_how_they_are_fed(checkpoints):
    open_, hub = (
        load_policy(Pi0(type="pi0", checkpoint=checkpoints[kind], profile=profile))
        for kind, profile in (("openpi", "openpi-pi0"), ("lerobot", "auto"))
    )
    assert (open_.provenance()["type"], hub.provenance()["profile"]) == ("pi0", "lerobot-pi0")
    assert all(torch.equal(t, hub.model.state_dict()[name]) for name, t in open_.model.state_dict().items())
    text = "pick_up the stove "
    assert open_.profile.text(text, np.zeros(8)) == ("pick up the stove", "\n")
    assert hub.profile.text(text, np.zeros(8)) == ("pick_up the stove \n",)
    (observation,) = seen(1)
    mean, std = np.array(STATISTICS["state"]["mean"]), np.array(STATISTICS["state"]["std"])
    for policy, eps in ((open_, 1e-6), (hub, 1e-8)):
        state = policy.preprocess(observation)[2]
        assert state.shape == (32,) and not state[8:].any()
        assert np.allclose(state[:8], (observation.state - mean) / (std + eps), atol=1e-6)
    settings = Pi0(type="pi0", checkpoint=checkpoints["openpi"])
    assert weights_sha256(settings) == open_.provenance()["sha256"]
    assert {path.name for path in files_of(settings)} == {
        "model.safetensors", "config.json", "norm_stats.json", "tokenizer.json",
    }  # fmt: skip


def test_actions_relative_to_the_state_get_the_state_back(checkpoints, policy):
    delta = load_policy(Pi0(type="pi0", checkpoint=checkpoints["openpi"], profile="openpi-pi0-delta"))
    asked, noise = seen(2), noises(2, policy.noise_shape)
    plain, added = policy.infer(asked, noise).actions, delta.infer(asked, noise).actions
    for i, observation in enumerate(asked):
        assert np.allclose(added[i, :, :6], plain[i, :, :6] + observation.state[:6], atol=1e-6)
        assert (added[i, :, 6] == plain[i, :, 6]).all()


def test_verify_finds_the_family_and_says_what_a_config_has_to_say(checkpoints):
    report = verify(checkpoints["openpi"])
    assert (report["ok"], report["family"], report["kind"]) == (True, "pi0", "openpi"), report["problems"]
    assert report["architecture"]["state_dim"] == 32 and report["statistics"]["state"]["mode"] == "mean_std"
    assert any("openpi-pi0-delta" in condition for condition in report["conditions"])
    hub = verify(checkpoints["lerobot"])
    assert hub["ok"] and hub["profile"]["proven"] and hub["conditions"] == [], hub


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, r"do not prove under which semantics .* `profile: openpi-pi0-delta`"),
        ({"profile": "lerobot-pi0"}, r"lerobot-pi0 is for lerobot checkpoints"),
        ({"action_horizon": 50}, r"config.json says 6; leave the key out"),
    ],
)
def test_what_a_config_lacks_is_said(checkpoints, change, says):
    with pytest.raises(UserError, match=says):
        load_policy(Pi0(type="pi0", checkpoint=checkpoints["openpi"], **change))


def test_neither_family_takes_the_other_for_itself(checkpoints, tmp_path):
    for kind in ("openpi", "lerobot"):
        with pytest.raises(UserError, match=r"pi0.*write policy: \{type: pi0"):
            load_policy(Pi05(type="pi05", checkpoint=checkpoints[kind]))
    from test_checkpoint_formats import lerobot as of_pi05
    from test_checkpoint_formats import openpi as silent_pi05

    with pytest.raises(UserError, match=r"pi0\.5 policy.*write policy: \{type: pi05"):
        load_policy(
            Pi0(type="pi0", checkpoint=of_pi05(tmp_path / "a" / "c") if (tmp_path / "a").mkdir() is None else "")
        )
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"those of a pi0\.5 policy: write policy: \{type: pi05"):
        load_policy(Pi0(type="pi0", checkpoint=silent_pi05(tmp_path / "b" / "c")))


def test_a_tensor_left_out_is_an_error_that_names_it(checkpoints, tmp_path):
    from safetensors.torch import load_file

    state = load_file(checkpoints["openpi"] / "model.safetensors")
    del state["action_time_mlp_out.bias"]
    broken = tmp_path / "broken"
    broken.mkdir()
    save_file(state, broken / "model.safetensors")
    (broken / "config.json").write_text((checkpoints["openpi"] / "config.json").read_text())
    report = verify(broken)
    assert not report["ok"] and report["missing"] == ["action_time_mlp_out.bias"]


# ---------------------------------------------------------------------------------------------------- quantization
@pytest.mark.parametrize("method", built_in(MethodPlugin))
def test_every_method_quantizes_it_and_every_kernel_agrees(policy, method):
    spec = quant_of(method=method, layout="llm+expert", block_size=16, rotation_steps=4)
    z = noises(2, policy.noise_shape)
    artifact = calibrate(policy, seen(2), z, spec, {"data_sha256": "2" * 64})
    assert len(artifact.layers) == 42 and sum(layer.executed for layer in artifact.layers) == 37
    fake = quantize_policy(policy, artifact, "fake")
    exact, rounded = policy.infer(seen(2), z).actions, fake.infer(seen(2), z).actions
    assert 0 < np.abs(rounded - exact).max() < 1.0
    if method == "duquant":
        real = quantize_policy(policy, artifact, "cpu_int4")
        assert (real.infer(seen(2), z).actions == rounded).all()
        check = check_policy(policy, real, artifact, seen(1)[0], z[0], fake)
        assert (check.layers_consuming_int8, check.action_difference) == (37, 0.0)
        tokens, linears = policy.token_counts([INSTRUCTION]), policy.linears()
        assert tokens["expert"] == (1, 6)  # the state alone, and a chunk's actions
        shapes = gemm_shapes(artifact)
        layers = [Layer(name, shape, tokens[linears[name].rows]) for name, shape in shapes.items()]
        assert {verdict.executed for verdict in validation.check(layers, "cpu_int4")} == {"cpu_int4"}


def test_attention_is_heard_where_it_is_computed(policy):
    heard: list[str] = []
    policy.sample_eagerly(seen(1)[0], noises(1, policy.noise_shape)[0], hear=lambda name, q, k: heard.append(name))
    llm, expert = (
        [each.name for each in policy.attentions() if part in each.name] for part in ("language", "gemma_ex")
    )
    assert heard == llm + expert[:-1] + expert * 10


def test_it_is_served_and_answers_as_it_does_here(checkpoints):
    from test_checkpoint_service import Served

    from qlibero.policies.remote import RemotePolicy

    here = load_policy(Pi0(type="pi0", checkpoint=checkpoints["openpi"], profile="openpi-pi0-delta", batch_size=2))
    asked, z = seen(3), noises(3, here.noise_shape)
    expected = here.infer(asked, z).actions
    with Served(here) as served:
        remote = RemotePolicy(served.url, batch_size=3)
        assert remote.noise_shape == (6, 32) and remote.provenance()["server"]["type"] == "pi0"
        assert (remote.infer(asked, z).actions == expected).all()


# ------------------------------------------------------------------------------------------------------- a real run
@pytest.mark.libero
def test_a_checkpoint_runs_in_libero_paired_under_two_backends(checkpoints, calibration_file, tmp_path, monkeypatch):
    from qlibero.config.load import load_experiment
    from qlibero.quant import prepare
    from qlibero.results.ledger import read_ledger
    from qlibero.run.experiment import run_experiment

    monkeypatch.setattr(prepare, "ARTIFACTS", tmp_path / "artifacts")
    config = {
        "suite": "libero_goal",
        "tasks": [7],
        "episodes_per_task": 1,
        "max_steps": 8,
        "policy": {"type": "pi0", "checkpoint": str(checkpoints["openpi"]), "profile": "openpi-pi0-delta"},
        "quant": {"method": "rtn", "layout": "llm+expert"},
        "backends": ["baseline", "fake", "cpu_int4"],
        "videos": 0,
        "workers": 1,
        "tracking": [],
    }
    (tmp_path / "pi0.yaml").write_text(yaml.safe_dump(config))
    document = run_experiment(load_experiment(tmp_path / "pi0.yaml"), tmp_path / "run")
    assert document.complete
    records = {arm: read_ledger(tmp_path / "run", arm)[0] for arm in ("baseline", "fake", "cpu_int4")}
    assert {(r.outcome, r.steps, r.fingerprint) for r in records.values()} == {
        ("failure", 8, records["baseline"].fingerprint)
    }
    digests = {arm: record.action_digest for arm, record in records.items()}
    assert digests["fake"] == digests["cpu_int4"] != digests["baseline"]
    meta = json.loads((tmp_path / "run" / "cpu_int4" / "meta.json").read_text())
    assert meta["policy"]["type"] == "pi0" and {k["kernel"] for k in meta["kernels"].values()} == {"cpu_int4"}
