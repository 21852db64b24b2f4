"""The risk: the GPU kernels are wrong and nobody here has a GPU to see it.

They run under Triton's interpreter, against the same reference and with the same equality as every other backend; and
they are compiled ahead of time for GPUs that are not here, where a spill, a contracted epilogue or a missed tensor core
shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Whether kernels are interpreted is decided when they are defined, so the variable must be there for these imports; and
# only for these, because with it the backend would offer itself as a CPU kernel to everything else in this process.
with pytest.MonkeyPatch.context() as _patch:
    _patch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    import triton.experimental.gluon  # noqa: F401  what a first launch imports; it looks at the variable too

    from qlibero.kernels import triton_gemm, triton_prologue

from kernel_cases import assert_same, codes_for, tokens_for

from qlibero.kernels import load
from qlibero.kernels.contract import GemmShape, epilogue, quantize_activations
from qlibero.kernels.exactness import try_kernel
from qlibero.kernels.int_ref import IntRef
from qlibero.kernels.packing import pack_khalf
from qlibero.kernels.shapes import compact_layers, pi05_layers
from qlibero.kernels.triton_tiles import choose_tile
from qlibero.quant.transform import InputTransform, Transform

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def triton_w4a8(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_gemm.INTERPRETED
    return load("triton_w4a8")


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    m=st.sampled_from((1, 3, 16, 17, 33)),
    n=st.sampled_from((1, 5, 64, 70)),
    k8=st.integers(1, 24),
    kind=st.sampled_from(("random", "low", "alternating")),
    seed=st.integers(0, 1000),
)
def test_triton_has_the_reference_s_integers(triton_w4a8, m, n, k8, kind, seed):
    assert_same([triton_w4a8], tokens_for(m, 8 * k8, 8, seed, kind), codes_for(n, 8 * k8, 4, seed, kind), 4, None, seed)


@pytest.mark.parametrize("m,n,k,group_size", [(5, 33, 256, 64), (17, 20, 256, 128), (2, 3, 64, 64)])
def test_triton_k_groups(triton_w4a8, m, n, k, group_size):
    assert_same([triton_w4a8], tokens_for(m, k, 8, 3), codes_for(n, k, 4, 3), 4, group_size)


@pytest.mark.parametrize("split,m,n,k", [(2, 3, 20, 512), (4, 7, 9, 1032), (8, 2, 16, 2048), (4, 2, 5, 40)])
def test_triton_split_k_is_exact_and_ragged(triton_w4a8, split, m, n, k):
    x, codes = tokens_for(m, k, 8, 5), codes_for(n, k, 4, 5)
    packed, s_x, s_w, bias = pack_khalf(codes), torch.rand(m), torch.rand(n), torch.randn(n)
    tile = replace(choose_tile(m, n, k, processors=1), split_k=split)
    acc = IntRef().accumulate(x, IntRef().pack(codes))
    partial = triton_gemm.accumulate(x, packed, tile)
    assert partial.shape == (split, m, n) and torch.equal(partial.sum(0), acc.long())
    assert torch.equal(triton_gemm.gemm(x, packed, s_x, s_w, bias, torch.float32, tile), epilogue(acc, s_x, s_w, bias))


def test_the_epilogue_alone_has_the_contract_s_bits_for_integers_and_for_fp32_that_holds_them():
    acc = torch.randint(-(2**24), 2**24, (5, 700), dtype=torch.int32)
    s_x, s_w, bias = torch.rand(5), torch.rand(700), torch.randn(700)
    for held in (acc, acc.float()):
        for b in (None, bias):
            assert torch.equal(triton_gemm.scale(held[None], s_x, s_w, b, torch.float32), epilogue(acc, s_x, s_w, b))


def test_triton_cuts_k_only_where_it_pays():
    assert choose_tile(10, 2048, 16384, 132).split_k == 4  # 32 tiles of weights would leave 100 processors idle
    assert choose_tile(968, 2048, 16384, 132).split_k == 1  # 512 small tiles fill the GPU, 128 large ones would not
    assert choose_tile(542, 32768, 2048, 132).tokens == 128 and choose_tile(542, 2048, 16384, 132).tokens == 64
    assert choose_tile(542, 32768, 2048, 132, group_size=64).warps == 8  # its second accumulator would not fit in four
    assert choose_tile(10, 16384, 2048, 132).split_k == 1  # 256 tiles fill the GPU
    assert choose_tile(968, 2048, 2048, 132).split_k == 1  # partial sums would outweigh the weights
    assert choose_tile(10, 2048, 2048, 132, group_size=64).split_k == 1


def test_every_layer_s_depth_in_triton(triton_w4a8):
    """The interpreter is too slow for whole layers; few outputs at each K that occurs show the same loop and split."""
    for k in sorted({layer.shape.k for layer in pi05_layers() + compact_layers()}):
        assert_same([triton_w4a8], tokens_for(2, k, 8, k, "low"), codes_for(3, k, 4, k, "low"), 4, None)


def test_it_passes_validation_whole(triton_w4a8):
    finding = try_kernel(triton_w4a8, GemmShape(24, 64), (1, 10, 17))
    assert finding.ok, finding.reason


def test_without_the_interpreter_it_never_offers_itself_to_a_cpu():
    assert os.environ.get("TRITON_INTERPRET") != "1"
    assert not load("triton_w4a8").supports(GemmShape(64, 64)).ok


# ------------------------------------------------------------------------------------------------------ prologue
def orthogonal(blocks, size):
    return torch.linalg.qr(torch.randn(blocks, size, size))[0].bfloat16()


def factors(k, block, kinds):
    """s: scale, f/F: first rotation per block or shared, o: order, r/R: second rotation per block or shared."""
    made = {
        "s": ("scale", lambda: torch.rand(k) + 0.5),
        "o": ("order", lambda: torch.randperm(k).int()),
        "f": ("first", lambda: orthogonal(k // block, block)),
        "F": ("first", lambda: orthogonal(1, block)),
        "r": ("second", lambda: orthogonal(k // block, block)),
        "R": ("second", lambda: orthogonal(1, block)),
    }
    return {made[kind][0]: made[kind][1]() for kind in kinds}


@pytest.mark.parametrize("m,k,kinds", [(5, 96, ""), (7, 100, "s"), (3, 48, "so")])
def test_without_rotations_it_is_the_contract_bit_for_bit(m, k, kinds):
    torch.manual_seed(0)
    made, x = factors(k, 16, kinds), torch.randn(m, k).bfloat16()
    x[1] = 0
    for bits, clip in ((8, 1.0), (4, 0.9)):
        codes, scales = triton_prologue.Prologue(made, k)(x, bits, clip)
        expected, s_x = quantize_activations(Transform(**made).forward(x.float()), bits, clip)
        assert torch.equal(codes, expected) and torch.equal(scales, s_x)


def assert_the_transform(prologue, made, x, bits=8, clip=1.0):
    """Scales to 2^-20 of torch's fp32 code, codes equal but for values on a step's edge, and the same every time."""
    codes, scales = prologue(x, bits, clip)
    again = prologue(x, bits, clip)  # finds what the first call left in the workspace
    assert torch.equal(codes, again[0]) and torch.equal(scales, again[1])
    y = Transform(**made).forward(x.float())
    expected, s_x = quantize_activations(y, bits, clip)
    assert torch.allclose(scales, s_x, rtol=2**-20, atol=0)
    apart = codes != expected
    steps = y / s_x[:, None]
    assert (codes.int() - expected.int()).abs().max() <= 1
    assert ((steps - steps.floor() - 0.5).abs()[apart] < 2**-20 * 128).all()


@pytest.fixture(params=["small_m", "large_m"])
def either_way(request, monkeypatch):
    """Both ways at sizes that the interpreter can do."""
    if request.param == "large_m":
        monkeypatch.setattr(triton_prologue, "LITTLE", 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "kinds,m", [*((kinds, 3) for kinds in ("sfor", "f", "For", "or", "R", "sF", "fo", "sr")), ("sfor", 33)]
)
def test_rotations_are_the_transform_to_float_error_and_rounding_follows_the_contract(either_way, kinds, m, dtype):
    torch.manual_seed(0)
    made = factors(32, 16, kinds)
    x = (torch.randn(m, 32) * torch.exp(torch.randn(32))).to(dtype)
    x[1] = 0
    assert_the_transform(triton_prologue.Prologue(made, 32), made, x, 8, 0.9)


def assert_the_transform_of_blocks(block, m):
    torch.manual_seed(block)
    k, made = 3 * block, factors(3 * block, block, "for")
    x = torch.randn(m, k) * torch.exp(3 * torch.randn(k))
    prologue = triton_prologue.Prologue(made, k)
    assert_the_transform(prologue, made, x)
    assert_the_transform(prologue, made, x.bfloat16())


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("m", [1, 5])
def test_every_block_size_and_ragged_tokens(either_way, block, m):
    assert_the_transform_of_blocks(block, m)


@pytest.mark.parametrize("block", [16, 128])
def test_every_block_size_at_more_tokens_than_a_tile_has(monkeypatch, block):
    monkeypatch.setattr(triton_prologue, "LITTLE", 0)
    assert_the_transform_of_blocks(block, 130)


def test_three_bfloat16_pieces_are_an_fp32_number(monkeypatch):
    """Two would leave 2^-17: rotating by the identity must give fp32 numbers back, bit for bit."""
    monkeypatch.setattr(triton_prologue, "LITTLE", 0)
    torch.manual_seed(0)
    m, k = 65, 32
    x = torch.randn(m, k) * torch.exp(4 * torch.randn(m, k))
    codes, scales = triton_prologue.Prologue({"second": torch.eye(16).bfloat16()[None]}, k)(x)
    expected, s_x = quantize_activations(x)
    assert torch.equal(codes, expected) and torch.equal(scales, s_x)


@pytest.mark.parametrize("bad,m", [(float("nan"), 2), (float("inf"), 2), (float("nan"), 33)])
def test_a_non_finite_row_cannot_pass_unnoticed(either_way, bad, m):
    torch.manual_seed(0)
    x = torch.randn(m, 32)
    x[1, 5] = bad
    for made in ({}, factors(32, 16, "fr")):
        prologue = triton_prologue.Prologue(made, 32)
        scales = prologue(x)[1]
        assert not torch.isfinite(scales[1]) and torch.isfinite(scales[0])
        assert torch.isfinite(prologue(torch.ones(m, 32))[1]).all()  # and the next call is clean


def test_blocks_that_do_not_suit_are_left_to_torch():
    def blocks(size):
        return torch.zeros(2, size, size, dtype=torch.bfloat16)

    assert triton_prologue.Prologue.unfit({"first": blocks(24)})
    assert triton_prologue.Prologue.unfit({"first": blocks(256)})
    assert triton_prologue.Prologue.unfit({"first": blocks(64), "second": blocks(32)})
    assert triton_prologue.Prologue.unfit({"first": blocks(64).float()})
    assert triton_prologue.Prologue.unfit({"first": blocks(64), "order": torch.zeros(128)}) is None


def test_a_settled_transform_counts_what_it_keeps_and_keeps_nothing_twice(monkeypatch):
    made, x = factors(128, 16, "sfor"), torch.randn(3, 128)
    transform = InputTransform(Transform(**made), 128)
    alone = transform.nbytes
    prologue = triton_prologue.Prologue(made, 128)
    monkeypatch.setattr(InputTransform, "_fused_on", lambda self, device: self._fused[1])
    transform._fused = (x.device, prologue)
    both = transform.nbytes
    expected = transform.quantize(x, 8, 1.0)
    transform.finalize()
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in vars(prologue).values()
        if isinstance(t, torch.Tensor)
    }
    assert {b.untyped_storage().data_ptr() for b in transform.buffers()} <= set(kept)
    assert transform.nbytes == sum(kept.values()) and alone < transform.nbytes < both
    assert all(torch.equal(a, b) for a, b in zip(transform.quantize(x, 8, 1.0), expected, strict=True))


# ------------------------------------------------------------------------------------------- GPUs that are not here
def test_the_kernels_compile_from_ampere_to_hopper_without_spills_or_contraction(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/triton_resources.py",
            "--sm",
            "86,90",  # the least shared memory and the most; 80, 89, 100 and 120 by hand
            "--only",
            "gemm 16,scale,small_m B=64,few",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["kernels"]
    assert len(rows) == 14
    for row in rows:
        assert row["spilled_bytes"] == 0 and row["fits"], row
        if row["kernel"].startswith(("gemm", "scale")):
            assert row["fma"] == 0, row  # the contract rounds twice where an FMA would round once
        if row["kernel"].startswith("gemm"):
            assert row["int8_mma"] and row["async_16_byte_loads"], row
