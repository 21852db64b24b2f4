"""Risk: the CUDA kernels are right where they were measured, and wrong one token or one pipeline stage further.

Skipped without a Hopper GPU; `python -m pytest tests/test_cuda_w4a8_on_hopper.py` on a machine that has one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qlibero.kernels import cuda_hadamard, cuda_w4a8, load
from qlibero.kernels.benchmark import graph_seconds
from qlibero.kernels.contract import GemmShape, epilogue, quantize_activations
from qlibero.kernels.cuda_plan import WIDTHS, Plan
from qlibero.kernels.exactness import try_kernel
from qlibero.kernels.hadamard import fold
from qlibero.kernels.int_ref import IntRef
from qlibero.kernels.tiled import tile, untile
from qlibero.quant.transform import Transform

pytestmark = pytest.mark.skipif(cuda_w4a8.missing() is not None, reason=str(cuda_w4a8.missing()))


@pytest.mark.parametrize(
    ("n", "k"),
    [(128, 128), (384, 256), (2048, 128), (16384, 128), (16384, 512), (256, 1280), (128, 16384), (2560, 2048)],
    ids=str,
)
def test_validation_passes_k_shorter_than_the_pipeline_one_token_and_many_tiles_a_cta(n, k):
    finding = try_kernel(load("cuda_w4a8"), GemmShape(n, k, device="cuda"), (1, 7, 8, 9, 17, 50, 128, 257, 542, 1200))
    assert finding.ok, finding.reason


@pytest.mark.parametrize("cluster", [1, 2, 4])
@pytest.mark.parametrize("halves", [1, 2])
def test_every_plan_gives_the_same_integers(monkeypatch, halves, cluster):
    """Also those that the formula would not choose here: every other width of tile, more tokens than one tile."""
    generator = torch.Generator("cuda").manual_seed(0)
    n, k = 512, 640  # five steps of K, fewer than any pipeline has stages, and not divisible by a cluster
    codes = torch.randint(-8, 8, (n, k), generator=generator, device="cuda", dtype=torch.int8)
    packed, reference = load("cuda_w4a8").pack(codes), IntRef().pack(codes)
    s_w = torch.rand(n, generator=generator, device="cuda").bfloat16().float()
    for tokens in WIDTHS[halves - 1 :: 2]:
        plan = Plan(halves, tokens, cluster)
        monkeypatch.setattr(cuda_w4a8, "choose", lambda *_, plan=plan: plan)
        for m in (3, tokens, 2 * tokens + 9):
            x = torch.randint(-127, 128, (m, k), generator=generator, device="cuda", dtype=torch.int8)
            s_x = torch.rand(m, generator=generator, device="cuda")
            expected = epilogue(IntRef().accumulate(x, reference), s_x, s_w).bfloat16()
            for _ in range(3):
                torch.full_like(expected, float("nan"))
                found = load("cuda_w4a8").matmul(x, s_x, packed, s_w, None, torch.bfloat16)
                assert torch.equal(found, expected), (plan, m)


def hard_input(m: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """On the CPU: loud channels, rows of zeros, tiny, constant and huge numbers, and rows that are not finite."""
    g = torch.Generator().manual_seed(m + k)
    x = torch.randn(m, k, generator=g) * torch.exp(torch.randn(m, 1, generator=g))
    x[:, torch.randperm(k, generator=g)[: k // 100 + 1]] *= 60
    if m > 9:
        x[1], x[2], x[3] = 0, 1e-12 * torch.randn(k, generator=g), 1e4
        x[4, 7], x[5] = 1e30, torch.randint(-3, 4, (k,), generator=g).float()
        x[6, 5], x[7, k - 1], x[8] = float("nan"), float("inf"), 3e38
    signs = torch.randint(0, 2, (k,), generator=g) * 2.0 - 1.0
    return x.bfloat16(), fold(torch.exp(0.7 * torch.randn(k, generator=g)), signs)


def by_torch(x: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and which rows are finite: the definition and the contract, on the GPU."""
    codes, scales = quantize_activations(Transform(hadamard=s.cuda()).forward(x.cuda().float()))
    return codes, scales, scales.isfinite()


