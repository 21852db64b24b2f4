"""Kernels that start before their predecessor ends: programmatic dependent launch, on Hopper and later.

A launch costs the GPU about a microsecond of doing nothing, and a layer of a policy is some ten launches. A kernel that
calls `pdl_wait`, launched with the options of `launch`, is set up while the kernel before it still works, asks for what
it will read (`prefetch`), and waits inside. Its numbers are the same: it waits for all of its predecessor, which has
waited for all of its own. Elsewhere, and under the interpreter, these are nothing.

Imports triton at the top, as `triton_gemm.py` does.
"""

# What triton.jit takes is no Python: its types are the compiler's
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import os
from functools import cache

import torch
import triton
import triton.language as tl

from qlibero.cache import triton_cache

triton_cache()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_ROWS = 16
"""Rows up to which overlapping pays: with more, waiting programs take registers and shared memory from working ones."""


@cache
def _can_overlap(device: torch.device) -> bool:
    return not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(device: torch.device, rows: int) -> dict[str, bool]:
    """What a kernel that calls `pdl_wait` must be launched with to work on so many rows."""
    if rows <= MAX_ROWS and _can_overlap(device):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@triton.jit
def pdl_wait(OVERLAP: tl.constexpr):
    """Let the next kernel start, and wait for the one before this.

    Everything a chunk changes may be read and written only after it; weights may be read, and anything fetched, before.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(ptrs, OVERLAP: tl.constexpr):
    """Ask for the cache lines at `ptrs`, without waiting; kernels that do not overlap have no time for it."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [ptrs.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
