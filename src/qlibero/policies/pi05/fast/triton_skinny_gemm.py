"""Matrix products of few rows in Triton: a flow step has 10 rows, and time is what it takes to read the weights.

    out[M, N] = x[M, K] · w[N, K]ᵀ        M ≤ 16; bfloat16 or float16, sums in float32

A library's product of so few rows reads weights at a quarter to two thirds of the memory's speed. Here

* K is cut until every multiprocessor has weights to wait for; the float32 parts are added, in their order, by the norm
  that reads them anyway, so a cut costs no launch and repeats bit for bit;
* one program reads gate and up and writes gelu(gate)·up; one reads both halves of a head and rotates them;
* each program asks for its weights before it waits for the kernel that makes its input, see `kernels.triton_overlap`.

Imports triton at the top, as `triton_fused_ops.py` does.
"""

# What triton.jit takes is no Python: its types are the compiler's
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlibero.kernels.triton_pdl import INTERPRETED, launch, pdl_wait, prefetch
from qlibero.kernels.triton_quantizer import gelu_times

MAX_ROWS = 16  # one tile of the tensor cores


class Shape(NamedTuple):
    """How one product is cut."""

    outputs: int  # of one program
    step: int  # how far along K a warp goes at once
    parts: int = 1  # of K, a program each
    warps: int = 4  # of a program, which share its part of K
    stages: int = 4  # steps in work or on their way


# Found by trying on an H100, in a whole flow of full size; they fit into smaller cards
# (benchmarks/triton_resources.py).
TURNED = Shape(16, 128, stages=3)
GATED = Shape(16, 64, stages=5)
DEEP = Shape(16, 64, parts=2, stages=6)


