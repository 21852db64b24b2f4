"""Integer matrix products behind one small contract; `contract.py` defines it, `validation.py` enforces it.

Backends are named here and loaded on first use, because some of them cannot even be imported without a GPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from qlibero.errors import UserError

if TYPE_CHECKING:
    from qlibero.kernels.contract import Kernel

DEQUANTIZED = "dequantized"  # no kernel: what runs a layer whose activations are not quantized, an ordinary linear

# name -> module:class. In this order `auto` prefers them when two are equally fast.
BACKENDS = {
    "fake": "qlibero.kernels.fake:Fake",
    "int_ref": "qlibero.kernels.int_ref:IntRef",
    "cpu_int4": "qlibero.kernels.cpu_int4:CpuInt4",
    "w8a8": "qlibero.kernels.w8a8:W8A8",
    "cuda_w4a8": "qlibero.kernels.cuda_w4a8:CudaW4A8",
    "triton_w4a8": "qlibero.kernels.triton_w4a8:TritonW4A8",
    "humming": "qlibero.kernels.humming:Humming",
    "bitblas": "qlibero.kernels.bitblas:BitBLAS",
}


def load(name: str) -> Kernel:
    """The kernel called `name`. UserError for an unknown name; of a missing package the kernel's `supports` tells."""
    if name not in BACKENDS:
        raise UserError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    module, cls = BACKENDS[name].split(":")
    kernel: Kernel = getattr(import_module(module), cls)()
    return kernel
