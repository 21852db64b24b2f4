"""Risk: a rounding that should repair errors makes them, or its gain is that of the tokens it was fitted on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pi05_small import observations
from test_fake_equals_kernel import small_policy

from qlibero.config.quantization import Quant
from qlibero.errors import GuardRefusal, UserError, WorkFailed
from qlibero.kernels.contract import quantize_weights, weight_grid
from qlibero.quant import fitting
from qlibero.quant.activation_stats import ActivationObserver
from qlibero.quant.artifact import build, load, save
from qlibero.quant.calibrate import calibrate
from qlibero.quant.fitting import Basis, basis_of, fit_transform, quantize_linear
from qlibero.quant.gptq import gptq
from qlibero.quant.held_out import held_out
from qlibero.quant.inspect import inspect_artifact
from qlibero.quant.layout import Choice
from qlibero.quant.methods.auto import WITHIN_DB
from qlibero.quant.transform import Transform

torch.set_num_threads(1)


def tokens(seed: int, k: int, count: int) -> torch.Tensor:
    """Correlated channels of different loudness, as layers really see them."""
    g = torch.Generator().manual_seed(7)
    mixing = torch.randn(k // 4, k, generator=g) * torch.exp(torch.randn(k, generator=g))
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, k // 4, generator=g) @ mixing + 0.1 * torch.randn(count, k, generator=g)


def by_the_book(w: torch.Tensor, h: torch.Tensor, low, high, step: torch.Tensor) -> torch.Tensor:
    """Optimal brain quantization in GPTQ's order: after each column the inverse of what is left, made anew."""
    h = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    left = torch.argsort(h.diagonal(), descending=True, stable=True).tolist()
    w, out = w.double().clone(), torch.zeros_like(w, dtype=torch.float64)
    while left:
        j, inverse = left[0], torch.linalg.inv(h[left][:, left])
        out[:, j] = (w[:, j] / step[:, j]).round().clamp(low[:, j], high[:, j]) * step[:, j]
        w[:, left] -= ((w[:, j] - out[:, j]) / inverse[0, 0])[:, None] * inverse[0]
        left = left[1:]
    return out


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, None, True), (2, 35, True), (3, 70, False)])
def test_gptq_is_what_its_paper_defines(bits, group, symmetric):
    k = 140  # more than one block of columns
    x, w = tokens(0, k, 600), torch.randn(6, k, generator=torch.Generator().manual_seed(1))
    h = x.T @ x / len(x)
    grid = weight_grid(w, bits, group, search=True, symmetric=symmetric)
    found = gptq(w, h, grid.nearest(k), "here")

    def spread(value: torch.Tensor) -> torch.Tensor:
        return value.double().repeat_interleave(k // value.shape[1], 1)

    step, low, high = spread(grid.scales), spread(grid.low), spread(grid.high)
    expected = by_the_book(w, h, low, high, step)
    assert torch.allclose(found, expected, atol=1e-9)
    assert torch.equal(grid.codes(found).double() * step, found)  # every value is one of the grid's


def test_a_channel_that_is_always_zero_is_rounded_to_nearest_and_harms_no_other():
    x, w = tokens(0, 64, 400), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    x[:, [3, 40]] = 0
    grid = weight_grid(w)
    found = gptq(w, x.T @ x, grid.nearest(64), "here")
    nearest = grid.codes(w).double() * grid.scales.double()
    assert torch.equal(found[:, [3, 40]], nearest[:, [3, 40]])
    assert float(((found - w) @ x.T.double()).norm()) < float(((nearest - w) @ x.T.double()).norm())


def test_second_moments_that_are_none_are_refused_by_name():
    w, near = torch.randn(3, 8), weight_grid(torch.randn(3, 8)).nearest(8)
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 9.0
    with pytest.raises(WorkFailed, match=r"layers\.3\.o_proj.*not positive definite.*rounding: search"):
        gptq(w, indefinite, near, "layers.3.o_proj")
    with pytest.raises(WorkFailed, match=r"layers\.3\.o_proj.*not finite.*rounding: search"):
        gptq(w, torch.full((8, 8), float("nan")), near, "layers.3.o_proj")


def basis(x: torch.Tensor, held: torch.Tensor, linear: torch.nn.Linear, spec: Quant, moments: bool = True) -> Basis:
    listener = ActivationObserver(0, "here", moments)
    listener.hear(x)
    listener.held = True
    listener.hear(held)
    seen = listener.result()
    return basis_of(fit_transform([linear.weight.detach()], "here", seen, spec), linear, seen)


def linear_of(w: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight.data = w
    return linear


CHOICE = Choice("here", "here", 4, 8, True)


def test_a_layer_keeps_what_held_out_tokens_prefer():
    """Correlated tokens: GPTQ gains. Few tokens of independent channels: it learns them by heart, and is not kept."""
    g = torch.Generator().manual_seed(0)
    linear, spec = linear_of(torch.randn(64, 128, generator=g)), Quant(layout="llm", method="rtn", rounding="gptq")
    fitted = quantize_linear(linear, CHOICE, basis(tokens(1, 128, 3000), tokens(2, 128, 300), linear, spec), spec)
    assert fitted.rounding == "gptq" and fitted.tried["gptq"] > fitted.tried["nearest"] + 6
    few, held = torch.randn(48, 128, generator=g), torch.randn(300, 128, generator=g)
    fitted = quantize_linear(linear, CHOICE, basis(few, held, linear, spec), spec)
    assert fitted.rounding != "gptq" and fitted.tried["gptq"] < max(fitted.tried.values())
    assert fitted.measures.sqnr_db == max(fitted.tried.values())


@pytest.mark.parametrize("smoothing", ["max", "rms", "mean"])
def test_the_search_does_not_clip_the_columns_that_smoothing_made_loud(smoothing):
    """Unweighted it did: 18 dB became 13 (an audit's F3)."""
    g = torch.Generator().manual_seed(3)
    x, w = torch.randn(900, 256, generator=g), torch.randn(96, 256, generator=g) * 0.05
    x[:, torch.randperm(256, generator=g)[:6]] *= 60.0
    linear, spec = linear_of(w), Quant(layout="llm", method="smoothquant", smoothing=smoothing)
    here = basis(x[:600], x[600:], linear, spec, moments=False)
    fitted = quantize_linear(linear, CHOICE, here, spec)
    assert fitted.tried["search"] > fitted.tried["nearest"] - 0.1
    unweighted, scales = quantize_weights(here.shared.factors().weights(w).float(), search=True)
    blind = (here.shared(x[600:]) @ (unweighted * scales[:, None]).T - x[600:] @ w.T).square().sum()
    assert 10 * torch.log10((x[600:] @ w.T).square().sum() / blind) < fitted.tried["search"] - 3


def test_smoothing_follows_the_loudness_it_is_told_to():
    """Channels of equal rms, one of them by a single massive token: only `max` smooths it more."""
    x = torch.ones(1000, 4)
    x[:, 3] = 0.0
    x[7, 3] = 1000**0.5
    w = torch.ones(2, 4)
    factors = {}
    for smoothing in ("max", "rms", "mean", "none"):
        spec = Quant(layout="llm", method="smooth_hadamard", smoothing=smoothing)
        listener = ActivationObserver(0, "here", False)
        listener.hear(x)
        t = fit_transform([w], "here", listener.result(), spec)
        factors[smoothing] = (t.hadamard.float().abs() / t.hadamard.float().abs()[0]).tolist()
    assert factors["max"] == pytest.approx([1, 1, 1, 1000**-0.25], rel=0.01)
    assert factors["rms"] == pytest.approx([1, 1, 1, 1], rel=0.01)
    assert factors["mean"] == pytest.approx([1, 1, 1, (1000**0.5 / 1000) ** -0.5], rel=0.01)
    assert factors["none"] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="none leaves nothing of smoothquant"):
        Quant(layout="llm", method="smoothquant", smoothing="none")


def test_a_third_of_the_observations_measures_and_fits_nothing():
    assert held_out(1) == [False] and held_out(2) == [False, True] and held_out(3) == [False, False, True]
    assert sum(held_out(96)) == 32 and not held_out(0)


def test_second_moments_follow_the_transform():
    x = tokens(0, 64, 500)
    linear, spec = linear_of(torch.randn(8, 64)), Quant(layout="llm", block_size=16, rotation_steps=8)
    here = basis(x, x, linear, spec)
    y = here.shared.factors().forward(x.double())
    assert torch.allclose(here.second, y.T @ y / len(y), rtol=1e-4, atol=1e-4 * float(here.second.abs().max()))
    identity = basis_of(Transform(), linear, here.seen)
    assert torch.allclose(identity.second.float(), x.T @ x / len(x), rtol=1e-4)


# ------------------------------------------------------------------------------------------------- whole policies
EMBEDDED = Path(__file__).parents[1] / "examples/libero/embedded"
LLM = "paligemma_with_expert.paligemma.model.language_model.layers."


@pytest.fixture(scope="module")
def embedded():
    """The embedded policy and nine of its demonstrations."""
    from qlibero.config.load import load_experiment
    from qlibero.policies import load_policy
    from qlibero.quant.observations import read_demonstrations

    root = EMBEDDED.parents[2]
    policy = load_policy(load_experiment(root / "configs/experiments/llm_w4a8_fake.yaml").policy)
    return policy, read_demonstrations(EMBEDDED / "calibration.npz").sample(9, 0).observations


def made(policy, seen, **changes):
    spec = Quant(layout=None, **changes)
    noise = np.random.default_rng(0).standard_normal((len(seen), *policy.noise_shape), dtype=np.float32)
    return calibrate(policy, seen, noise, spec, {"data_sha256": "2" * 64})


def test_gptq_gains_three_decibels_on_the_embedded_language_model(embedded):
    """On observations it was not fitted on: six linears with four different inputs."""
    names = ("0.self_attn.q_proj", "0.self_attn.k_proj", "1.self_attn.o_proj", "1.mlp.up_proj", "2.mlp.down_proj")
    artifact = made(
        *embedded, method="rtn", rounding="gptq", include=tuple(f"language_model.layers.{name}$" for name in names)
    )
    gains = [layer.tried["gptq"] - layer.tried["nearest"] for layer in artifact.layers]
    assert len(gains) == 5 and np.mean(gains) >= 3 and min(gains) > 0
    assert artifact.calibration["held_out"] == 3
    assert all(layer.sqnr_db == max(layer.tried.values()) for layer in artifact.layers)


def test_auto_is_never_worse_than_its_candidates_by_more_than_it_says(tmp_path):
    policy, seen = small_policy(), observations(6)
    include = (r"layers\.0\.self_attn\.(q|k|v)_proj", r"language_model.layers\.1\.mlp\.")
    settings = {"include": include, "block_size": 16, "rotation_steps": 8, "activation_bits": 4}

    def noise_of(method: str) -> dict[str, float]:
        artifact = made(policy, seen, method=method, **settings)
        groups: dict[str, list[float]] = {}
        for layer in artifact.layers:
            groups.setdefault(layer.group, []).append(10 ** (-layer.sqnr_db / 10))
        return {group: -10 * np.log10(np.mean(noise)) for group, noise in groups.items()}, artifact

    chosen, artifact = noise_of("auto")
    alone = {method: noise_of(method)[0] for method in ("rtn", "smoothquant", "smooth_hadamard", "duquant")}
    for group, db in chosen.items():
        best = max(found[group] for found in alone.values())
        assert db >= best - WITHIN_DB - 1e-3
        kept = artifact.calibration["auto"][group]["kept"]
        assert db == pytest.approx(alone[kept][group], abs=1e-3)
        cheaper = list(alone)[: list(alone).index(kept)]
        assert all(alone[method][group] < best - WITHIN_DB for method in cheaper)
    assert {layer.method for layer in artifact.layers} == {x["kept"] for x in artifact.calibration["auto"].values()}
    for row in inspect_artifact(save(artifact, tmp_path / "auto.safetensors"))["chosen"]:
        assert row["kept"] in alone and [row[method] for method in alone] == pytest.approx(
            [alone[method][row["input"]] for method in alone], abs=1e-3
        )
    nonsense = artifact.calibration | {"auto": {"here": 5}}
    other = build(artifact.spec, "1" * 64, nonsense, artifact.layers, {}, artifact.in_memory())
    with pytest.raises(GuardRefusal, match="no artifact of this version"):
        load(save(other, tmp_path / "other.safetensors"))


def test_sequential_fits_a_layer_on_what_quantized_layers_feed_it():
    policy, seen = small_policy(), observations(3)
    settings = {"include": ("language_model",), "method": "rtn", "weight_bits": 2, "rounding": "gptq"}
    at_once, in_turn = made(policy, seen, **settings), made(policy, seen, sequential=True, **settings)
    same = {x.name: torch.equal(at_once.codes(x.name), in_turn.codes(x.name)) for x in at_once.layers if x.executed}
    first = [equal for name, equal in same.items() if "layers.0." in name]
    assert all(first) and not any(equal for name, equal in same.items() if "layers.1." in name)


def test_memory_decides_how_often_observations_run_and_nothing_else(monkeypatch):
    policy, seen, passes = small_policy(), observations(3), []
    run = fitting.observe
    monkeypatch.setattr(fitting, "observe", lambda *args, **how: passes.append(1) or run(*args, **how))
    settings = {"include": ("language_model",), "method": "rtn", "rounding": "gptq"}
    at_once = made(policy, seen, **settings)
    assert len(passes) == 1
    monkeypatch.setattr(fitting, "second_moment_bytes", lambda _: 80_000)  # less than one layer takes
    bit_by_bit = made(policy, seen, **settings)
    assert len(passes) > 3 and bit_by_bit.sha256 == at_once.sha256


def test_what_a_method_lacks_is_said():
    policy = small_policy()
    none = np.zeros((0, *policy.noise_shape), np.float32)
    with pytest.raises(UserError, match="rounding: gptq is fitted on observations and there are none"):
        calibrate(policy, [], none, Quant(layout="llm", method="rtn", rounding="gptq"), {"data_sha256": "x"})
    with pytest.raises(UserError, match="method auto is fitted on observations"):
        calibrate(policy, [], none, Quant(layout="llm", method="auto"), {"data_sha256": "x"})
    # few tokens and dead channels are no reason to stop, but one to say so
    artifact = made(policy, observations(1), method="rtn", rounding="gptq", include=(r"gemma_expert.*0\.mlp\.",))
    assert artifact.calibration["held_out"] == 0
    few = [note for note in artifact.calibration["notes"] if "tokens for 64 channels" in note]
    assert len(few) == 1 and "damping" in few[0]
    with torch.no_grad():  # a norm that silences two channels of what the gate and up projections read
        policy.model.get_submodule(f"{LLM}0.post_attention_layernorm").weight[[3, 7]] = -1.0
    artifact = made(policy, observations(1), method="rtn", rounding="gptq", include=(r"language_model.*0\.mlp\.gate",))
    assert "2 of 64 channels were zero in every token" in artifact.calibration["notes"][0]
    assert np.isfinite(artifact.layers[0].sqnr_db) and set(artifact.layers[0].tried) == {"nearest", "search", "gptq"}
