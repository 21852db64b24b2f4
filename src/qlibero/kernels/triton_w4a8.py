"""`triton_w4a8`: our own int4×int8 kernel, the default on CUDA. No package beyond the Triton that comes with torch.

This file chooses how to launch; the kernels themselves are in `triton_gemm.py`, which is imported on first use because
a CPU-only machine has no Triton. Under TRITON_INTERPRET=1 everything here runs on the CPU, slowly, for the tests.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from qlibero.kernels.contract import GemmShape, Kernel, PackedWeight, Support
from qlibero.kernels.packing import pack_khalf
from qlibero.kernels.triton_tiles import Tile, choose_tile
from qlibero.registry import KernelPlugin

PLUGIN = KernelPlugin(
    "triton_w4a8", "ours in Triton, int4 unpacked in registers", provides="TritonW4A8", needs=("triton",), order=6
)

LARGEST_K = 132_000  # 16·acc stays inside int32


def missing() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed: it comes with torch's CUDA builds (pip install torch, on a machine with a GPU)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"needs SM80 (Ampere) or newer, this GPU is {torch.cuda.get_device_name()}"
    return None


@cache
def _processors(device_index: int | None) -> int:
    """Streaming multiprocessors to fill; under the interpreter a small number, so that split-K is exercised."""
    if device_index is None:
        return 32
    return torch.cuda.get_device_properties(device_index).multi_processor_count


class TritonW4A8(Kernel):
    name = "triton_w4a8"
    devices, weight_bits = ("cuda",), (4,)

    def supports(self, shape: GemmShape) -> Support:
        if reason := missing():
            return Support(False, reason)
        if shape.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return Support(False, "runs on CUDA; on a CPU use cpu_int4")
        if shape.weight_bits > 4:
            return Support(False, f"packs int4 weights, the layer has {shape.weight_bits} bits; use w8a8")
        if shape.k % 8:
            return Support(False, f"K = {shape.k} is not a multiple of 8; leave this layer unquantized")
        if shape.k > LARGEST_K:
            return Support(False, f"K = {shape.k} could overflow the int32 accumulator (limit {LARGEST_K})")
        if shape.group_size and (shape.group_size < 64 or shape.group_size & (shape.group_size - 1)):
            return Support(False, f"K-groups must be 64, 128 or another power of two, not {shape.group_size}")
        return Support(True, "in-register unpack, int8 tensor cores")

    def pack(self, codes: Tensor, weight_bits: int = 4, group_size: int | None = None) -> PackedWeight:
        n, k = codes.shape
        packed = pack_khalf(codes.reshape(-1, group_size or k)).reshape(n, k // 2)  # groups are packed each by itself
        return PackedWeight(n, k, weight_bits, group_size, packed=packed)

    def accumulate(self, codes_x: Tensor, packed: PackedWeight) -> Tensor:
        from qlibero.kernels import triton_gemm

        tile = self._tile(codes_x, packed)
        x, w = codes_x.contiguous(), packed.packed
        if packed.group_size:
            return triton_gemm.grouped_gemm(x, w, packed.group_size, None, None, None, torch.int32, tile)
        return triton_gemm.accumulate(x, w, tile).sum(0, dtype=torch.int32)

    def matmul(
        self,
        codes_x: Tensor,
        s_x: Tensor,
        packed: PackedWeight,
        s_w: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        from qlibero.kernels import triton_gemm
        from qlibero.kernels.triton_pdl import INTERPRETED

        tile = self._tile(codes_x, packed)
        x, w = codes_x.contiguous(), packed.packed
        # Triton's interpreter truncates to bf16 where the GPU rounds to nearest even, so there torch does the last
        # cast.
        dtype = torch.float32 if INTERPRETED else out_dtype
        if packed.group_size:
            y = triton_gemm.grouped_gemm(x, w, packed.group_size, s_x, s_w.contiguous(), bias, dtype, tile)
        else:
            y = triton_gemm.gemm(x, w, s_x, s_w, bias, dtype, tile)
        return y.to(out_dtype)

    def _tile(self, codes_x: Tensor, packed: PackedWeight) -> Tile:
        processors = _processors(codes_x.device.index if codes_x.is_cuda else None)
        return choose_tile(codes_x.shape[0], packed.n, packed.k, processors, packed.group_size)
