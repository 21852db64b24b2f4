"""Launching `hadamard_sm90.cu`: the Hadamard quantizer for Hopper at the widths of pi0.5, bfloat16 in, 8 bits, no clip.

Equal bit for bit to `triton_hadamard`, which takes everything else.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qlibero.kernels import cuda_driver, tiled

SMALL = {1024: 8, 2048: 16, 4096: 32}  # width -> blocks of 128 channels, which a CTA holds in registers
WIDE = 16384
MANY = 1024  # tokens from which 64 threads a token are faster than 128 at K = 2048

Parameters = cuda_driver.structure(
    "Parameters",
    [
        *((name, ctypes.c_void_p) for name in ("x", "up", "s", "codes", "scales")),
        *((name, ctypes.c_int) for name in ("m", "groups", "tiled")),
        *((name, ctypes.c_longlong) for name in ("x_stride", "up_stride")),
    ],
)


def fits(x: Tensor, up: Tensor | None, bits: int, clip: float) -> bool:
    """Whether the kernel takes this input; rows must start at addresses of whole 16 bytes."""
    return (
        (x.shape[1] in SMALL or x.shape[1] == WIDE)
        and bits == 8
        and clip == 1.0
        and all(
            part.dtype == torch.bfloat16
            and part.stride(1) == 1
            and part.stride(0) % 8 == 0
            and part.data_ptr() % 16 == 0
            for part in (x, *(() if up is None else (up,)))
        )
    )


def smooth_hadamard(x: Tensor, s: Tensor, *, up: Tensor | None = None, in_tiles: bool = False) -> tuple[Tensor, Tensor]:
    """As `triton_hadamard.smooth_hadamard`, for what `fits`."""
    m, k = x.shape
    codes = tiled.empty(m, k, x.device) if in_tiles else torch.empty((m, k), dtype=torch.int8, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    other = x if up is None else up
    tensors = (x, other, s, codes, scales)
    parameters = Parameters(
        *(tensor.data_ptr() for tensor in tensors), m, -(-m // tiled.TOKENS), in_tiles, x.stride(0), other.stride(0)
    )
    if m:
        blocks = min(m, 3 * _processors(x.device.index)) if k == WIDE else m
        # a grid that stays resident gains nothing from starting early, and takes room from its predecessor
        instance(k, m, up is not None).launch(parameters, blocks, x.device, overlap=k != WIDE)
    return codes, scales


def instance(k: int, m: int, gated: bool) -> cuda_driver.Kernel:
    """The kernel for that width and number of tokens."""
    return _instance(k, 256 if k == WIDE else 64 if k == 2048 and m >= MANY else 128, gated)


@cache
def _instance(k: int, threads: int, gated: bool) -> cuda_driver.Kernel:
    name = f"hadamard_{k}_{threads}{'_gated' if gated else ''}"
    return cuda_driver.Kernel(source(k, threads, gated, name), name, threads=threads, shared=4 * k)


def source(k: int, threads: int, gated: bool, name: str) -> str:
    """CUDA source of one instance, an extern "C" function of that name."""
    ctas = 3 if k == WIDE else 1024 // threads * 16 // max(SMALL[k], 16)
    call = f"wide<{int(gated)}>" if k == WIDE else f"small<{threads}, {SMALL[k]}, {int(gated)}>"
    body = (Path(__file__).parent / "hadamard_sm90.cu").read_text()
    return (
        f'{body}\nextern "C" __global__ void __launch_bounds__({threads}, {ctas})\n'
        f"{name}(const __grid_constant__ Params p) {{ {call}(p); }}\n"
    )


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
