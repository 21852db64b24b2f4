"""`cpu_int4`: real packed int4 weights on a CPU. A quarter of bf16's bytes, the contract's exact integers.

The weight lives two codes per byte and nothing else is kept. A call unpacks it tile by tile into one small scratch that
stays in cache, and multiplies each tile in whichever way this processor does integers fast:

* `int8`: `torch._int_mm` (oneDNN) where the CPU has VNNI instructions;
* `fp32`: everywhere else, where `_int_mm` falls back to a scalar loop 15 times slower than an fp32 product (measured on
  an AVX2 machine). The tile is widened to fp32 and multiplied there; all sums are integers below 2^24, so nothing
  rounds.

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
from qlibero.registry import KernelPlugin

PLUGIN = KernelPlugin("cpu_int4", "two codes per byte, unpacked tile by tile", provides="CpuInt4", order=3)

TILE_CODES = 1 << 19  # codes unpacked at a time: 2 MB in fp32, small enough to be read back from cache
LARGEST_K = 132_000  # 16·acc stays inside int32
_scratch = threading.local()


def cpu_multiplies_int8_fast() -> bool:
    """Whether `torch._int_mm` runs on VNNI instructions here."""
    probe = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(probe and probe()) and torch.backends.mkldnn.is_available()


class CpuInt4(Kernel):
    name = "cpu_int4"
    devices, weight_bits = ("cpu",), (4,)

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
        if shape.k > LARGEST_K:
            return Support(False, f"K = {shape.k} could overflow the int32 accumulator (limit {LARGEST_K})")
        if self.core == "fp32" and (shape.group_size or shape.k) > exact_width(4):
            return Support(
                False, f"K = {shape.k} is beyond {exact_width(4)}, where fp32 sums stop being exact; use K-groups"
            )
        return Support(True, f"packed int4, {self.core} products")

    def pack(self, codes: Tensor, weight_bits: int = 4, group_size: int | None = None) -> PackedWeight:
        n, k = codes.shape
        return PackedWeight(n, k, weight_bits, group_size, packed=pack_khalf(codes))

    def accumulate(self, codes_x: Tensor, packed: PackedWeight) -> Tensor:
        x, height = self._left(codes_x), self._tile_height(packed)
        if height == packed.n and not packed.group_size:
            return self._product(x, self._tile(packed, 0, height))
        m, groups = codes_x.shape[0], packed.k // (packed.group_size or packed.k)
        acc = torch.empty((groups, m, packed.n), dtype=torch.int32 if self.core == "int8" else torch.float32)
        for start in range(0, packed.n, height):
            tile = self._tile(packed, start, height)
            for g, partial in enumerate(self._groups(x, tile, packed)):
                acc[g, :, start : start + height] = partial
        return acc if packed.group_size else acc[0]

    def matmul(
        self,
        codes_x: Tensor,
        s_x: Tensor,
        packed: PackedWeight,
        s_w: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        x, height = self._left(codes_x), self._tile_height(packed)
        if height == packed.n and not packed.group_size:  # one tile, nothing to put together
            return epilogue(self._product(x, self._tile(packed, 0, height)), s_x, s_w, bias).to(out_dtype)
        y = torch.empty((codes_x.shape[0], packed.n), dtype=out_dtype)
        for start in range(0, packed.n, height):
            rows = slice(start, start + height)
            partials = self._groups(x, self._tile(packed, start, height), packed)
            acc = partials if packed.group_size else next(partials)
            y[:, rows] = epilogue(acc, s_x, s_w[rows], None if bias is None else bias[rows])
        return y

    def _left(self, codes_x: Tensor) -> Tensor:
        """The tokens as the core wants them; in fp32 divided by 16, exactly: the tiles are 16 times too large."""
        return codes_x.float().mul_(1 / 16) if self.core == "fp32" else codes_x

    def _tile_height(self, packed: PackedWeight) -> int:
        return max(1, min(packed.n, TILE_CODES // packed.k))

    def _tile(self, packed: PackedWeight, start: int, height: int) -> Tensor:
        """Rows of the weight, unpacked into the scratch: 16·code, (rows, K)."""
        rows = packed.packed if height == packed.n else packed.packed[start : start + height]
        codes, wide = _scratch_views(height, packed.k)
        if rows.shape[0] < height:
            codes, wide = codes[: rows.shape[0]], wide[: rows.shape[0]]
        unpack_khalf_times_16(rows, codes)
        return wide.copy_(codes) if self.core == "fp32" else codes

    def _groups(self, x: Tensor, tile: Tensor, packed: PackedWeight) -> Iterator[Tensor]:
        """The tile's accumulators, one per K-group."""
        group = packed.group_size or packed.k
        for k in range(0, packed.k, group):
            yield self._product(x[:, k : k + group], tile[:, k : k + group])

    def _product(self, x: Tensor, w: Tensor) -> Tensor:
        if self.core == "fp32":
            return x @ w.t()
        return torch._int_mm(x.contiguous(), w.contiguous().t()).bitwise_right_shift_(
            4
        )  # 16·acc fits: K·127·128 < 2^31


def _scratch_views(height: int, k: int) -> tuple[Tensor, Tensor]:
    """(int8, fp32) scratch of one tile's size, kept between calls, one pair per thread; the largest tile fits."""
    views: dict[tuple[int, int], tuple[Tensor, Tensor]] | None = getattr(_scratch, "views", None)
    if views is None:
        views = _scratch.views = {}
        with torch.inference_mode(False):  # inference tensors could not be written by a later call outside that mode
            _scratch.buffers = torch.empty(TILE_CODES, dtype=torch.int8), torch.empty(TILE_CODES)
    if (height, k) not in views:
        with torch.inference_mode(False):
            codes, wide = (buffer[: height * k].view(height, k) for buffer in _scratch.buffers)
            views[height, k] = codes, wide
    return views[height, k]
