"""Risk: the CUDA kernels for Hopper are wrong where nobody has one: their layouts, their cuts, what they compile from.

What needs the GPU itself is in test_cuda_w4a8_on_hopper.py.
"""

from __future__ import annotations

import pytest
import torch

from qlibero.errors import UserError, WorkFailed
from qlibero.kernels import cuda_driver, cuda_hadamard, cuda_plan, cuda_w4a8, load
from qlibero.kernels.contract import GemmShape
from qlibero.kernels.cuda_plan import Plan, choose
from qlibero.kernels.tiled import tile

torch.set_num_threads(1)
PROCESSORS = 132  # of an H100
PI05 = [
    (2560, 2048),
    (2048, 2048),
    (32768, 2048),
    (2048, 16384),
    (2560, 1024),
    (1024, 2048),
    (8192, 1024),
    (1024, 4096),
]


def by_hand(image: torch.Tensor, packed: torch.Tensor, m: int, n: int, k: int) -> torch.Tensor:
    """What the tensor cores compute from these bytes, by the PTX manual's fragment layouts of wgmma m64nNk32.s8 and its
    128-byte swizzle, thread by thread: (M, N) int64. Tokens in tiles of 8, one block of 128 outputs at a time."""
    out = torch.zeros((image.shape[1] * 8, n), dtype=torch.int64)
    x = image.flatten().view(torch.int8).long()
    w = packed.view(n // 128, k // 64, 2, 128, 16)
    groups = image.shape[1]
    for block in range(n // 128):
        for group in range(groups):
            acc = torch.zeros((2, 64, 8), dtype=torch.int64)  # two products of 64 rows
            for step in range(k // 32):
                b = torch.zeros((8, 32), dtype=torch.int64)
                base = ((step // 4) * groups + group) * 1024 + step % 4 * 32
                for token in range(8):
                    for c in range(32):
                        at = base + token * 128 + c
                        b[token, c] = x[at ^ (at >> 7 & 7) << 4]  # the hardware's swizzle of a byte address
                for half in range(2):
                    a = torch.zeros((64, 32), dtype=torch.int64)
                    for thread in range(128):
                        warp, g, q = thread // 32, thread % 32 // 4, thread % 4
                        for i in range(16):
                            byte = int(w[block, step // 2, half, thread, i])
                            nibble = byte & 15 if step % 2 == 0 else byte >> 4
                            code = nibble - 16 if nibble > 7 else nibble
                            a[16 * warp + g + 8 * (i // 4 % 2), 16 * (i // 8) + 4 * q + i % 4] = code
                    acc[half] += a @ b.T
            for thread in range(128):
                warp, g, q = thread // 32, thread % 32 // 4, thread % 4
                for t in range(2):  # the kernel's store: four consecutive outputs of tokens 2q and 2q + 1
                    rows = [acc[h, 16 * warp + g + 8 * r, 2 * q + t] for h in range(2) for r in range(2)]
                    first = block * 128 + warp * 32 + g * 4
                    out[group * 8 + 2 * q + t, first : first + 4] = torch.stack(rows)
    return out[:m]


@pytest.mark.parametrize(("m", "n", "k"), [(8, 128, 128), (11, 128, 256), (1, 256, 128)])
def test_packed_weights_and_tiled_codes_meet_in_the_tensor_cores(m, n, k):
    g = torch.Generator().manual_seed(m)
    x = torch.randint(-127, 128, (m, k), generator=g, dtype=torch.int8)
    w = torch.randint(-8, 8, (n, k), generator=g, dtype=torch.int8)
    packed = cuda_w4a8.pack_fragments(w)
    assert packed.numel() == n * k // 2
    assert torch.equal(by_hand(tile(x), packed, m, n, k), x.long() @ w.long().T)


def test_what_cannot_be_packed_is_said():
    with pytest.raises(UserError, match="multiples of 128x128"):
        cuda_w4a8.pack_fragments(torch.zeros((96, 128), dtype=torch.int8))
    with pytest.raises(UserError, match="must lie in"):
        cuda_w4a8.pack_fragments(torch.full((128, 128), 8, dtype=torch.int8))


def test_every_plan_can_be_launched_and_covers_its_product():
    for n, k in [*PI05, (128, 128), (384, 256), (128, 132096)]:
        for m in [*range(1, 40), 50, 128, 256, 512, 541, 542, 544, 968, 4336, 8672, 20000]:
            for processors in (78, PROCESSORS):
                plan = choose(m, n, k, processors)
                assert 2 <= plan.stages <= cuda_plan.MAX_STAGES and plan.shared <= 227 * 1024, (m, n, k, plan)
                assert n % plan.outputs == 0 and plan.tokens in cuda_plan.WIDTHS
                assert plan.tiles(m, n) * plan.tokens * plan.outputs >= m * n
                if plan.cluster > 1:  # one tile a cluster, each CTA a part of K, and room for the exchanged sums
                    assert plan.tiles(m, n) * plan.cluster <= processors and k // 128 >= plan.cluster
                    groups = -(-plan.tokens // 8 // plan.cluster)
                    assert plan.cluster * plan.halves * groups * 4096 <= plan.stages * plan.stage
                registers = 232 * 128 * plan.halves + 40 * 128
                assert registers <= 65536 and plan.tokens + 40 <= 232  # two accumulators of tokens / 2, and the rest


@pytest.mark.parametrize(
    ("m", "n", "k", "expected"),
    [
        (542, 2560, 2048, Plan(1, 96, 1)),
        (542, 2048, 2048, Plan(1, 80, 1)),
        (968, 2048, 2048, Plan(1, 128, 1)),
        (4336, 2048, 2048, Plan(2, 144, 1)),
        (542, 32768, 2048, Plan(2, 112, 1)),
        (968, 32768, 2048, Plan(2, 144, 1)),
        (542, 2048, 16384, Plan(1, 144, 2)),
        (968, 2048, 16384, Plan(2, 128, 2)),
        (4336, 2048, 16384, Plan(2, 144, 1)),
    ],
)
def test_the_formula_finds_what_was_fastest_by_hand(m, n, k, expected):
    assert choose(m, n, k, PROCESSORS) == expected


def test_on_other_machines_it_says_what_to_use():
    kernel = load("cuda_w4a8")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert kernel.supports(GemmShape(128, 128, device="cuda")).reason == "no CUDA device"
    assert "cpu_int4" in kernel.supports(GemmShape(128, 128)).reason
    assert not kernel.fits(GemmShape(128, 128, group_size=64, device="cuda")).ok


# ---------------------------------------------------------------------------------------------------- the compiler
@pytest.fixture
def nvrtc():
    try:
        return cuda_driver.nvrtc()
    except WorkFailed as problem:
        pytest.skip(str(problem))


def test_every_kernel_compiles_without_a_gpu(nvrtc):
    for plan, out, bias in (
        (Plan(2, 112, 1), "BF16", False),
        (Plan(1, 16, 4), "FP32", True),
        (Plan(1, 48, 2), "INT32", False),
    ):
        code = cuda_driver.compile_source(cuda_driver.TYPES + cuda_w4a8.source(plan, out, bias, "f"), "sm_90a")
        assert code[:4] == b"\x7fELF" and b"f" in code
    for k, threads in ((1024, 128), (2048, 64), (2048, 128), (4096, 128), (16384, 256)):
        for gated in (False, True):
            source = cuda_hadamard.source(k, threads, gated, "f")
            assert cuda_driver.compile_source(cuda_driver.TYPES + source, "sm_90a")[:4] == b"\x7fELF"


def test_what_does_not_compile_is_said_with_the_compiler_s_words(nvrtc):
    with pytest.raises(WorkFailed, match=r"cannot compile wrong\.cu for sm_90a(.|\n)*identifier \"oops\" is undefined"):
        cuda_driver.compile_source("__device__ int f() { return oops; }", "sm_90a", "wrong.cu")


def test_a_cached_cubin_is_used_and_a_damaged_one_is_not(nvrtc, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = 'extern "C" __global__ void f(int* p) { *p = 7; }'
    first = cuda_driver.cubin(source, "sm_90a", "f")
    (kept,) = (tmp_path / "qlibero" / "cubin").iterdir()
    monkeypatch.setattr(cuda_driver, "compile_source", lambda *_: pytest.fail("compiled again"))
    assert cuda_driver.cubin(source, "sm_90a", "f") == first
    monkeypatch.setattr(cuda_driver, "compile_source", lambda *_: b"new")
    assert cuda_driver.cubin(source + " ", "sm_90a", "f") == b"new"  # another source
    assert cuda_driver.cubin(source, "sm_80", "f") == b"new"  # another GPU
    for damaged in (b"", kept.read_bytes()[:-1], bytes(len(first))):
        kept.write_bytes(damaged)
        assert cuda_driver.cubin(source, "sm_90a", "f") == b"new"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # a home that cannot be written
    assert cuda_driver.cubin(source, "sm_90a", "f") == b"new"


def test_a_machine_without_the_compiler_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(cuda_driver, "_nvrtc_candidates", lambda: iter(()))
    cuda_driver.nvrtc.cache_clear()
    try:
        assert "pip install nvidia-cuda-nvrtc" in cuda_driver.missing()
    finally:
        cuda_driver.nvrtc.cache_clear()
