"""Risk: a quantized policy loaded straight from its artifact is another, or still carries weights it replaced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pi05_small import PROMPTS, STATISTICS, conv_config, noises, observations, random_model
from quant_settings import quant_of

from qlibero.policies import load_policy
from qlibero.policies.pi05 import Pi05
from qlibero.policies.pi05.checkpoint import write_checkpoint
from qlibero.policies.pi05.tokenizer import WordTokenizer, split_words
from qlibero.quant.apply import quantize_policy
from qlibero.quant.calibrate import calibrate


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Pi05:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("c")
    words = WordTokenizer(sorted({w for p in PROMPTS for w in split_words(p)}))
    write_checkpoint(path, random_model(conv_config()), name="small", statistics=STATISTICS, tokenizer=words.to_json())
    return Pi05(type="pi05", checkpoint=path)


def load_quantized(config: Pi05, artifact, backend: str):
    """As a run of quantized arms alone loads a policy: without what the artifact replaces."""
    replaced = frozenset(f"{layer.name}.weight" for layer in artifact.layers)
    return quantize_policy(load_policy(config, replaced), artifact, backend)


@pytest.mark.parametrize("bits", [8, 16])
def test_straight_from_the_artifact_is_the_same_policy(config, bits):
    full = load_policy(config)
    spec = quant_of(method="hadamard", layout="llm+expert_mlp", block_size=16, activation_bits=bits)
    artifact = calibrate(full, observations(2), noises(2, full.noise_shape), spec, {"data_sha256": "0" * 64})
    seen, z = observations(2, seed=5), noises(2, full.noise_shape)
    around = quantize_policy(full, artifact, "fake").infer(seen, z).actions
    straight = load_quantized(config, artifact, "fake")
    assert np.array_equal(straight.infer(seen, z).actions, around)
    assert not np.array_equal(around, full.infer(seen, z).actions)


def test_replaced_weights_are_never_read(config):
    full = load_policy(config)
    spec = quant_of(method="rtn", layout="llm")
    artifact = calibrate(full, [], noises(0, full.noise_shape), spec, {"data_sha256": "0" * 64})
    replaced = {f"{layer.name}.weight" for layer in artifact.layers}
    bare = load_policy(config, frozenset(replaced))
    meta = {name for name, p in bare.model.named_parameters() if p.is_meta}
    assert meta == replaced and len(meta) == 7 * conv_config().llm.depth
    quantized = load_quantized(config, artifact, "fake")
    assert not any(p.is_meta for p in quantized.model.parameters())
    assert not replaced & {name for name, _ in quantized.model.named_parameters()}


def test_actions_that_are_not_finite_are_handed_on_to_end_their_episode(config):
    policy = load_policy(config)
    with torch.no_grad():
        policy.model.action_out_proj.bias[0] = float("nan")
    actions = policy.infer(observations(1), noises(1, policy.noise_shape)).actions
    assert np.isnan(actions[..., 0]).all()


def test_a_run_of_quantized_arms_does_not_load_what_they_replace(config, tmp_path, monkeypatch):
    """Calibrates the first time; the second time the artifact is ready and the language model is not read."""
    from qlibero.config.schema import Experiment
    from qlibero.quant import prepare, shared_weights
    from qlibero.run import arms

    asked: list[frozenset[str]] = []

    def listening(policy, skip=frozenset()):
        asked.append(skip)
        return load_policy(policy, skip)

    monkeypatch.setattr(prepare, "ARTIFACTS", tmp_path)
    monkeypatch.setattr(shared_weights, "load_policy", listening)
    quant = {"method": "rtn", "layout": "llm"}
    settings = {"name": "x", "suite": "libero_object", "tasks": [7], "policy": config.model_dump(), "quant": quant}
    experiment = Experiment.model_validate({**settings, "backends": ["fake"]})
    with_baseline = Experiment.model_validate({**settings, "backends": ["baseline", "fake"]})
    monkeypatch.setattr(arms, "prompts", lambda experiment: [PROMPTS[0]])
    answers = []
    for each in (experiment, experiment, with_baseline):
        policies, _ = arms.load_arms(each, each.arms())
        answers.append(policies["fake"].infer(observations(1), noises(1, (10, 7))).actions)
    assert asked[0] == frozenset() == asked[2] and len(asked[1]) == 7 * conv_config().llm.depth
    assert np.array_equal(answers[0], answers[1]) and np.array_equal(answers[0], answers[2])