def _options(shape: Shape, x: Tensor) -> dict[str, int]:
    return {
        "ROWS": MAX_ROWS,
        "OUTPUTS": shape.outputs,
        "STEP": shape.step,
        "LANES": shape.warps,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
        **launch(x.device, x.numel() // x.shape[-1]),
    }


def fits(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a product cut like this can take x (..., K) and weight (N, K)."""
    rows, (n, k) = x.numel() // x.shape[-1], weight.shape
    span = k // shape.parts
    return (
        rows <= MAX_ROWS
        and bias is None
        and x.dtype == weight.dtype
        and (x.element_size() == 2 or INTERPRETED)
        and n % (2 * shape.outputs) == 0
        and span * shape.parts == k
        and span.bit_count() == 1
        and span >= shape.step * shape.warps
        and weight.is_contiguous()
    )


def rotated(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """See `fused_ops.LayerOps.rotated`; weight ((heads + 2)·d, K), d a multiple of twice TURNED's outputs."""
    (batch, length, k), dim = x.shape, cos.shape[-1]
    heads = len(weight) // dim - 2
    q = torch.empty(batch, length, heads, dim, dtype=x.dtype, device=x.device)
    cos, sin = cos.expand(batch, length, 1, dim), sin.expand(batch, length, 1, dim)
    rotated_kernel[(heads + 2, dim // 2 // TURNED.outputs)](
        x.contiguous(),
        weight,
        cos,
        sin,
        q,
        keys,
        values,
        batch * length,
        length,
        k,
        heads,
        cos.stride(0),
        cos.stride(1),
        sin.stride(0),
        sin.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        SPAN=k,
        HALF=dim // 2,
        **_options(TURNED, x),
    )
    return q


def parts(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K), weight (N, K) -> float32 (S, ..., N) whose sum over S is the product."""
    rows, (n, k) = x.numel() // x.shape[-1], weight.shape
    out = torch.empty(DEEP.parts, *x.shape[:-1], n, dtype=torch.float32, device=x.device)
    skinny_gemm_kernel[(n // DEEP.outputs, DEEP.parts)](
        x.contiguous(), weight, out, rows, n, k, SPAN=k // DEEP.parts, GATED=False, **_options(DEEP, x)
    )
    return out


def gated(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K), weight (2F, K), gate above up -> gelu_tanh(gate)·up, (..., F) in x's dtype."""
    rows, width, k = x.numel() // x.shape[-1], len(weight) // 2, weight.shape[1]
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    skinny_gemm_kernel[(width // GATED.outputs, 1)](
        x.contiguous(), weight, out, rows, width, k, SPAN=k, GATED=True, **_options(GATED, x)
    )
    return out


@triton.jit
def turn(first, second, cos_ptrs, sin_ptrs, HALF: tl.constexpr):
    """Both halves of a head after rotation; the sign of the first half's sine is in the table."""
    a, b = first.to(tl.float32), second.to(tl.float32)
    x = a * tl.load(cos_ptrs).to(tl.float32) + b * tl.load(sin_ptrs).to(tl.float32)
    y = b * tl.load(cos_ptrs + HALF).to(tl.float32) + a * tl.load(sin_ptrs + HALF).to(tl.float32)
    return x.to(first.dtype), y.to(first.dtype)


@triton.jit
def _products(
    x_ptr,
    w_ptr,
    n,
    apart,
    start,
    rows,
    k,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
    LANES: tl.constexpr,
    PAIR: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Outputs `n` (OUTPUTS,) and, with PAIR, outputs n + apart, of K from `start`: both (OUTPUTS, ROWS) float32.

    Computed transposed: weights are the MMA's first operand. K is cut into LANES, a warp each, as batches of one
    batched product: a warp alone, going along all of K, would wait for its own shared memory at every step. Asks for
    the weights, then waits, then begins.
    """
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * k + start
    lines = tl.arange(0, SPAN // 64)[None, :] * 64  # of 128 bytes
    prefetch(w_ptrs + lines, OVERLAP)
    if PAIR:
        prefetch(w_ptrs + apart * k + lines, OVERLAP)
    pdl_wait(OVERLAP)
    m = tl.arange(0, ROWS)
    place = start + tl.arange(0, LANES)[:, None] * (SPAN // LANES) + tl.arange(0, STEP)[None, :]
    w_ptrs = w_ptr + n.to(tl.int64)[None, :, None] * k + place[:, None, :]
    x_ptrs = x_ptr + m[None, None, :] * k + place[:, :, None]
    one, other = tl.zeros((LANES, OUTPUTS, ROWS), tl.float32), tl.zeros((LANES, OUTPUTS, ROWS), tl.float32)
    for _ in range(0, SPAN // LANES, STEP):
        x = tl.load(x_ptrs, mask=(m < rows)[None, None, :], other=0.0)
        one = tl.dot(tl.load(w_ptrs), x, one, input_precision="ieee")
        if PAIR:
            other = tl.dot(tl.load(w_ptrs + apart * k), x, other, input_precision="ieee")
        w_ptrs += STEP
        x_ptrs += STEP
    return tl.sum(one, 0), tl.sum(other, 0)


@triton.jit(do_not_specialize=["rows"])
def skinny_gemm_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    rows,
    outputs,
    k,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
    LANES: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid: (outputs / OUTPUTS, parts of K)."""
    n, m = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS)
    part = tl.program_id(1)
    y, up = _products(x_ptr, w_ptr, n, outputs, part * SPAN, rows, k, SPAN, ROWS, OUTPUTS, STEP, LANES, GATED, OVERLAP)
    if GATED:
        y = gelu_times(y, up, out_ptr.dtype.element_ty)
    place = (part * rows + m)[None, :] * outputs + n[:, None]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=(m < rows)[None, :])


@triton.jit(do_not_specialize=["rows", "length"])
def rotated_kernel(
    x_ptr,
    w_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    rows,
    length,
    k,
    heads,
    cb,
    ct,
    sb,
    st,
    kb,
    kt,
    vb,
    vt,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
    LANES: tl.constexpr,
    HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid: (heads + 2, HALF / OUTPUTS). A program has both halves of what it rotates."""
    head, i, m = tl.program_id(0), tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS)
    n = head * 2 * HALF + i
    first, second = _products(x_ptr, w_ptr, n, HALF, 0, rows, k, SPAN, ROWS, OUTPUTS, STEP, LANES, True, OVERLAP)
    first, second = first.to(q_ptr.dtype.element_ty), second.to(q_ptr.dtype.element_ty)
    row = tl.minimum(m, rows - 1)[None, :]  # rows beyond the last are not stored
    b, t, i = row // length, row % length, i[:, None]
    if head <= heads:
        first, second = turn(first, second, cos_ptr + b * cb + t * ct + i, sin_ptr + b * sb + t * st + i, HALF)
    if head < heads:
        target = q_ptr + (row * heads + head) * 2 * HALF + i
    elif head == heads:
        target = k_ptr + b.to(tl.int64) * kb + t * kt + i
    else:
        target = v_ptr + b.to(tl.int64) * vb + t * vt + i
    tl.store(target, first, mask=(m < rows)[None, :])
    tl.store(target + HALF, second, mask=(m < rows)[None, :])
