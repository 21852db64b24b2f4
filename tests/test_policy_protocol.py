"""Risk: a policy that has all that the protocol declares is asked for more, or for linears with pi0.5's names.

The policy here shares nothing with pi0.5 but the protocol: other names, one stack, every linear only ever called. What
it does not declare raises, however it is asked for, so a `getattr` with a default is no way round.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pi05_small import noises, observations
from quant_settings import quant_of
from test_arm_order_and_calls import Simulators, experiment
from torch import nn

from qlibero.errors import GuardRefusal
from qlibero.kernels import validation
from qlibero.policies import base
from qlibero.policies.surgery import swap_modules
from qlibero.quant import fitting
from qlibero.quant.apply import gemm_shapes, quantize_policy
from qlibero.quant.artifact import build, load, save
from qlibero.quant.corrections import AttentionSeen, _add_logits
from qlibero.quant.inspect import sensitivity
from qlibero.quant.layout import select
from qlibero.quant.observations import write_demonstrations
from qlibero.quant.policy_check import check_policy
from qlibero.quant.prepare import ensure_artifact
from qlibero.quant.recheck import Recheck
from qlibero.run import arms
from qlibero.run.episode import PlannedEpisode
from qlibero.run.planned import missing_episodes
from qlibero.run.rollout import RolloutSettings, run_episodes

WIDTH, HEADS, GROUPS, HORIZON, BLOCKS, STEPS = 64, 4, 2, 4, 2, 2
DECLARED = {
    name
    for protocol in base.QuantizablePolicy.__mro__
    if protocol.__module__ == base.__name__
    for name in (*vars(protocol), *vars(protocol).get("__annotations__", {}))
    if not name.startswith("_")
}
OPTIONAL = {"frame_format", "begin", "calibration_inputs"}  # "It may also have", say the docstrings


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wk, self.wv = (nn.Linear(WIDTH, WIDTH * GROUPS // HEADS, bias=False) for _ in range(2))
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, hear):
        y = F.layer_norm(x, (WIDTH,))
        q, k, v = self.wq(y).unflatten(-1, (HEADS, -1)), *(w(y).unflatten(-1, (GROUPS, -1)) for w in (self.wk, self.wv))
        hear(q, k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        x = x + self.wo(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))
        return x + self.narrow(F.silu(self.wide(F.layer_norm(x, (WIDTH,)))))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(7 + 8 + 1, WIDTH), nn.Linear(WIDTH, 7)
        self.body = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x, state, t, hear=lambda name, q, k: None):
        rest = torch.cat([state, t[None]]).expand(1, HORIZON, 9)
        x = self.enter(torch.cat([x, rest], -1))
        for i, block in enumerate(self.body):
            x = block(x, lambda q, k, i=i: hear(f"body.{i}", q, k))
        return self.leave(x)


class Declared:
    """Exactly `QuantizablePolicy`."""

    name, noise_shape, batch_size = "declared", (HORIZON, 7), 1

    def __init__(self, model, steps=3, order=0):
        self.model, self._steps, self._order = model, steps, order

    def __getattr__(self, name):
        if name in OPTIONAL or name.startswith("__"):
            raise AttributeError(name)
        raise AssertionError(f"a policy was asked for {name}, which no protocol declares")

    @property
    def device(self):
        return self.model.enter.weight.device

    def with_model(self, model):
        return Declared(model, self._steps, self._order)

    def for_calibration(self):
        return Declared(self.model, STEPS, self._order)

    def rearranged(self, replicate):
        order = torch.randperm(2 * WIDTH, generator=torch.Generator().manual_seed(replicate))
        old = self.model.body[0]
        wide, narrow = (nn.Linear(a, b) for a, b in ((WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)))
        wide.load_state_dict({"weight": old.wide.weight[order], "bias": old.wide.bias[order]})
        narrow.load_state_dict({"weight": old.narrow.weight[:, order], "bias": old.narrow.bias})
        twin = swap_modules(self.model, {"body.0.wide": wide, "body.0.narrow": narrow})
        return Declared(twin, self._steps, replicate)

    def provenance(self):
        return {"type": "declared", "name": self.name, "sha256": "3" * 64, "arrangement": str(self._order)}

    def linears(self):
        shared = {"wq": "in", "wk": "in", "wv": "in"}
        return {
            f"body.{i}.{kind}": base.Linear(
                f"body.{i}.{kind}", f"body.{i}.{shared.get(kind, kind)}", "actions", block=f"body.{i}"
            )
            for i in range(BLOCKS)
            for kind in ("wq", "wo", "wk", "wv", "wide", "narrow")
        }

    def layout(self, name):
        assert name == "everything"
        return list(self.linears())

    def attentions(self):
        return [base.Attention(f"body.{i}", f"body.{i}.wq", f"body.{i}.wo", HEADS) for i in range(BLOCKS)]

    def token_counts(self, prompts):
        return {"actions": (HORIZON,)}

    def warmup_observations(self, prompts):
        return [base.blank_observation(prompts[0])]

    @torch.no_grad()
    def sample_eagerly(self, observation, noise, model=None, hear=None):
        x, network = torch.from_numpy(noise)[None].clone(), model or self.model
        for step in range(self._steps):
            t = torch.tensor(step / self._steps)
            x = x - network(x, torch.from_numpy(observation.state), t, hear or (lambda name, q, k: None)) / self._steps
        return x[0]

    def infer(self, observations, noise):
        each = [self.sample_eagerly(o, z).numpy() for o, z in zip(observations, noise, strict=True)]
        return base.Chunk(np.stack(each))


@pytest.fixture
def policy():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = Network().eval()
    for block in network.body:  # else every attention is flat, whatever is rounded
        block.wq.weight.data *= 4
        block.wk.weight.data *= 4
    return Declared(network)


def settings(tmp_path, **changes):
    file = tmp_path / "calibration.npz"
    if not file.exists():
        write_demonstrations(file, observations(6), "random")
    given = {"method": "duquant", "block_size": 16, "rotation_steps": 8, "artifact_dir": tmp_path / "artifacts"}
    given |= {"calibration": {"path": file, "samples": 6}} | ({} if "include" in changes else {"layout": "everything"})
    return quant_of(**given | changes)


def test_it_offers_what_is_declared_and_nothing_else(policy):
    offered = {name for name in (*vars(Declared), *vars(policy)) if not name.startswith("_")}
    assert offered == DECLARED


@pytest.mark.parametrize(
    "changes",
    [
        {"corrections": ("atm", "ohb"), "method": "rtn", "weight_bits": 2, "rounding": "nearest"},
        {"sequential": True, "rounding": "gptq"},
        {"method": "weight_pca", "row_rotation": True},
        {"method": "smooth_hadamard", "include": ("wide",)},
    ],
    ids=str,
)
def test_a_network_with_other_names_goes_all_the_way(policy, tmp_path, changes):
    """Calibration, artifact, kernel check, policy check, rollout, recheck, sensitivity: each with the real thing."""
    quant = settings(tmp_path, **changes)
    artifact = ensure_artifact(policy, quant).artifact
    again = ensure_artifact(Declared(policy.model, steps=7), quant)
    assert not again.made, "how many steps an arm takes is no part of what it was calibrated from"
    if "corrections" in changes:
        assert artifact.corrections and {name.split(".")[-1] for name in artifact.corrections} <= {"wq", "wo"}
    kernel = "cpu_int4" if artifact.spec.activation_bits == 8 else "fake"
    verdicts = validation.check(arms.layers_of(policy, artifact, ["go"]), kernel)
    quantized = quantize_policy(policy, artifact, validation.enforce(verdicts))
    seen, noise = observations(2, seed=3), noises(2, policy.noise_shape, seed=3)
    checked = check_policy(policy, quantized, artifact, seen[0], noise[0])
    assert checked.layers_consuming_int8 == len(artifact.layers) and checked.action_difference == 0
    recheck = Recheck(quantized, artifact, quantize_policy(policy, artifact, "fake"))
    keys = dict.fromkeys(key for _, key in missing_episodes(experiment(tmp_path, "[baseline]"), tmp_path / "run"))
    records = []
    run_episodes(
        [PlannedEpisode("baseline", key) for key in list(keys)[:3]],
        {"baseline": quantized},
        Simulators(2),
        RolloutSettings("pure", 10, 5, 0),
        lambda record, trajectory: records.append(record),
        on_call=lambda arm, *call: recheck.call(*call),
    )
    found = recheck.finish()
    assert len(records) == 3 and found.calls > 0 and found.products > 0 and not found.wrong
    rows = sensitivity(policy, artifact, seen, noise)
    assert len(rows) == len(artifact.layers) and rows[0]["arm_error"] > 0
    exact, rounded = policy.infer(seen, noise).actions, quantized.infer(seen, noise).actions
    assert 0 < np.abs(exact - rounded).max() < 1
    assert arms.probe(quantized, "libero_goal")["probe"] != arms.probe(policy, "libero_goal")["probe"]
    assert np.allclose(policy.rearranged(1).infer(seen, noise).actions, exact, atol=1e-5)


def test_sequential_calibration_takes_one_block_after_the_other(policy, tmp_path, monkeypatch):
    passes, observe = [], fitting.observe

    def watched(policy, observations, noise, groups, *rest, **more):
        passes.append({group.split(".")[1] for group in groups})
        return observe(policy, observations, noise, groups, *rest, **more)

    monkeypatch.setattr(fitting, "observe", watched)
    ensure_artifact(policy, settings(tmp_path, sequential=True, rounding="gptq"))
    assert passes == [{"0"}, {"1"}]


@pytest.mark.parametrize("name, factors", [("body.0.wk", [1.1]), ("body.0.wq", [1.1]), ("body.0.wo", [1.1, 1.1])])
def test_factors_of_a_linear_that_no_correction_scales_are_refused(policy, tmp_path, name, factors):
    """A whole file with a right hash, whose factors are in range but not of what the policy says it has."""
    made = ensure_artifact(policy, settings(tmp_path, corrections=("atm", "ohb"))).artifact
    tensors = {f"{x.name}.{part}": made.tensor(f"{x.name}.{part}") for x in made.layers for part in ("codes", "scales")}
    tensors |= {
        f"{x.group}.{part}": value
        for x in made.layers
        for part in ("first", "order", "second", "importance")
        if (value := made.tensor(f"{x.group}.{part}")) is not None
    }
    wrong = build(made.spec, made.checkpoint_sha256, made.calibration, made.layers, {name: factors}, tensors)
    read = load(save(wrong, tmp_path / "wrong.safetensors"))
    with pytest.raises(GuardRefusal, match=rf"{len(factors)} factors? of {name}.*cannot make for this model"):
        quantize_policy(policy, read, "fake")


def test_selection_and_shapes_come_from_the_declaration(policy, tmp_path):
    chosen = select(policy, settings(tmp_path, include=("wq", "wk")))
    assert [choice.name for choice in chosen.choices] == ["body.0.wq", "body.0.wk", "body.1.wq", "body.1.wk"]
    assert {choice.group for choice in chosen.choices} == {"body.0.in", "body.1.in"}
    artifact = ensure_artifact(policy, settings(tmp_path)).artifact
    assert gemm_shapes(artifact)["body.1.wv"].n == 64 + 32 + 32  # q, k and v in one product


def test_heads_that_share_keys_in_groups_are_measured_each_with_its_own_keys(policy):
    seen = {each.name: AttentionSeen() for each in policy.attentions()}
    expected = {}

    def hear(name, q, k):
        _add_logits(seen, name, q, k)
        logits = [[q[0, :, head] @ k[0, :, head // 2].t() / 4] for head in range(4)]  # 2 heads a group, d 16
        expected[name] = expected.get(name, 0) + torch.tensor([float(x[0].std()) for x in logits])

    policy.sample_eagerly(observations(1)[0], noises(1, policy.noise_shape)[0], hear=hear)
    assert all(torch.allclose(seen[name].logit_std, expected[name], rtol=1e-5) for name in seen) and len(expected) == 2
