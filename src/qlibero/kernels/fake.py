"""`fake`: the integers carried in floating point, exactly.

What used to be called fake quantization multiplied *dequantized* numbers and computed something no kernel computes.
Here the codes themselves are multiplied: every partial sum is an integer below 2^24, which fp32 holds exactly in any
order, so the accumulator is the integer kernel's bit for bit, at the price of one ordinary matmul. Where K·limits
reaches 2^24 (8-bit weights beyond K = 1032) the product is cut along K into exact pieces that are added in int32.

On CUDA the operands are bf16 (a code needs at most 8 significant bits) and the product accumulates and returns fp32;
validation checks that a GPU's tensor cores keep all 24 bits before it is believed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qlibero.kernels.contract import FP32_EXACT, GemmShape, Kernel, PackedWeight, Support
from qlibero.kernels.epilogue_dispatch import finish
from qlibero.registry import KernelPlugin

PLUGIN = KernelPlugin("fake", "the integers carried in floating point, exactly", provides="Fake", order=1)

_CAN_RETURN_FP32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)  # of bf16 operands, on CUDA
WIDEST_ACTIVATION = 127  # a kernel sees int8 codes, not how many bits made them


def exact_width(weight_bits: int) -> int:
    """How many products can be summed in fp32 before a partial sum could reach 2^24: 16513 for 4 bits, 1032 for 8."""
    return (FP32_EXACT - 1) // (WIDEST_ACTIVATION << (weight_bits - 1))


class Fake(Kernel):
    name = "fake"
    real = False

    def supports(self, shape: GemmShape) -> Support:
        if shape.device == "cuda" and not torch.cuda.is_available():
            return Support(False, "no CUDA device")
        return Support(True, "codes in bf16, fp32 accumulation" if shape.device == "cuda" else "codes in fp32")

    def pack(self, codes: Tensor, weight_bits: int = 4, group_size: int | None = None) -> PackedWeight:
        n, k = codes.shape
        dtype = torch.bfloat16 if codes.is_cuda and _CAN_RETURN_FP32 else torch.float32
        return PackedWeight(n, k, weight_bits, group_size, codes=codes.to(dtype))

    def accumulate(self, codes_x: Tensor, packed: PackedWeight) -> Tensor:
        groups = list(self._group_accumulators(codes_x, packed))
        return groups[0] if packed.group_size is None else torch.stack(groups)

    def matmul(
        self,
        codes_x: Tensor,
        s_x: Tensor,
        packed: PackedWeight,
        s_w: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        groups = self._group_accumulators(codes_x, packed)  # one at a time: G·M·N fp32 would not fit for long prefixes
        acc = next(groups) if packed.group_size is None else groups
        return finish(acc, s_x, s_w, bias, out_dtype)

    def _group_accumulators(self, codes_x: Tensor, packed: PackedWeight) -> Iterator[Tensor]:
        weight = packed.codes
        x = codes_x.to(weight.dtype)
        step = exact_width(packed.weight_bits)
        group = packed.group_size or packed.k
        for start in range(0, packed.k, group):
            end = start + group
            if group <= step:
                yield _product(x[:, start:end], weight[:, start:end])
                continue
            total = _product(x[:, start : start + step], weight[:, start : start + step]).to(torch.int32)
            for k in range(start + step, end, step):
                piece = slice(k, min(k + step, end))
                total += _product(x[:, piece], weight[:, piece]).to(torch.int32)
            yield total


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, k) · weight (N, k)^T with fp32 accumulation and fp32 output."""
    if x.dtype == torch.bfloat16:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return x @ weight.t()
