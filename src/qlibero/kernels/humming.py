"""`humming`: an optional package (`pip install "humming-kernels[cu13]==0.1.19"`), JIT-compiled for SM75 and newer.

It passed on every pi0.5 layer on an H100 (docs/h100.md); elsewhere it is still to be validated. What it can
and cannot be:

* It takes our int8 codes and per-token scales as they are, so its own quantizer never runs.
* It has no integer output: only bf16 comes out, rounded twice on the way. bf16(fp32(acc)·s_x) is multiplied by the
  weight scale in bf16 (ours are bf16-representable, so nothing is lost in storing them). So validation asks for
  bf16(acc) bit for bit with unit scales, and for no more than those two roundings with real ones.
* By itself it splits K over the processors and adds the parts *in bf16* in global memory, in whatever order they
  finish: neither exact nor repeatable. `use_batch_invariant` is its word for never doing that.
* On SM75 and newer it patches the machine code it compiled (int4 loads); HUMMING_DISABLE_PATCH_CUBIN=1 stops that.
* K-groups are refused: with int8 activations it turns group scales into integers, which is another arithmetic.
"""

from __future__ import annotations

from importlib import metadata

import torch
from torch import Tensor, nn

from qlibero.errors import WorkFailed
from qlibero.kernels.contract import GemmShape, Kernel, PackedWeight, Support
from qlibero.registry import KernelPlugin

PLUGIN = KernelPlugin(
    "humming", "the package humming-kernels; bf16 output", provides="Humming", needs=("humming",), order=7
)

VERSION = "0.1.19"  # its API changed during 2026
COMPUTE = '{"use_batch_invariant": true}'
TILE = 64  # its repacking asserts whole tiles of this many rows and channels


class _HummingWeight(PackedWeight):
    """The package's layer around one weight. Its codes are repacked once; the weight scales, which the layer holds in
    an order of its own, are exchanged when others come: a run has one set for ever, validation brings several."""

    def __init__(self, codes: Tensor, weight_bits: int):
        n, k = codes.shape
        super().__init__(n, k, weight_bits, None)
        from humming import ops
        from humming.layer import HummingLayer

        layer = HummingLayer(
            shape_n=self.n,
            shape_k=self.k,
            weight_config={"dtype": f"int{weight_bits}"},
            input_config={"dtype": "int8"},
            torch_dtype=torch.bfloat16,
        ).to(codes.device)
        offset = (codes.to(torch.int32) + 2 ** (weight_bits - 1)).contiguous()  # its integers are offset binary
        ones = torch.ones((self.n, 1), dtype=torch.bfloat16, device=codes.device)
        layer.load_from_tensors({"weight": ops.pack_weight(offset, weight_bits), "weight_scale": ones})
        layer.transform()
        self.layer = layer
        self._scales: Tensor | None = None

    def scaled_by(self, s_w: Tensor) -> nn.Module:
        """The layer with these weight scales (N,)."""
        if self._scales is not s_w:
            from humming.transform import transform_humming_weight_scale

            on_output = self.layer.humming_config.should_apply_bs_on_c
            ordered = transform_humming_weight_scale(s_w.unsqueeze(1).bfloat16(), to_apply_on_c=on_output)
            self.layer.weight_scale = nn.Parameter(ordered, requires_grad=False)
            self._scales = s_w
        layer: nn.Module = self.layer
        return layer


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
        if shape.n % TILE or shape.k % TILE:
            return Support(False, f"its tiles need N and K divisible by {TILE}, this layer is {shape.n}x{shape.k}")
        return Support(True, f"humming-kernels {version}, bf16 out, rounded twice")

    def pack(self, codes: Tensor, weight_bits: int = 4, group_size: int | None = None) -> PackedWeight:
        return _HummingWeight(codes, weight_bits)

    def accumulate(self, codes_x: Tensor, packed: PackedWeight) -> Tensor:
        raise WorkFailed("humming has no integer output")

    def matmul(
        self,
        codes_x: Tensor,
        s_x: Tensor,
        packed: PackedWeight,
        s_w: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        assert isinstance(packed, _HummingWeight)
        layer = packed.scaled_by(s_w)
        y: Tensor = layer(
            codes_x.contiguous(), input_scale=s_x.float().unsqueeze(1).contiguous(), compute_config=COMPUTE
        )
        if bias is not None:  # in fp32, as the contract has it; its own bias would be a bf16 one
            y = y.float() + bias.float()
        return y.to(out_dtype)
