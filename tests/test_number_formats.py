"""Risk: an arm of another number format, or of other bits, computes something that its name does not mean."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from pi05_small import noises, observations
from test_fake_equals_kernel import asked, small_policy

from qlibero.config.quantization import Quant
from qlibero.errors import UserError
from qlibero.kernels import load
from qlibero.kernels.contract import GemmShape, quantize_activations, quantize_weights
from qlibero.kernels.fp8 import e4m3, quantize_e4m3
from qlibero.kernels.shapes import Layer
from qlibero.kernels.validation import check
from qlibero.quant.against_weights import require_of_weights
from qlibero.quant.apply import gemm_shapes, quantize_policy
from qlibero.quant.artifact import load as load_artifact
from qlibero.quant.artifact import save
from qlibero.quant.calibrate import calibrate
from qlibero.quant.float_linear import FloatLinear
from qlibero.quant.linear import Weights
from qlibero.quant.number_formats import e2m1, grid_of, quantize_floats
from qlibero.quant.transform import InputTransform, Transform

torch.set_num_threads(1)


def every_e4m3() -> list[Fraction]:
    """All finite numbers of 1 sign, 4 exponent (bias 7) and 3 mantissa bits, without the last code of the top (NaN)."""
    sizes = [Fraction(m, 8) * Fraction(2) ** -6 for m in range(8)]
    sizes += [
        (1 + Fraction(m, 8)) * Fraction(2) ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
    ]
    return sizes


E2M1 = [Fraction(x) for x in ("0", "0.5", "1", "1.5", "2", "3", "4", "6")]


def nearest(x: Fraction, sizes: list[Fraction]) -> Fraction:
    """Nearest in size, ties to the even index, which is the even mantissa; beyond the last: the last."""
    sign, size = (-1 if x < 0 else 1), abs(x)
    best = min(range(len(sizes)), key=lambda i: (abs(sizes[i] - size), i % 2))
    return sign * sizes[best]


@pytest.mark.parametrize(("rounded", "sizes"), [(e4m3, every_e4m3()), (e2m1, E2M1)], ids=["e4m3", "e2m1"])
def test_elements_are_rounded_to_the_nearest_ties_to_even(rounded, sizes):
    middles = [(a + b) / 2 for a, b in zip(sizes, sizes[1:], strict=False)]
    g = torch.Generator().manual_seed(0)
    some = [Fraction(float(x)) for x in torch.randn(200, generator=g) * float(sizes[-1]) / 2]
    values = [s * x for x in (*sizes, *middles, *some, 2 * sizes[-1]) for s in (1, -1)]
    found = rounded(torch.tensor([float(x) for x in values], dtype=torch.float32))
    assert [Fraction(float(y)) for y in found] == [nearest(x, sizes) for x in values]


def layer_of(number_format: str, w: torch.Tensor, **changes) -> tuple[FloatLinear, torch.Tensor, torch.Tensor]:
    bits = {"fp8": 8}.get(number_format, 4)
    settings = {"weight_bits": bits, "activation_bits": bits} | changes
    spec = Quant(layout="llm", method="rtn", number_format=number_format, rounding="nearest", **settings)
    grid = grid_of(w, spec, spec.weight_bits, search=False)
    codes, scales = grid.codes(w), grid.kept(spec.scale_group)
    shared = InputTransform(Transform(), w.shape[1])
    return FloatLinear(shared, Weights(codes, scales), number_format, 1.0), codes, scales


@pytest.mark.parametrize("weight_bits", [8, 4])
def test_fp8_is_its_exact_sum_scaled_in_the_contract_s_order(weight_bits):
    """In fractions: no floating point is trusted to check itself. The widest layer pi0.5 has is within the proof."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 96, generator=g) * torch.exp(2 * torch.randn(96, generator=g))
    w = torch.randn(4, 96, generator=g)
    linear, codes, scales = layer_of("fp8", w, weight_bits=weight_bits, activation_bits=8)
    codes_x, s_x = quantize_e4m3(x)
    y = linear(x)
    for m in range(3):
        for n in range(4):
            pairs = zip(codes_x[m].double().tolist(), codes[n].double().tolist(), strict=True)
            exact = sum(Fraction(a) * Fraction(b) for a, b in pairs)
            expected = np.float32(np.float32(float(exact)) * s_x[m].numpy()) * scales[n].numpy()
            assert y[m, n].item() == np.float32(expected)
    assert 16384 * 448 * 448 < 2**35 and 2**35 * 2**18 <= 2**53


