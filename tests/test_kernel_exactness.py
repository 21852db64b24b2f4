"""The risk: two backends that both call themselves W4A8 and differ in a bit.

`fake == int_ref == cpu_int4 == w8a8` as equality of integers, and of output bits, over shapes and values, and on every
layer of pi0.5 and of the compact policies. `test_kernel_triton.py` adds the GPU kernel, under its interpreter.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import assert_same, codes_for, tokens_for

from qlibero.errors import UserError, WorkFailed
from qlibero.kernels import load
from qlibero.kernels.contract import (
    EPS,
    GemmShape,
    activation_limit,
    quantize_activations,
    quantize_weights,
    search_ratios,
    weight_range,
)
from qlibero.kernels.cpu_int4 import CpuInt4
from qlibero.kernels.fake import Fake, exact_width
from qlibero.kernels.int_ref import IntRef
from qlibero.kernels.packing import pack_khalf, unpack_khalf
from qlibero.kernels.shapes import compact_layers, pi05_layers

quickly = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ODD = st.sampled_from((1, 2, 3, 7, 16, 17, 33, 65))  # row and column counts around the tiles' edges


# ---------------------------------------------------------------------------------------------------- equality
@quickly
@given(
    m=ODD,
    n=ODD,
    k8=st.integers(1, 40),
    bits=st.sampled_from((2, 4, 8)),
    kind=st.sampled_from(("random", "low", "alternating")),
    activation_bits=st.sampled_from((4, 8)),
    seed=st.integers(0, 1000),
)
def test_every_cpu_backend_has_the_reference_s_integers(m, n, k8, bits, kind, activation_bits, seed):
    codes, x = codes_for(n, 8 * k8, bits, seed, kind), tokens_for(m, 8 * k8, activation_bits, seed, kind)
    kernels = [Fake(), load("w8a8")] + ([CpuInt4("fp32"), CpuInt4("int8")] if bits <= 4 else [])
    assert_same(kernels, x, codes, bits, None, seed)


@quickly
@given(
    m=ODD,
    n=ODD,
    groups=st.integers(1, 6),
    size=st.sampled_from((16, 64, 128)),
    bits=st.sampled_from((4, 8)),
    seed=st.integers(0, 1000),
)
def test_k_groups_are_added_in_ascending_order_everywhere(m, n, groups, size, bits, seed):
    codes, x = codes_for(n, groups * size, bits, seed), tokens_for(m, groups * size, 8, seed)
    kernels = [Fake(), load("w8a8")] + ([CpuInt4("fp32"), CpuInt4("int8")] if bits <= 4 else [])
    assert_same(kernels, x, codes, bits, size, seed)


def distinct_shapes(layers):
    return sorted({(layer.shape.n, layer.shape.k) for layer in layers})


@pytest.mark.parametrize("n,k", distinct_shapes(compact_layers()))
def test_every_compact_layer(n, k):
    assert_same([Fake(), CpuInt4("fp32"), CpuInt4("int8")], tokens_for(10, k, 8, n), codes_for(n, k, 4, k), 4, None)


@pytest.mark.parametrize("n,k", distinct_shapes(pi05_layers()))
def test_every_pi05_layer_with_worst_case_and_random_tokens(n, k):
    x = torch.cat([tokens_for(1, k, 8, 0, "low"), tokens_for(1, k, 8, 0)])
    for kind in ("low", "random"):
        codes = codes_for(n, k, 4, k, kind)
        reference = IntRef().accumulate(x, IntRef().pack(codes))
        for kernel in (Fake(), CpuInt4("fp32"), CpuInt4("int8")):
            assert torch.equal(kernel.accumulate(x, kernel.pack(codes)).double(), reference.double()), kernel.name


# ------------------------------------------------------------------------------------- why floating point may do it
def test_the_fp32_limit_is_where_it_is_said_to_be():
    assert exact_width(4) == 16513 and exact_width(8) == 1032
    assert max(layer.shape.k for layer in pi05_layers()) <= exact_width(4)
    k = exact_width(4)
    x, codes = torch.full((1, k), 127, dtype=torch.int8), torch.full((1, k), -8, dtype=torch.int8)
    assert int(Fake().accumulate(x, Fake().pack(codes))) == -127 * 8 * k
    beyond = CpuInt4("fp32").supports(GemmShape(8, k + 7))
    assert not beyond.ok and "stop being exact" in beyond.reason


def test_eight_bit_weights_beyond_the_limit_are_cut_into_exact_pieces():
    x, codes = torch.full((2, 4096), 127, dtype=torch.int8), torch.full((3, 4096), -128, dtype=torch.int8)
    x[1, 1::2] = 126
    assert_same([Fake(), load("w8a8")], x, codes, 8, None)


def test_the_reference_s_two_ways_are_one(monkeypatch):
    x, codes = tokens_for(5, 256, 8, 1), codes_for(7, 256, 4, 1)
    plain = IntRef().accumulate(x, IntRef().pack(codes))
    assert torch.equal(plain, torch.einsum("mk,nk->mn", x.long(), codes.long()).int())
    monkeypatch.setattr("qlibero.kernels.int_ref.INT32_LOOP_PRODUCTS", 0)
    assert torch.equal(IntRef().accumulate(x, IntRef().pack(codes)), plain)


# -------------------------------------------------------------------------------------------------- the quantizers
def test_rounding_is_half_to_even_and_symmetric():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 126.5]])
    codes, scales = quantize_activations(x)
    assert scales.item() == 1.0
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -127, 126]]


@quickly
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    st.sampled_from((4, 8)),
    st.sampled_from((1.0, 0.9)),
)
def test_activation_codes_follow_the_contract_to_the_letter(values, bits, clip):
    import numpy as np

    x = np.asarray(values, dtype=np.float32)
    limit = np.float32(activation_limit(bits))
    scale = np.maximum(np.abs(x).max() * np.float32(clip) if clip != 1.0 else np.abs(x).max(), np.float32(EPS)) / limit
    expected = np.clip(np.rint(x / scale), -limit, limit)
    codes, scales = quantize_activations(torch.from_numpy(x)[None], bits, clip)
    assert scales.item() == scale and np.array_equal(codes[0].numpy(), expected.astype(np.int8))


def test_zero_rows_are_safe_and_minus_128_never_appears():
    codes, scales = quantize_activations(torch.zeros(2, 8))
    assert not codes.any() and torch.isfinite(scales).all() and (scales > 0).all()
    codes, _ = quantize_activations(torch.randn(50, 64) * 1e20)
    assert codes.min() >= -127


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_activations_mark_their_row_and_non_finite_weights_are_an_error(bad):
    x = torch.randn(3, 8)
    x[1, 2] = bad
    _, scales = quantize_activations(x)  # the row's outputs are not finite either, and end its episode alone
    assert torch.isfinite(scales).tolist() == [True, False, True]
    with pytest.raises(WorkFailed, match="non-finite"):
        quantize_weights(x)


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_weight_codes_and_scales(bits, group_size):
    w = torch.randn(9, 64)
    codes, scales = quantize_weights(w, bits, group_size)
    assert scales.shape == ((9,) if group_size is None else (9, 4))
    assert torch.equal(scales, scales.bfloat16().float())  # some kernels can store nothing finer
    low, high = weight_range(bits)
    assert codes.min() >= low and codes.max() <= high
    step = scales.reshape(9, -1).repeat_interleave(group_size or 64, dim=1)
    assert (
        (codes * step - w).abs() <= step * 0.57
    ).all()  # half a step, and bf16's rounding of the scale at the top code


def test_a_searched_scale_is_never_worse_than_the_plain_one():
    w = torch.randn(32, 128) * torch.exp(torch.randn(128))
    error = []
    for search in (False, True):
        codes, scales = quantize_weights(w, search=search)
        error.append(((codes * scales.unsqueeze(1) - w) ** 2).sum(1))
    assert (error[1] <= error[0]).all() and (error[1] < error[0]).any()
    assert search_ratios(4)[0] == 1.0 and search_ratios(4)[-1] == 0.5 and search_ratios(3)[-1] == 0.2


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="does not divide"):
        quantize_weights(torch.randn(4, 100), group_size=64)
    with pytest.raises(UserError, match="2 to 8 bits"):
        quantize_activations(torch.randn(2, 4), bits=16)
    with pytest.raises(UserError, match="is odd"):
        pack_khalf(torch.zeros(2, 3, dtype=torch.int8))
    with pytest.raises(UserError, match=r"\[-8, 7\]"):
        pack_khalf(torch.full((2, 4), 8, dtype=torch.int8))


@quickly
@given(n=st.integers(1, 20), half=st.integers(1, 40), seed=st.integers(0, 100))
def test_packing_is_its_own_inverse_and_halves_the_bytes(n, half, seed):
    codes = codes_for(n, 2 * half, 4, seed)
    assert torch.equal(unpack_khalf(pack_khalf(codes)), codes) and pack_khalf(codes).numel() == n * half


# ---------------------------------------------------------------------------------------------------------- memory
def test_packed_weights_with_scales_stay_under_0_30_of_bf16():
    for shape in (layer.shape for layer in compact_layers() if layer.name.startswith("M.llm")):
        codes, scales = quantize_weights(torch.randn(shape.n, shape.k))
        packed = CpuInt4().pack(codes)
        live = packed.nbytes + scales.untyped_storage().nbytes()
        assert live <= 0.30 * 2 * shape.n * shape.k, shape
        assert not packed.state_dict()  # codes belong to the artifact
        held = {t.untyped_storage().nbytes() for t in packed.__dict__.values() if isinstance(t, torch.Tensor)}
        assert not held  # and nothing else is kept


def test_a_scratch_made_in_inference_mode_can_be_used_outside():
    x, codes = tokens_for(2, 64, 8, 1), codes_for(1 << 14, 64, 4, 1)
    kernel = CpuInt4("fp32")
    with torch.inference_mode():
        first = kernel.accumulate(x, kernel.pack(codes))
    assert torch.equal(kernel.accumulate(x, kernel.pack(codes)), first.clone())
