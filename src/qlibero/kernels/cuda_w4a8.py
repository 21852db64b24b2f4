"""`cuda_w4a8`: our int4×int8 kernel for Hopper, in CUDA; the fastest where tokens are many.

Weights are stored in the order of the tensor cores' fragments, activation codes arrive in the product's own layout
(`tiled.py`), which every fused quantizer writes directly; the kernel is `w4a8_sm90.cu`, its cut `cuda_plan.py`. It is
compiled on first use by NVRTC, so nothing but torch and its own libraries is needed. Other GPUs have `triton_w4a8`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qlibero.errors import UserError
from qlibero.kernels import cuda_driver
from qlibero.kernels.contract import GemmShape, Kernel, PackedWeight, Support
from qlibero.kernels.cuda_plan import DEPTH, OUTPUTS, Plan, band, choose, wgmma
from qlibero.kernels.tiled import TOKENS, tile

LARGEST_K = 132_096  # 16·acc stays inside int32
OUT = {torch.bfloat16: "BF16", torch.float32: "FP32", torch.int32: "INT32"}
POINTERS, NUMBERS = (
    ("w", "x", "sx", "sw", "bias", "out"),
    ("m", "n", "k", "groups", "token_tiles", "tiles", "band"),
)
Parameters = cuda_driver.structure(
    "Parameters", [*((name, ctypes.c_void_p) for name in POINTERS), *((name, ctypes.c_int) for name in NUMBERS)]
)


def missing() -> str | None:
    """Why the kernel cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"made for Hopper (SM90), this GPU is {torch.cuda.get_device_name()}; use triton_w4a8"
    return cuda_driver.missing()


class CudaW4A8(Kernel):
    name = "cuda_w4a8"
    devices, weight_bits, grouped = ("cuda",), (4,), False
    in_tiles = True

    def supports(self, shape: GemmShape) -> Support:
        if shape.device != "cuda":
            return Support(False, "runs on CUDA; on a CPU use cpu_int4")
        if reason := missing():
            return Support(False, reason)
        if shape.weight_bits > 4:
            return Support(False, f"packs int4 weights, the layer has {shape.weight_bits} bits; use w8a8")
        if shape.group_size:
            return Support(False, "takes one weight scale per row, not one per K-group; use triton_w4a8")
        if shape.n % OUTPUTS or shape.k % DEPTH:
            return Support(
                False,
                f"needs multiples of {OUTPUTS} outputs and {DEPTH} inputs, got {shape.n}x{shape.k}; use triton_w4a8",
            )
        if shape.k > LARGEST_K:
            return Support(False, f"K = {shape.k} could overflow the int32 accumulator (limit {LARGEST_K})")
        return Support(True, f"wgmma, weights from registers, NVRTC {cuda_driver.nvrtc_version()}")

    def pack(self, codes: Tensor, weight_bits: int = 4, group_size: int | None = None) -> PackedWeight:
        n, k = codes.shape
        return PackedWeight(n, k, weight_bits, group_size, packed=pack_fragments(codes))

    def accumulate(self, codes_x: Tensor, packed: PackedWeight) -> Tensor:
        ones = torch.ones(max(codes_x.shape[0], packed.n), device=codes_x.device)
        return self._product(tile(codes_x), codes_x.shape[0], ones, packed, ones, None, torch.int32)

    def matmul(
        self,
        codes_x: Tensor,
        s_x: Tensor,
        packed: PackedWeight,
        s_w: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        return self.matmul_tiles(tile(codes_x), s_x, packed, s_w, bias, out_dtype)

    def matmul_tiles(
        self,
        image: Tensor,
        s_x: Tensor,
        packed: PackedWeight,
        s_w: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        dtype = out_dtype if out_dtype in OUT else torch.float32
        return self._product(image, s_x.shape[0], s_x, packed, s_w, bias, dtype).to(out_dtype)

    @staticmethod
    def _product(
        image: Tensor, m: int, s_x: Tensor, packed: PackedWeight, s_w: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        n, k = packed.n, packed.k
        out = torch.empty((m, n), dtype=dtype, device=image.device)
        if m == 0:
            return out
        plan = choose(m, n, k, _processors(image.device.index))
        token_tiles = -(-m // plan.tokens)
        s_x, s_w, image = _aligned(s_x), _aligned(s_w), _aligned(image)
        bias = None if bias is None else bias.float().contiguous()
        tensors = (packed.packed, image, s_x, s_w, s_w if bias is None else bias, out)
        tiles = plan.tiles(m, n)
        parameters = Parameters(
            *(tensor.data_ptr() for tensor in tensors), m, n, k, -(-m // TOKENS), token_tiles, tiles, band(plan, n)
        )
        blocks = tiles * plan.cluster if plan.cluster > 1 else min(tiles, _processors(image.device.index))
        instance(plan, OUT[dtype], bias is not None).launch(parameters, blocks, image.device, overlap=True)
        return out


def pack_fragments(codes: Tensor) -> Tensor:
    """int8 codes (N, K) in [-8, 7] → uint8 (N·K / 2,) in the kernel's order.

    [N/128][K/64][2][128 threads][16 bytes]: thread 32·warp + 4·g + q of half h has rows 32·warp + 4·g + 2·h + {0, 1},
    which for the tensor core are rows 16·warp + g and 8 further, and of each 16 bytes of k the four bytes 4·q; the two
    k-steps of 32 are in low and high nibbles.
    """
    n, k = codes.shape
    if n % OUTPUTS or k % DEPTH:
        raise UserError(f"cuda_w4a8 packs multiples of {OUTPUTS}x{DEPTH} codes, got {n}x{k}")
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise UserError(f"int4 codes must lie in [-8, 7], found [{int(codes.min())}, {int(codes.max())}]")
    v = codes.view(
        n // 128, 4, 8, 2, 2, k // 64, 2, 2, 4, 4
    )  # block, warp, g, half, row | step, nibble, piece, q, byte
    v = v.permute(6, 0, 5, 3, 1, 2, 8, 7, 4, 9)  # nibble | block, step, half, warp, g, q, piece, row, byte
    return ((v[0] & 15) | (v[1] << 4)).contiguous().view(torch.uint8).reshape(-1)


@cache
def instance(plan: Plan, out: str, bias: bool) -> cuda_driver.Kernel:
    """The kernel of one plan and epilogue."""
    name = f"w4a8_{plan.outputs}x{plan.tokens}_k{plan.cluster}_{out.lower()}{'_bias' if bias else ''}"
    return cuda_driver.Kernel(source(plan, out, bias, name), name, threads=plan.threads, shared=plan.shared)


def source(plan: Plan, out: str, bias: bool, name: str) -> str:
    """CUDA source of one instance, an extern "C" function of that name."""
    cluster = f"__cluster_dims__({plan.cluster}, 1, 1) " if plan.cluster > 1 else ""
    body = (Path(__file__).parent / "w4a8_sm90.cu").read_text()
    arguments = f"{plan.halves}, {plan.tokens}, {plan.stages}, {plan.cluster}, {out}, {int(bias)}"
    return (
        wgmma(plan.tokens)
        + body
        + f'\nextern "C" __global__ void {cluster}__launch_bounds__({plan.threads}, 1)\n'
        + f"{name}(const __grid_constant__ Params p) {{ gemm<{arguments}>(p); }}\n"
    )


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _aligned(x: Tensor) -> Tensor:
    """`x` contiguous and at an address that bulk copies take."""
    return x.contiguous() if x.data_ptr() % 16 == 0 else x.contiguous().clone()
