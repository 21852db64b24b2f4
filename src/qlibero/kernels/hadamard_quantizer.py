"""Transform and quantizer of `hadamard.py` on a GPU: Triton's.

Imports triton at the top, as `triton_gemm.py` does.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qlibero.kernels import triton_hadamard


class HadamardQuantizer:
    """One input's `hadamard` factor, ready to run on the device it is on."""

    def __init__(self, factors: Mapping[str, Tensor], width: int):
        self.s = factors["hadamard"].contiguous()

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
        return triton_hadamard.smooth_hadamard(x, self.s, bits, clip, up=up, in_tiles=in_tiles)
