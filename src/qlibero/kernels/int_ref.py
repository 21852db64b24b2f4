"""`int_ref`: the reference every other backend is held against. Plain integers, no tricks, no speed.

The product is int32 arithmetic. torch has no integer matmul on CUDA, and on the CPU it is a scalar loop; so on CUDA,
and for products too large to wait for, the codes are multiplied in float64, which holds every sum below 2^53 exactly,
and converted back: still no rounding anywhere (tests hold the two ways equal).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlibero.kernels.contract import GemmShape, Kernel, PackedWeight, Support
from qlibero.registry import KernelPlugin

PLUGIN = KernelPlugin("int_ref", "plain integers, the reference", provides="IntRef", order=2)

INT32_LOOP_PRODUCTS = 1 << 27  # about a quarter of a second


class IntRef(Kernel):
    name = "int_ref"
    real = False

    def supports(self, shape: GemmShape) -> Support:
        if shape.device == "cuda" and not torch.cuda.is_available():
            return Support(False, "no CUDA device")
        return Support(True, "float64-held integers" if shape.device == "cuda" else "int32")

    def pack(self, codes: Tensor, weight_bits: int = 4, group_size: int | None = None) -> PackedWeight:
        n, k = codes.shape
        return PackedWeight(n, k, weight_bits, group_size, codes=codes.clone())

    def accumulate(self, codes_x: Tensor, packed: PackedWeight) -> Tensor:
        products = codes_x.shape[0] * packed.n * packed.k
        wide = torch.float64 if codes_x.is_cuda or products > INT32_LOOP_PRODUCTS else torch.int32
        return self._in(wide, codes_x, packed)

    def in_float64(self, codes_x: Tensor, packed: PackedWeight) -> Tensor:
        """`accumulate`, always the fast way: for checks beside a run."""
        return self._in(torch.float64, codes_x, packed)

    def _in(self, wide: torch.dtype, codes_x: Tensor, packed: PackedWeight) -> Tensor:
        x, weight = codes_x.to(wide), packed.codes.to(wide)
        if packed.group_size is None:
            return (x @ weight.t()).to(torch.int32)
        x = x.reshape(x.shape[0], -1, packed.group_size).transpose(0, 1)
        weight = weight.reshape(packed.n, -1, packed.group_size).permute(1, 2, 0)
        return torch.bmm(x, weight).to(torch.int32)