def test_a_block_of_nvfp4_and_of_mxfp4_by_hand():
    """One row of 32: a block of sixteen 6s and one of sixteen 0.3s. mxfp4: 2^(floor(log2 6) - 2) = 1, so 0.3 becomes
    0.5 in a shared block. nvfp4: scales 1 and e4m3(0.05) = 0.05078125, elements 6 and 6."""
    x = torch.cat([torch.full((16,), 6.0), torch.full((16,), 0.3)])[None]
    values, scale = quantize_floats(x, "mxfp4", 1.0)
    assert scale.tolist() == [1.0] and values[0, :16].tolist() == [6.0] * 16 and values[0, 16:].tolist() == [0.5] * 16
    values, _ = quantize_floats(x, "nvfp4", 1.0)
    # the token's power of two is 2^ceil(log2(6 / 6 / 448)) = 2^-8: 0.05·256 = 12.8 -> 13 in e4m3
    assert values[0, :16].tolist() == [6.0] * 16 and values[0, 16:].tolist() == pytest.approx(
        [6 * 13 / 256] * 16, abs=0
    )


@pytest.mark.parametrize("number_format", ["fp8", "nvfp4", "mxfp4"])
def test_rows_do_not_know_what_else_is_in_the_batch(number_format):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(9, 64, generator=g) * torch.exp(3 * torch.randn(9, 1, generator=g))
    linear, _, _ = layer_of(number_format, torch.randn(5, 64, generator=g))
    together = linear(x)
    assert all(torch.equal(together[i : i + 1], linear(x[i : i + 1])) for i in range(9))


# ------------------------------------------------------------------------------------------------ integers of all bits
@pytest.mark.parametrize("activation_bits", [4, 6, 8])
@pytest.mark.parametrize(
    ("bits", "symmetric"), [(2, True), (3, True), (5, True), (6, True), (2, False), (4, False), (6, False)]
)
def test_every_kernel_that_takes_the_bits_gives_fake_s_integers(bits, symmetric, activation_bits):
    g = torch.Generator().manual_seed(bits)
    w, x = torch.randn(24, 128, generator=g) + 0.1, torch.randn(7, 128, generator=g)
    codes, scales = quantize_weights(w, bits, 32, search=True, symmetric=symmetric)
    kernel_bits = bits if symmetric else bits + 1
    codes_x, s_x = quantize_activations(x, activation_bits)
    assert int(codes_x.abs().max()) == 2 ** (activation_bits - 1) - 1
    shape = GemmShape(24, 128, kernel_bits, activation_bits, 32)
    outputs = {}
    for name in ("int_ref", "fake", "cpu_int4", "w8a8"):
        kernel = load(name)
        if kernel.fits(shape).ok and kernel.supports(shape).ok:
            packed = kernel.pack(codes, kernel_bits, 32)
            outputs[name] = kernel.matmul(codes_x, s_x, packed, scales)
    assert set(outputs) == {"int_ref", "fake", "w8a8"} | ({"cpu_int4"} if kernel_bits <= 4 else set())
    assert all(torch.equal(y, outputs["int_ref"]) for y in outputs.values())


def test_a_zero_point_serves_weights_that_are_not_centred():
    g = torch.Generator().manual_seed(0)
    w = torch.rand(16, 64, generator=g) + 1.0  # all positive: half of a symmetric range is waste
    error = {}
    for symmetric in (True, False):
        codes, scales = quantize_weights(w, 4, symmetric=symmetric)
        error[symmetric] = float((codes * scales[:, None] - w).square().mean())
    # sixteen levels over [0, 2] instead of eight: a quarter of the squared error
    assert error[False] < 0.35 * error[True]
    codes, _ = quantize_weights(torch.linspace(-1, 2, 16)[None], 4, symmetric=False)
    assert codes.tolist() == [list(range(-5, 11))]  # step 3/15 and zero point 5


# ----------------------------------------------------------------------------------------------------- whole policies
ARMS = [
    {"weight_bits": 2, "activation_bits": 6},
    {"weight_bits": 3, "rounding": "gptq"},
    {"weight_bits": 5},
    {"weight_bits": 6, "activation_bits": 16},
    {"symmetric": False, "group_size": 16, "rounding": "gptq"},
    {"number_format": "fp8", "weight_bits": 8, "layout": "llm+expert"},
    {"number_format": "fp8", "weight_bits": 4, "per_layer_bits": {"v_proj": 8, "k_proj": 16}},
    {"number_format": "nvfp4", "activation_bits": 4, "method": "smooth_hadamard", "rounding": "gptq"},
    {"number_format": "mxfp4", "activation_bits": 16},
]


