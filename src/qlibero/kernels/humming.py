"""`humming`: the optional package humming-kernels (`pip install "humming-kernels[cu13]==0.1.19"`), JIT-compiled for SM75 and newer.

Written against the source of version 0.1.19 and not yet run on a GPU: the court decides. What it can and cannot be:

* It takes our int8 codes and per-token scales as they are, so its own quantizer never runs.
* It has no integer output: only bf16 comes out, weight scales are stored in bf16 (ours are bf16-representable, so nothing is
  lost) and its epilogue has its own order. So the court asks for bf16(acc) bit for bit with unit scales, and for at most one
  bf16 step of difference with real ones.
* K-groups are refused: with int8 activations it turns group scales into integers, which is another arithmetic.
"""

from __future__ import annotations

from importlib import metadata

import torch
from torch import Tensor

from qlibero.errors import WorkFailed
from qlibero.kernels.contract import GemmShape, Kernel, PackedWeight, Support

VERSION = "0.1.19"  # its API changed during 2026


class _HummingWeight(PackedWeight):
    """Offset-binary codes, and the package's layer made from them for one set of weight scales.

    The layer bakes the scales in. A run has one set per weight; the court brings several, hence the codes are kept (in
    host memory) and the layer is rebuilt when other scales come.
    """

    def __init__(self, codes: Tensor, weight_bits: int):
        super().__init__(*codes.shape, weight_bits, None)
        from humming import ops

        offset = (codes.to(torch.int32) + 2 ** (weight_bits - 1)).contiguous()
        self.host_codes = ops.pack_weight(offset, weight_bits).cpu()
        self.device, self.layer, self._scales = codes.device, None, None

    def layer_for(self, s_w: Tensor):
        if self.layer is None or self._scales is not s_w:
            from humming.layer import HummingLayer

            layer = HummingLayer(
                shape_n=self.n, shape_k=self.k, weight_config={"dtype": f"int{self.weight_bits}"},
                input_config={"dtype": "int8"}, torch_dtype=torch.bfloat16,
            ).to(self.device)  # fmt: skip
            layer.load_from_tensors({"weight": self.host_codes, "weight_scale": s_w.unsqueeze(1).bfloat16()})
            layer.transform()
            self.layer, self._scales = layer, s_w
        return self.layer

    @property
    def nbytes(self) -> int:
        if self.layer is None:
            return self.host_codes.untyped_storage().nbytes()
        return sum(t.untyped_storage().nbytes() for t in self.layer.parameters())


class Humming(Kernel):
    name = "humming"
    devices, grouped = ("cuda",), False
    package = "humming-kernels"
    rounds_to = torch.bfloat16

    def supports(self, shape: GemmShape) -> Support:
        try:
            version = metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return Support(False, f'not installed: pip install "humming-kernels[cu13]=={VERSION}"')
        if version != VERSION:
            return Support(False, f"humming-kernels {version} is installed, this adapter is written for {VERSION}")
        if shape.device != "cuda" or not torch.cuda.is_available():
            return Support(False, "needs a CUDA device")
        if torch.cuda.get_device_capability() < (7, 5):
            return Support(False, f"needs SM75 or newer, this GPU is {torch.cuda.get_device_name()}")
        if shape.group_size:
            return Support(False, "turns K-group scales into integers, which is another arithmetic; use triton_w4a8")
        if shape.weight_bits not in (4, 8):
            return Support(False, f"this adapter packs 4- and 8-bit weights, not {shape.weight_bits}")
        if shape.k % 32:
            return Support(False, f"K = {shape.k} is not a multiple of 32")
        return Support(True, f"humming-kernels {version}, bf16 out")

    def pack(self, codes: Tensor, weight_bits: int = 4, group_size: int | None = None) -> PackedWeight:
        return _HummingWeight(codes, weight_bits)

    def accumulate(self, codes_x: Tensor, packed: PackedWeight) -> Tensor:
        raise WorkFailed("humming has no integer output")

    def matmul(self, codes_x, s_x, packed, s_w, bias=None, out_dtype=torch.bfloat16) -> Tensor:
        y = packed.layer_for(s_w)(codes_x.contiguous(), input_scale=s_x.float().unsqueeze(1).contiguous())
        if bias is not None:  # in fp32, as the contract has it; the product before it is rounded to bf16 all the same
            y = y.float() + bias.float()
        return y.to(out_dtype)
