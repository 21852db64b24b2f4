"""Transform and quantizer of `hadamard.py` on a GPU: in CUDA on a Hopper, in Triton elsewhere and for what the former
does not take. Their results are the same to the last bit, so it does not matter which.

Imports triton at the top, as `triton_gemm.py` does.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qlibero.kernels import cuda_hadamard, cuda_w4a8, triton_hadamard


class HadamardQuantizer:
    """One input's `hadamard` factor, ready to run on the device it is on."""

    gated = True  # takes `up`

    def __init__(self, factors: Mapping[str, Tensor], width: int):
        self.s = factors["hadamard"].contiguous()
        self.on_hopper = self.s.is_cuda and cuda_w4a8.missing() is None

    @staticmethod
    def unfit(factors: Mapping[str, Tensor]) -> str | None:
        """Why these factors need the torch code instead, or None."""
        if set(factors) != {"hadamard"}:
            return "a Hadamard transform among other factors"
        return None

    def __call__(
        self, x: Tensor, bits: int = 8, clip: float = 1.0, *, up: Tensor | None = None, in_tiles: bool = False
    ) -> tuple[Tensor, Tensor]:
        """x (M, K) of any float dtype, and with `up` gelu_tanh(x)·up in its stead → codes int8 (M, K), or their image
        (`tiled.py`), and scales fp32 (M,)."""
        x = x if x.stride(-1) == 1 else x.contiguous()
        if self.on_hopper and cuda_hadamard.fits(x, up, bits, clip):
            return cuda_hadamard.smooth_hadamard(x, self.s, up=up, in_tiles=in_tiles)
        return triton_hadamard.smooth_hadamard(x, self.s, bits, clip, up=up, in_tiles=in_tiles)