@pytest.fixture(scope="module")
def policy():
    return small_policy()


@pytest.mark.parametrize("changes", ARMS, ids=str)
def test_an_arm_of_each_kind_is_made_read_back_judged_and_run(policy, changes, tmp_path):
    spec = Quant(**{"layout": "llm", "method": "rtn", "block_size": 16, **changes})
    made = calibrate(policy, observations(3), noises(3, policy.noise_shape), spec, {"data_sha256": "2" * 64})
    artifact = load_artifact(save(made, tmp_path / "a.safetensors"))
    require_of_weights(policy.model, artifact)
    layers = [Layer(name, shape, (3,)) for name, shape in gemm_shapes(artifact).items()]
    verdicts = check(layers, "fake", remember=False)
    floats = spec.number_format != "int" and spec.activation_bits < 16
    expected = "dequantized" if spec.activation_bits == 16 else "simulated" if floats else "fake"
    assert {v.executed for v in verdicts} == {expected}
    actions = asked(quantize_policy(policy, artifact, {x.name: expected for x in artifact.layers}))
    assert np.isfinite(actions).all() and not np.array_equal(actions, asked(policy))
    if spec.number_format == "int" and spec.activation_bits < 16:
        for backend in ("int_ref", "w8a8", *(["cpu_int4"] if spec.symmetric and spec.weight_bits <= 4 else [])):
            assert np.array_equal(actions, asked(quantize_policy(policy, artifact, backend))), backend
    else:
        refused = check(layers, "w8a8", remember=False)
        assert all(v.executed is None and "write fake" in v.reason for v in refused)
        with pytest.raises(UserError, match="no kernel w8a8"):
            quantize_policy(policy, artifact, "w8a8")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"number_format": "fp8"}, None),
        ({"number_format": "fp8", "activation_bits": 4}, "fp8 has activation_bits 8, not 4"),
        ({"number_format": "fp8", "weight_bits": 6}, "fp8 has weight_bits 4 or 8, not 6"),
        ({"number_format": "nvfp4"}, "nvfp4 has activation_bits 4 or 16, not 8"),
        ({"number_format": "mxfp4", "activation_bits": 4, "group_size": 64}, "says itself what shares a scale"),
        ({"number_format": "nvfp4", "activation_bits": 4, "per_layer_bits": {"x": 8}}, "nvfp4 has weights of 4 bits"),
        ({"symmetric": False, "weight_bits": 8}, "at most 6 bits"),
        ({"symmetric": False, "per_layer_bits": {"x": 8}}, "at most 6 bits"),
        ({"symmetric": False, "number_format": "fp8"}, "at most 6 bits"),
        ({"number_format": "fp8", "method": "weight_pca", "row_rotation": True}, "row_rotation"),
        ({"weight_bits": 7}, "weight_bits"),
        ({"weight_bits": 8, "activation_bits": 4}, None),
    ],
    ids=str,
)
def test_what_a_format_does_not_have_is_refused(changes, said):
    settings = {"layout": "llm", "method": "rtn", **changes}
    if said is None:
        Quant(**settings)
        return
    with pytest.raises(ValueError, match=said):
        Quant(**settings)


def test_an_mx_scale_just_below_a_power_of_two_is_the_lower_one() -> None:
    """OCP MX 1.0: 2^(floor(log2 max) - 2); a float32 log2 rounds both of these up."""
    spec = Quant(method="rtn", layout="llm", number_format="mxfp4", activation_bits=16)
    below = torch.tensor([[2.0**7 * (1 - 2.0**-24)], [2.0**-5 * (1 - 2.0**-24)]]).expand(2, 32)
    assert grid_of(below, spec, 4, search=False).scales.flatten().tolist() == [2.0**4, 2.0**-8]


@pytest.mark.parametrize("search", [False, True])
def test_a_row_is_rounded_the_same_whatever_rows_lie_beside_it(search: bool) -> None:
    """Artifacts are held against their weights some rows at a time; a nearly dead row counts too."""
    spec = Quant(method="rtn", layout="llm", number_format="nvfp4", activation_bits=16)
    w = (
        torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
        * torch.tensor([3, 1, 1e-2, 1e-4, 1e-5, 1])[:, None]
    )
    together = grid_of(w, spec, 4, search=search).scales
    alone = torch.cat([grid_of(row[None], spec, 4, search=search).scales for row in w])
    assert torch.equal(together, alone)
