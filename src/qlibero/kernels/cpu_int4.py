"""`cpu_int4`: real packed int4 weights on a CPU. A quarter of bf16's bytes, the contract's exact integers.

The weight lives two codes per byte and nothing else is kept. A call unpacks it tile by tile into one small scratch that
stays in cache, and multiplies each tile in whichever way this processor does integers fast:

* `int8`: `torch._int_mm` (oneDNN) where the CPU has VNNI instructions;
* `fp32`: everywhere else, where `_int_mm` falls back to a scalar loop 15 times slower than an fp32 product (measured on
  an AVX2 machine). The tile is widened to fp32 and multiplied there; all sums are integers below 2^24, so nothing rounds.

Both give the same accumulator, so the choice cannot change a result. torchao's CPU op was not taken: it quantizes and
scales by its own rules, and this contract is about bits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from qlibero.kernels.contract import GemmShape, Kernel, PackedWeight, Support, epilogue
from qlibero.kernels.fake import exact_width
from qlibero.kernels.packing import pack_khalf, unpack_khalf_times_16

TILE_CODES = 1 << 19  # codes unpacked at a time: 2 MB in fp32, small enough to be read back from cache
_scratch = threading.local()


def cpu_multiplies_int8_fast() -> bool:
    """Whether `torch._int_mm` runs on VNNI instructions here."""
    probe = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(probe and probe()) and torch.backends.mkldnn.is_available()


class CpuInt4(Kernel):
    name = "cpu_int4"

    def __init__(self, core: str | None = None):
        """core: "int8" or "fp32"; None picks by processor."""
        self.core = core or ("int8" if cpu_multiplies_int8_fast() else "fp32")

    def supports(self, shape: GemmShape) -> Support:
        if shape.device != "cpu":
            return Support(False, "runs on the CPU only; on CUDA use triton_w4a8")
        if shape.weight_bits > 4:
            return Support(False, f"packs int4 weights, the layer has {shape.weight_bits} bits; use w8a8 or fake")
        if shape.k % 2:
            return Support(False, f"K = {shape.k} is odd, and two codes share a byte; leave this layer unquantized")
        if self.core == "fp32" and (shape.group_size or shape.k) > exact_width(4):
            return Support(False, f"K = {shape.k} is beyond {exact_width(4)}, where fp32 sums stop being exact; use K-groups")
        return Support(True, f"packed int4, {self.core} products")

    def pack(self, codes: Tensor, weight_bits: int = 4, group_size: int | None = None) -> PackedWeight:
        n, k = codes.shape
        return PackedWeight(n, k, weight_bits, group_size, packed=pack_khalf(codes))

    def accumulate(self, codes_x: Tensor, packed: PackedWeight) -> Tensor:
        m, groups = codes_x.shape[0], packed.k // (packed.group_size or packed.k)
        acc = torch.empty((groups, m, packed.n), dtype=torch.int32 if self.core == "int8" else torch.float32)
        for rows, tile_groups in self._tiles(codes_x, packed):
            for g, partial in enumerate(tile_groups):
                acc[g, :, rows] = partial
        return acc if packed.group_size else acc[0]

    def matmul(self, codes_x, s_x, packed, s_w, bias=None, out_dtype=torch.float32) -> Tensor:
        y = torch.empty((codes_x.shape[0], packed.n), dtype=out_dtype)
        for rows, tile_groups in self._tiles(codes_x, packed):
            acc = tile_groups if packed.group_size else next(tile_groups)
            y[:, rows] = epilogue(acc, s_x, s_w[rows], None if bias is None else bias[rows]).to(out_dtype)
        return y

    def _tiles(self, codes_x: Tensor, packed: PackedWeight) -> Iterator[tuple[slice, Iterator[Tensor]]]:
        """For each tile of output rows: which rows, and their accumulators (M, rows), one per K-group."""
        k, group = packed.k, packed.group_size or packed.k
        height = max(1, min(packed.n, TILE_CODES // k))
        codes16 = _reuse("codes", torch.int8, height * k).view(height, k)
        if self.core == "fp32":
            tile = _reuse("tile", torch.float32, height * k).view(height, k)
            x = codes_x.float().mul_(1 / 16)  # exact, and so are the products with 16·code: (x/16)·(16·w) = x·w
        else:
            tile, x = codes16, codes_x
        for start in range(0, packed.n, height):
            stop = min(start + height, packed.n)
            unpack_khalf_times_16(packed.packed[start:stop], codes16[: stop - start])
            if self.core == "fp32":
                tile[: stop - start].copy_(codes16[: stop - start])
            w = tile[: stop - start]
            yield slice(start, stop), (self._product(x[:, c : c + group], w[:, c : c + group]) for c in range(0, k, group))

    def _product(self, x: Tensor, w: Tensor) -> Tensor:
        if self.core == "fp32":
            return x @ w.t()
        return torch._int_mm(x.contiguous(), w.contiguous().t()).bitwise_right_shift_(4)  # 16·acc fits: K·127·128 < 2^31


def _reuse(name: str, dtype: torch.dtype, size: int) -> Tensor:
    """A scratch of at least `size` elements, kept between calls, one per thread."""
    buffer = getattr(_scratch, name, None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # an inference tensor could not be written by a later call outside that mode
            buffer = torch.empty(size, dtype=dtype)
        setattr(_scratch, name, buffer)
    return buffer[:size]