@pytest.mark.parametrize("k", [256, 768, 1024, 2048, 4096, 16384])
@pytest.mark.parametrize("m", [1, 10, 13, 542, 1100])
def test_torch_on_both_devices_triton_and_cuda_agree_to_the_last_bit(m, k):
    from qlibero.kernels import triton_hadamard

    x, s = hard_input(m, k)
    expected, scales, finite = by_torch(x, s)
    assert int((~finite).sum()) == (3 if m > 9 else 0)
    here, there = finite.cpu(), quantize_activations(Transform(hadamard=s).forward(x[finite.cpu()].float()))
    assert torch.equal(there[0], expected.cpu()[here]) and torch.equal(there[1], scales.cpu()[here])
    kernels = [lambda x, s, **layout: triton_hadamard.smooth_hadamard(x, s, 8, 1.0, **layout)]
    if cuda_hadamard.fits(x.cuda(), None, 8, 1.0):
        kernels.append(cuda_hadamard.smooth_hadamard)
    assert len(kernels) == 1 + (k in (1024, 2048, 4096, 16384))
    for kernel in kernels:
        for in_tiles in (False, True):
            for _ in range(2):
                codes, found = kernel(x.cuda(), s.cuda(), in_tiles=in_tiles)
                codes = untile(codes, m) if in_tiles else codes
                assert torch.equal(codes[finite], expected[finite]) and torch.equal(found[finite], scales[finite])
                assert not found[~finite].isfinite().any()


@pytest.mark.parametrize("k", [1024, 4096, 16384])
def test_gelu_times_up_on_the_way_is_torch_s_for_every_gate(k):
    """A token with one channel that is not zero has its product in every coefficient, and so in its scale, to the last
    bit; tokens that are all gates show the rest."""
    from qlibero.kernels import triton_hadamard

    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.float().abs() < 1e15].cuda()[:: max(1, k // 4096)]
    both = torch.zeros((len(every), 2 * k), dtype=torch.bfloat16, device="cuda")
    gate, up = both.split(k, 1)
    place = torch.arange(len(every), device="cuda") * 7 % k
    gate[torch.arange(len(every), device="cuda"), place] = every
    up[:] = 1.25
    for _ in range(2):
        s = torch.where(torch.arange(k) % 3 == 0, -1.0, 1.0).mul(2.0**60).bfloat16().cuda()
        expected, scales, finite = by_torch(F.gelu(gate, approximate="tanh") * up, s)
        assert finite.all()
        for kernel in (
            lambda s=s, **layout: triton_hadamard.smooth_hadamard(gate, s, 8, 1.0, up=up, **layout),
            lambda s=s, **layout: cuda_hadamard.smooth_hadamard(gate, s, up=up, **layout),
        ):
            for in_tiles in (False, True):
                codes, found = kernel(in_tiles=in_tiles)
                codes = untile(codes, len(every)) if in_tiles else codes
                assert torch.equal(found, scales) and torch.equal(codes, expected)
        gate.copy_(torch.randn(gate.shape, device="cuda"))
        up.copy_(torch.randn(up.shape, device="cuda"))


def test_triton_s_gelu_alone_is_torch_s_for_every_bfloat16():
    from qlibero.policies.pi05.fast.triton_fused_ops import TritonOps

    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).cuda().view(1, 64, 1024)
    one = torch.ones_like(every)
    found, expected = TritonOps()._gelu_gate(every, one), F.gelu(every, approximate="tanh") * one
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[~found.isnan()], expected[~found.isnan()])


def test_inside_a_cuda_graph_a_chain_of_transform_and_products_repeats_bit_for_bit():
    kernel, k, n, m = load("cuda_w4a8"), 2048, 16384, 542
    generator = torch.Generator("cuda").manual_seed(0)
    x, s = (part.cuda() for part in hard_input(m, k))
    x = x[9:]
    weights = [kernel.pack(torch.randint(-8, 8, shape, device="cuda", dtype=torch.int8)) for shape in ((n, k), (k, n))]
    scales = [torch.rand(size, generator=generator, device="cuda") * 1e-3 for size in (n, k)]
    wide = fold(torch.ones(n), torch.ones(n)).cuda()

    def layer(h: torch.Tensor) -> torch.Tensor:
        for factor, packed, s_w in zip((s, wide), weights, scales, strict=True):
            h = kernel.matmul_tiles(
                *cuda_hadamard.smooth_hadamard(h, factor, in_tiles=True), packed, s_w, None, torch.bfloat16
            )
        return h

    def by_rows(h: torch.Tensor) -> torch.Tensor:
        for factor, packed, s_w in zip((s, wide), weights, scales, strict=True):
            codes, s_x, _ = by_torch(h, factor)
            h = kernel.matmul_tiles(tile(codes), s_x, packed, s_w, None, torch.bfloat16)
        return h

    expected, found = by_rows(x), []
    graph_seconds([lambda: found.append(layer(x))] * 8)  # the last eight are the graph's own tensors
    torch.cuda.synchronize()
    assert all(torch.equal(one, expected) for one in found[-8:])
