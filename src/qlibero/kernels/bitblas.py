"""`bitblas`: the optional package bitblas 0.1.0.post1, opt-in, with the only flags under which it is right.

Its defaults return wrong numbers for int4×int8 (weights permuted for a schedule that does not undo it), and its errors
hide their cause; that is where this project began. Emulation of its generated code says which settings are exact:

* SM80, 86, 89: backend "tl", no tuning, no propagation; one token only from K ≥ 512 and N ≥ 8 on.
* SM90: backend "tir", no propagation. Exact, but no tensor cores in most shapes: expect it to be slow.
* everywhere: int32 accumulator *and* output (fp16 overflows), K a multiple of 8, our epilogue.

On an H100 it passed on every pi0.5 layer, and a whole policy acted as under `fake`, at nine times the time of
a bf16 prefix (docs/h100.md); on other GPUs it is still to be validated. It can only be imported on a machine with a GPU
and CUDA 12 libraries, and it brings its own `tvm` and `tilelang` modules into the process, so it is imported when first
used and not before.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor

from qlibero.errors import WorkFailed
from qlibero.kernels.contract import GemmShape, Kernel, PackedWeight, Support
from qlibero.kernels.epilogue_dispatch import finish
from qlibero.kernels.known_errors import diagnose_shape, explain
from qlibero.registry import KernelPlugin

PLUGIN = KernelPlugin(
    "bitblas",
    "the package bitblas, with the flags under which it is right",
    provides="BitBLAS",
    needs=("bitblas",),
    order=8,
)

BACKEND_OF = {(8, 0): "tl", (8, 6): "tl", (8, 9): "tl", (9, 0): "tir"}


@cache
def _package() -> Any:
    """The module, or the reason (a string) why it cannot be had."""
    try:
        return import_module("bitblas")
    except (ImportError, OSError, RuntimeError) as error:
        return explain(error)


@cache
def _operator(m: int, n: int, k: int, backend: str) -> Any:
    """The compiled product for one shape. WorkFailed when the build failed, which the package conceals."""
    bitblas = _package()
    major, minor = torch.cuda.get_device_capability()
    config = bitblas.MatmulConfig(
        M=m,
        N=n,
        K=k,
        A_dtype="int8",
        W_dtype="int4",
        accum_dtype="int32",
        out_dtype="int32",
        layout="nt",
        with_bias=False,
        with_scaling=False,
        with_zeros=False,
        fast_decoding=False,
        propagate_a=False,
        propagate_b=False,
    )
    # the target in so many words: by itself it asks nvidia-smi for a name, matches that fuzzily, and refuses several
    # GPUs
    operator = bitblas.Matmul(
        config=config, target=f"cuda -arch=sm_{major}{minor}", enable_tuning=False, backend=backend
    )
    if operator.lib is None:
        raise WorkFailed(
            f"bitblas could not build {m}x{n}x{k} (its library is None) and does not say why: "
            "bitblas.set_log_level('DEBUG') does; "
            "CU_TENSOR_MAP_SWIZZLE_128B there means mixed CUDA headers, see `qlibero doctor`"
        )
    return operator


class BitBLAS(Kernel):
    name = "bitblas"
    devices, weight_bits, grouped = ("cuda",), (4,), False
    package = "bitblas"

    def supports(self, shape: GemmShape) -> Support:
        try:
            metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return Support(
                False, "not installed: pip install bitblas==0.1.0.post1 nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12"
            )
        if shape.device != "cuda" or not torch.cuda.is_available():
            return Support(False, "needs a CUDA device, even to be imported")
        if torch.cuda.get_device_capability() not in BACKEND_OF:
            return Support(False, f"no exact configuration is known for {torch.cuda.get_device_name()}")
        if shape.weight_bits != 4 or shape.group_size:
            return Support(False, "this adapter does 4-bit weights with one scale per output row")
        if unfit := diagnose_shape(shape.n, shape.k):
            return Support(False, unfit)
        if isinstance(package := _package(), str):
            return Support(False, package)
        return Support(True, f"bitblas {package.__version__}, backend {self._backend()}, no tuning, no propagation")

    def pack(self, codes: Tensor, weight_bits: int = 4, group_size: int | None = None) -> PackedWeight:
        n, k = codes.shape
        packed = _operator(16, n, k, self._backend()).transform_weight(
            codes
        )  # without propagation no M shapes the layout
        return PackedWeight(n, k, weight_bits, group_size, packed=packed)

    def accumulate(self, codes_x: Tensor, packed: PackedWeight) -> Tensor:
        m = codes_x.shape[0]
        backend = self._backend()
        if (
            m == 1 and backend == "tl" and (packed.k < 512 or packed.n < 8)
        ):  # its kernel for one token has no bounds checks
            return self.accumulate(torch.nn.functional.pad(codes_x, (0, 0, 0, 15)), packed)[:1]
        acc: Tensor = _operator(m, packed.n, packed.k, backend)(codes_x.contiguous(), packed.packed)
        return acc

    def matmul(
        self,
        codes_x: Tensor,
        s_x: Tensor,
        packed: PackedWeight,
        s_w: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        return finish(self.accumulate(codes_x, packed), s_x, s_w, bias, out_dtype)

    @staticmethod
    def _backend() -> str:
        return BACKEND_OF[torch.cuda.get_device_capability()]
