"""Risk: a transform changes the layer it was meant to leave alone, or costs accuracy where it promises to save it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_settings import quant_of

from qlibero.errors import UserError
from qlibero.kernels import load
from qlibero.kernels.contract import quantize_activations, quantize_weights
from qlibero.quant.linear import Weights, assemble
from qlibero.quant.methods import GroupData, fit, output_rotation
from qlibero.quant.methods.duquant import greedy_rotation, uniform_first_row, zigzag
from qlibero.quant.methods.hadamard import hadamard
from qlibero.quant.transform import InputTransform, Transform, block_product
from qlibero.registry import MethodPlugin, built_in, get

torch.set_num_threads(1)
F64 = torch.float64
TRANSFORMS = [method for method in built_in(MethodPlugin) if not get(MethodPlugin, method).chooses]


def outlier_heavy(seed: int, k: int, loudness: float, tokens: int = 192, outputs: int = 96):
    """Activations with six channels `loudness` times the rest and two massive tokens; weights without either."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=g)
    channels = torch.randperm(k, generator=g)
    x[:, channels[:6]] *= loudness
    x[0, channels[6]] += 10 * loudness
    x[1, channels[7]] -= 10 * loudness
    return x, torch.randn(outputs, k, generator=g) * 0.05


def fitted(method: str, x: torch.Tensor, w: torch.Tensor, **changes) -> Transform:
    spec = quant_of(method=method, **changes)
    size = x.abs().amax(0), x.abs().mean(0), x.square().mean(0).sqrt()
    return fit(GroupData((w[: len(w) // 2], w[len(w) // 2 :]), *size, x, 3), spec)


@settings(max_examples=30, deadline=None)
@given(
    method=st.sampled_from(TRANSFORMS),
    blocks=st.integers(1, 4),
    block=st.sampled_from([8, 16, 32]),
    seed=st.integers(0, 999),
    loudness=st.sampled_from([1.0, 30.0, 1000.0]),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_without_rounding_the_output_is_the_same(method, blocks, block, seed, loudness, alpha):
    x, w = outlier_heavy(seed, blocks * block + (8 if method in ("rtn", "smoothquant") else 0), loudness, 24, 10)
    t = fitted(method, x, w, block_size=block, alpha=alpha, rotation_steps=8)
    exact = x.double() @ w.double().T
    # in float64 nothing but float64's own error is left: the weights hold the exact inverse of the stored
    # factors
    again = t.forward(x.double()) @ t.weights(w).T
    assert torch.allclose(again, exact, rtol=0, atol=1e-10 * float(exact.abs().max()))
    # online, in float32, what float32 costs
    online = InputTransform(t, x.shape[1])(x) @ t.weights(w).float().T
    assert torch.allclose(online.double(), exact, rtol=0, atol=3e-5 * float(x.norm(dim=1).max() * w.norm(dim=1).max()))
    # and back again, for weight-only layers
    assert torch.allclose(t.unweights(t.weights(w)), w.double(), rtol=0, atol=1e-10 * float(w.abs().max()))


def test_rotations_are_orthogonal_and_permutations_are_permutations():
    eye = torch.eye(64, dtype=F64)
    base = uniform_first_row(64)
    assert torch.allclose(base @ base.T, eye, atol=1e-13) and torch.allclose(
        base[0], torch.full((64,), 0.125, dtype=F64)
    )
    h = hadamard(64)
    assert torch.equal(h @ h.T, 64 * eye)
    x, w = outlier_heavy(0, 256, 50.0)
    rotation = greedy_rotation(x.double().view(-1, 4, 64).transpose(0, 1), 256, seed=0)
    assert torch.allclose(rotation @ rotation.transpose(1, 2), eye.expand(4, 64, 64), atol=1e-12)
    for method in ("duquant", "weight_pca", "svd_hadamard"):
        order = fitted(method, x, w).order
        assert sorted(order.tolist()) == list(range(256)), method
    # weight_pca's axes, too, before they are rounded to bfloat16 for keeping
    axes = output_rotation(w, quant_of(method="weight_pca", row_rotation=True, block_size=32)).double()
    assert torch.allclose(axes @ axes.transpose(1, 2), torch.eye(32, dtype=F64).expand(3, 32, 32), atol=1e-5)


def test_svd_hadamard_deals_every_coefficient_of_a_block_the_same_energy():
    """U·H of the paper: U diagonalizes the block's W^T·W, so H leaves each weight column the mean of its spectrum."""
    x, w = outlier_heavy(0, 128, 50.0)
    w = w * torch.rand(128, generator=torch.Generator().manual_seed(1)).square()
    axes, mixed = (fitted(method, x, w, block_size=32) for method in ("weight_pca", "svd_hadamard"))
    assert torch.equal(axes.order, mixed.order)
    before, after = (t.weights(w).square().sum(0).view(4, 32) for t in (axes, mixed))
    assert bool((before.amax(1) > 5 * before.amin(1)).all())
    assert torch.allclose(after, after.mean(1, keepdim=True).expand(4, 32), rtol=0.02)  # 2^-8 are bfloat16's
    with pytest.raises(UserError, match="block_size is 24; svd_hadamard needs a power of two"):
        fitted("svd_hadamard", x[:, :48], w[:, :48], block_size=24)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), blocks=st.integers(1, 8), block=st.sampled_from([4, 16, 64]))
def test_zigzag_deals_every_block_its_share(seed, blocks, block):
    peak = torch.randn(blocks * block, generator=torch.Generator().manual_seed(seed)).abs().exp()
    order = zigzag(peak, block)
    assert sorted(order.tolist()) == list(range(len(peak)))
    dealt, plain = peak[order].view(blocks, block).mean(1), peak.sort().values.view(blocks, block).mean(1)
    assert float(dealt.max() - dealt.min()) <= float(plain.max() - plain.min()) + 1e-6
    # two neighbours in rank differ by less than the whole range, and so do the block means: the paper's bound
    assert float(dealt.max() - dealt.min()) <= float(peak.max() - peak.min()) / block + 1e-5


def test_zigzag_is_serpentine():
    assert zigzag(torch.arange(12, 0, -1.0), 4).view(3, 4).tolist() == [
        [0, 5, 6, 11],
        [1, 4, 7, 10],
        [2, 3, 8, 9],
    ]


@pytest.mark.parametrize("loudness", [5.0, 50.0])
def test_greedy_rotation_lowers_every_peak_and_never_raises_one(loudness):
    x, _ = outlier_heavy(1, 256, loudness)
    blocks = x.double().view(-1, 4, 64).transpose(0, 1)
    before = blocks.abs().amax((1, 2))
    after = torch.bmm(blocks, greedy_rotation(blocks, 256, seed=0)).abs().amax((1, 2))
    assert bool((after <= before * (1 + 1e-6)).all()) and float(after.max()) < float(before.max()) / 2
    nothing_to_do = torch.eye(64, dtype=F64)[None] * 0 + 1.0  # all equal: any rotation would make a peak
    assert float(torch.bmm(nothing_to_do, greedy_rotation(nothing_to_do, 256, seed=0)).abs().max()) <= 1.0 + 1e-6


def relative_error(method: str, x: torch.Tensor, w: torch.Tensor, weight_bits: int, activation_bits: int) -> float:
    t = fitted(method, x, w, weight_bits=weight_bits, activation_bits=activation_bits)
    codes, s_w = quantize_weights(t.weights(w).float(), weight_bits)
    (module,) = assemble(
        load("fake"),
        InputTransform(t, x.shape[1]),
        [Weights(codes, s_w)],
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        activation_clip=1.0,
        dtype=torch.float32,
    )
    exact = x.double() @ w.double().T
    return float((module(x).double() - exact).norm() / exact.norm())


# At W4A8 smoothing only pays once outliers are loud: it moves them into 4-bit weights. At 20 it loses to rtn.
CASES = [(4, 4, 20.0), (4, 4, 100.0), (8, 8, 20.0), (8, 8, 100.0), (4, 8, 60.0), (4, 8, 100.0)]


@pytest.mark.parametrize(("weight_bits", "activation_bits", "loudness"), CASES)
def test_with_rounding_each_method_beats_the_one_before(weight_bits, activation_bits, loudness):
    for seed in range(2):
        x, w = outlier_heavy(seed, 256, loudness)
        rtn, smooth, duquant = (
            relative_error(m, x, w, weight_bits, activation_bits) for m in ("rtn", "smoothquant", "duquant")
        )
        assert rtn >= smooth >= duquant, (seed, rtn, smooth, duquant)
        assert duquant < rtn / 2


@pytest.mark.parametrize("loudness", [1.0, 20.0, 100.0])
def test_smooth_hadamard_is_as_good_as_duquant_with_outliers_and_without(loudness):
    """W4A8 on unseen tokens, scales searched: not 0.1 dB worse."""
    noise = dict.fromkeys(("duquant", "smooth_hadamard"), 0.0)
    for seed in range(2):
        x, w = outlier_heavy(seed, 256, loudness, tokens=512)
        exact = x[320:].double() @ w.double().T
        for method in noise:
            t = fitted(method, x[:320], w)
            loud = t.forward(x[:320].double()).square().mean(0).float()
            codes, s_w = quantize_weights(t.weights(w).float(), search=True, importance=loud)
            rounded, s_x = quantize_activations(t.forward(x[320:]))
            y = (rounded.double() * s_x.double()[:, None]) @ (codes.double() * s_w.double()[:, None]).T
            noise[method] += float((y - exact).square().sum() / exact.square().sum())
    assert noise["smooth_hadamard"] <= 10**0.01 * noise["duquant"]


@pytest.mark.parametrize("method", TRANSFORMS)
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_weight_only_layers_equal_their_codes_without_any_online_work(method, weight_bits):
    x, w = outlier_heavy(2, 128, 30.0)
    t = fitted(method, x, w, activation_bits=16, weight_bits=weight_bits, row_rotation=method == "weight_pca")
    rotation = output_rotation(w, quant_of(method=method, row_rotation=method == "weight_pca", block_size=32))
    rotated = t.weights(w) if rotation is None else block_product(t.weights(w).T, rotation.double().transpose(1, 2)).T
    codes, s_w = quantize_weights(rotated.float(), weight_bits, group_size=32)
    (module,) = assemble(
        None,
        InputTransform(t, 128),
        [Weights(codes, s_w, torch.ones(len(w)), rotation)],
        weight_bits=weight_bits,
        activation_bits=16,
        activation_clip=1.0,
        dtype=torch.float32,
    )
    assert type(module) is torch.nn.Linear
    dequantized = (codes.double().view(len(w), 4, 32) * s_w.double()[:, :, None]).view(len(w), 128)
    y = t.forward(x.double()) @ dequantized.T
    y = (y if rotation is None else block_product(y, rotation.double())) + 1.0
    assert torch.allclose(module(x).double(), y, rtol=0, atol=2e-5 * float(x.norm(dim=1).max() * w.norm(dim=1).max()))
    exact = x.double() @ w.double().T + 1.0
    assert float((module(x) - exact).norm() / exact.norm()) < (0.25 if weight_bits == 4 else 0.02)


def test_shared_input_is_quantized_once_and_the_same_for_all():
    """q/k/v share one transform; sharing its codes must be what each would have computed alone."""
    from qlibero.policies.pi05.layers import project, project_joined

    x, w = outlier_heavy(4, 128, 40.0)
    t = InputTransform(fitted("duquant", x, w), 128)
    parts = [
        Weights(*quantize_weights(t.factors().weights(w[rows]).float(), 4), bias)
        for rows, bias in ((slice(0, 64), None), (slice(64, 96), torch.randn(32)))
    ]
    settings = dict(weight_bits=4, activation_bits=8, activation_clip=1.0, dtype=torch.float32)
    linears = assemble(load("fake"), t, parts, **settings)
    apart = [assemble(load("fake"), t, [part], **settings)[0] for part in parts]
    calls = []
    original = t.quantize
    t.quantize = lambda *args, **layout: calls.append(1) or original(*args, **layout)
    shared = project(x.view(2, 96, 128), *linears)
    assert len(calls) == 1
    # side by side they are the product's own columns, not a copy; in another order, or with a stranger, they are put
    # together
    joined = project_joined(x.view(2, 96, 128), *linears)
    assert torch.equal(joined, torch.cat(shared, -1)) and joined._base is not None
    swapped, mixed = project_joined(x, *linears[::-1]), project_joined(x, linears[0], apart[1])
    assert torch.equal(swapped, torch.cat([part.flatten(0, 1) for part in shared[::-1]], -1))
    assert torch.equal(mixed, joined.flatten(0, 1))
    del calls[:]
    for y, linear, lone in zip(shared, linears, apart, strict=True):
        assert torch.equal(y, linear(x.view(2, 96, 128))) and torch.equal(y, lone(x.view(2, 96, 128)))
    # a neighbour that stays in full precision gets the plain input
    plain = torch.nn.Linear(128, 8, bias=False)
    assert torch.equal(project(x, linears[0], plain)[1], plain(x)) and torch.equal(
        project(x, plain, linears[0])[0], plain(x)
    )
    codes, scales = original(x, 8, 1.0)
    assert torch.equal(codes, quantize_activations(t(x), 8)[0])
