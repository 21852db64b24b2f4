"""`w8a8`: int8 weights through `torch._int_mm`, cuBLASLt's integer product on CUDA (SM80 and newer).

The sanity backend (it needs no extra package), and the competitor of int4 for long prefixes, where both are bound by
the same int8 arithmetic. It also runs 4-bit codes, stored as int8: same accumulator, no memory saved.

`_int_mm` on CUDA wants more than 16 rows and K, N divisible by 8; few tokens are padded with zero rows. The weight is
handed over as the transposed view of row-major (N, K): a contiguous (K, N) was five times slower in a public log.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qlibero.kernels.contract import GemmShape, Kernel, PackedWeight, Support
from qlibero.kernels.cpu_int4 import cpu_multiplies_int8_fast
from qlibero.kernels.epilogue_dispatch import finish

CUDA_LEAST_ROWS = 32  # the op demands more than 16; a full tile costs the same


class W8A8(Kernel):
    name = "w8a8"

    def supports(self, shape: GemmShape) -> Support:
        if not hasattr(torch, "_int_mm"):
            return Support(False, f"torch {torch.__version__} has no _int_mm")
        if shape.device == "cpu":
            fast = cpu_multiplies_int8_fast()
            return Support(
                True, "torch._int_mm" if fast else "torch._int_mm; without VNNI a scalar loop: exact but slow"
            )
        if not torch.cuda.is_available():
            return Support(False, "no CUDA device")
        if torch.cuda.get_device_capability() < (8, 0):
            return Support(False, f"needs SM80 or newer, this GPU is {torch.cuda.get_device_name()}")
        width = shape.group_size or shape.k
        if width % 8 or shape.n % 8:
            return Support(
                False, f"torch._int_mm needs N and K (or the group) divisible by 8, got N={shape.n}, K={width}"
            )
        return Support(True, "torch._int_mm (cuBLASLt)")

    def pack(self, codes: Tensor, weight_bits: int = 8, group_size: int | None = None) -> PackedWeight:
        n, k = codes.shape
        grouped = codes.reshape(n, -1, group_size or k).transpose(0, 1).contiguous().clone()  # (G, N, group)
        return PackedWeight(n, k, weight_bits, group_size, codes=grouped)

    def accumulate(self, codes_x: Tensor, packed: PackedWeight) -> Tensor:
        groups = list(self._group_accumulators(codes_x, packed))
        return torch.stack(groups) if packed.group_size else groups[0]

    def matmul(
        self,
        codes_x: Tensor,
        s_x: Tensor,
        packed: PackedWeight,
        s_w: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        groups = self._group_accumulators(codes_x, packed)
        return finish(groups if packed.group_size else next(groups), s_x, s_w, bias, out_dtype)

    def _group_accumulators(self, codes_x: Tensor, packed: PackedWeight) -> Iterator[Tensor]:
        m = codes_x.shape[0]
        if codes_x.is_cuda and m < CUDA_LEAST_ROWS:
            codes_x = torch.nn.functional.pad(codes_x, (0, 0, 0, CUDA_LEAST_ROWS - m))
        width = packed.group_size or packed.k
        for g in range(packed.codes.shape[0]):
            x = codes_x[:, g * width : (g + 1) * width].contiguous()
            yield torch._int_mm(x, packed.codes[g].t())[:m]
