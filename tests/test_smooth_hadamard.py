"""Risk: a transform that is defined to the last bit comes out differently somewhere, and arms see other integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

with pytest.MonkeyPatch.context() as _patch:  # as in test_kernel_triton.py
    _patch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    import triton.experimental.gluon  # noqa: F401

    from qlibero.kernels.triton_hadamard import smooth_hadamard
    from qlibero.kernels.triton_prologue import Prologue

from quant_settings import quant_of

from qlibero.kernels.contract import quantize_activations
from qlibero.kernels.hadamard import fold, walsh_hadamard
from qlibero.kernels.tiled import tile, untile
from qlibero.quant.methods import GroupData, fit
from qlibero.quant.transform import Transform

pytestmark = pytest.mark.slow

torch.set_num_threads(1)


def by_the_book(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The definition, one butterfly after the other."""
    y = (x.astype(np.float32) * s.astype(np.float32)).astype(np.float32)
    width = y.shape[1]
    size = 1
    while width % (2 * size) == 0:
        size *= 2
    stride = size // 2
    while stride:
        for start in range(0, width, 2 * stride):
            for i in range(start, start + stride):
                a, b = y[:, i].copy(), y[:, i + stride].copy()
                y[:, i], y[:, i + stride] = a + b, a - b
        stride //= 2
    return y


def hard_input(m: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Loud channels, a zero row, a tiny one, a constant one, one whose sums cancel; and factors with signs."""
    g = torch.Generator().manual_seed(k)
    x = torch.randn(m, k, generator=g) * torch.exp(2 * torch.randn(k, generator=g))
    for row, value in enumerate((0.0, 1e-12, 1e4)):
        x[row % m] = value
    x[m - 1] = torch.arange(k) % 2 * 2.0 - 1.0
    signs = torch.randint(0, 2, (k,), generator=g) * 2.0 - 1.0
    return x.to(dtype), fold(torch.exp(torch.randn(k, generator=g)), signs)


WIDTHS = [1, 2, 3, 12, 96, 128, 192, 256, 384, 768, 1152, 2048]


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_torch_numpy_and_triton_agree_to_the_last_bit(k, dtype):
    x, s = hard_input(5, k, dtype)
    y = Transform(hadamard=s).forward(x.float())
    assert np.array_equal(y.numpy(), by_the_book(x.float().numpy(), s.float().numpy()))
    for bits, clip in ((8, 1.0), (4, 0.9)):
        expected, scales = quantize_activations(y, bits, clip)
        for in_tiles in (False, True) if k % 128 == 0 else (False,):
            codes, found = smooth_hadamard(x, s, bits, clip, in_tiles=in_tiles)
            assert torch.equal(untile(codes, 5) if in_tiles else codes, expected) and torch.equal(found, scales)


def test_the_matrix_is_hadamard_s_and_its_own_inverse():
    for k, size in ((8, 8), (12, 4), (96, 32)):
        h = walsh_hadamard(torch.eye(k, dtype=torch.float64))
        assert torch.equal(h @ h, size * torch.eye(k, dtype=torch.float64)) and torch.equal(h, h.T)
        assert set(h.unique().tolist()) <= {-1.0, 0.0, 1.0} and bool((h.abs().sum(0) == size).all())
    assert walsh_hadamard(torch.eye(4)).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]


@pytest.mark.parametrize(("k", "power"), [(2048, 2.0**-6), (16384, 2.0**-7), (1, 1.0), (2, 0.5), (768, 2.0**-4)])
def test_the_power_of_two_keeps_the_input_s_size_and_signs_multiply_exactly(k, power):
    signs = torch.where(torch.arange(k) % 3 == 0, -1.0, 1.0)
    s = torch.full((k,), 0.7)
    assert torch.equal(fold(s, signs).double(), s.bfloat16().double() * signs.double() * power)


def test_a_pair_of_gate_and_up_is_transformed_like_their_product():
    torch.manual_seed(0)
    both, (_, s) = torch.randn(6, 512), hard_input(6, 256, torch.float32)
    gate, up = both.split(256, 1)  # rows that lie apart, as a joint product's do
    product = torch.nn.functional.gelu(gate, approximate="tanh") * up
    expected, scales = quantize_activations(Transform(hadamard=s).forward(product))
    for in_tiles in (False, True):
        codes, found = smooth_hadamard(gate, s, 8, 1.0, up=up, in_tiles=in_tiles)
        apart = (untile(codes, 6) if in_tiles else codes).int() - expected.int()
        assert torch.allclose(found, scales, rtol=1e-6) and int(apart.abs().max()) <= 1
        assert int((apart != 0).sum()) <= 2  # on the CPU gelu is torch's to float error only


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_row_that_is_not_finite_or_overflows_has_no_finite_scale(bad):
    x, s = hard_input(5, 256, torch.bfloat16)
    x[2, 5:7] = bad
    scales = smooth_hadamard(x, (s * 16).bfloat16(), 8, 1.0)[1]
    assert torch.isfinite(scales[[0, 1, 3, 4]]).all() and not torch.isfinite(scales[2])


@pytest.mark.parametrize("m", [1, 8, 13])
def test_every_quantizer_writes_the_image_that_tile_describes(m):
    torch.manual_seed(m)
    x, k = torch.randn(m, 256), 256
    rotation = torch.linalg.qr(torch.randn(4, 64, 64))[0].bfloat16()
    for factors in ({}, {"scale": torch.rand(k) + 0.5}, {"first": rotation, "second": rotation}):
        prologue = Prologue(factors, k)
        codes, scales = prologue(x)
        image, again = prologue(x, in_tiles=True)
        assert image.shape == (2, -(-m // 8), 8, 128)
        assert torch.equal(untile(image, m), codes) and torch.equal(again, scales)
    # by its own words: channel 16·c + i of token t lies in chunk c ^ t of the token's 128 bytes
    numbered = torch.arange(16 * 256).reshape(16, 256).to(torch.int16).to(torch.int8)
    assert torch.equal(tile(numbered)[1, 1, 3, 16 * (5 ^ 3) : 16 * (5 ^ 3) + 16], numbered[8 + 3, 128 + 80 : 128 + 96])


def test_what_is_fitted_is_the_smoothing_of_duquant_with_signs():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 256, generator=g), torch.randn(32, 256, generator=g)
    x[:, 7] *= 50
    kept = fit(GroupData((w,), x.abs().amax(0), x, 3), quant_of(method="smooth_hadamard")).tensors()
    assert list(kept) == ["hadamard"] and kept["hadamard"].dtype == torch.bfloat16
    size = kept["hadamard"].float().abs() * 16  # 2^-4 is in it
    expected = (w.abs().amax(0) / x.abs().amax(0)).sqrt()
    expected = expected / expected.log().mean().exp()
    assert torch.allclose(size, expected, rtol=2**-8)
    assert 80 < int((kept["hadamard"] < 0).sum()) < 176
