"""FP8 as a competitor of W4A8 in `policy_latency.py`: the linears of a layout as `torch._scaled_mm`, e4m3 both ways.

What `qlibero.kernels.fp8` defines, with a scale a token and a scale a row, and what deployments ship: no transform,
one quantizer launch an input (gelu(gate)·up inside it), joint products where W4A8 has them. The sum is the tensor
cores' own, so answers are close to the definition's and not equal to them. Needs SM89 or newer and Triton.

    PYTHONPATH=src python benchmarks/fp8_linears.py         # how far from it, at three layers of pi0.5
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from qlibero.kernels.contract import Kernel, PackedWeight
from qlibero.kernels.fp8 import E4M3_MOST, quantize_e4m3
from qlibero.kernels.triton_pdl import launch, pdl_wait
from qlibero.kernels.triton_quantizer import gelu_times, peak_of, scale_of
from qlibero.policies.pi05.model import Pi05Model
from qlibero.policies.surgery import swap_modules
from qlibero.quant.linear import Prepared, Product, QuantLinear
from qlibero.quant.transform import InputTransform, Transform


class ScaledMm(Kernel):
    """`torch._scaled_mm` by rows and columns, bfloat16 out."""

    name = "scaled_mm"
    fast = True  # cuBLASLt's faster accumulation, as deployments use it

    def pack(self, codes: Tensor, weight_bits: int = 8, group_size: int | None = None) -> PackedWeight:
        return PackedWeight(*codes.shape, weight_bits, group_size, codes=codes.contiguous())

    def matmul(self, codes_x, s_x, packed, s_w, bias=None, out_dtype=torch.bfloat16):
        return torch._scaled_mm(
            codes_x,
            packed.codes.t(),
            scale_a=s_x.unsqueeze(1),
            scale_b=s_w.unsqueeze(0),
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=self.fast,
        ).to(out_dtype)


class Fp8Linear(QuantLinear):
    """Rows of a joint product whose input becomes e4m3 in one launch."""

    def prepare(self, x: Tensor) -> Prepared:
        codes, scales = quantize(x.reshape(-1, x.shape[-1]))
        return Prepared(codes, False, scales, x.shape[:-1], x.dtype)

    def takes_gated(self, device: torch.device) -> bool:
        return True

    def of_gated(self, gate: Tensor, up: Tensor) -> Tensor:
        codes, scales = quantize(*(part.reshape(-1, part.shape[-1]) for part in (gate, up)))
        return self.from_prepared(Prepared(codes, False, scales, gate.shape[:-1], gate.dtype))


def fp8_model(model: Pi05Model, *, llm: bool = False, vision: bool = False, kernel: Kernel | None = None) -> Pi05Model:
    """A twin of `model` whose language model and vision tower, as asked, multiply in FP8."""
    names = {module: name for name, module in model.named_modules()}
    swaps: dict[str, nn.Module] = {}

    def add(*linears: nn.Module) -> None:
        for linear, made in zip(linears, _together(linears, kernel or ScaledMm()), strict=True):
            swaps[names[linear]] = made

    for layer in model.llm.layers[:-1] if llm else ():
        a, m = layer.self_attn, layer.mlp
        for linears in ((a.q_proj, a.k_proj, a.v_proj), (a.o_proj,), (m.gate_proj, m.up_proj), (m.down_proj,)):
            add(*linears)
    if llm:
        last = model.llm.layers[-1].self_attn
        add(last.k_proj, last.v_proj)
    for layer in model.vision.vision_model.encoder.layers if vision else ():
        a, m = layer.self_attn, layer.mlp
        for linears in ((a.q_proj, a.k_proj, a.v_proj), (a.out_proj,), (m.fc1,), (m.fc2,)):
            add(*linears)
    return swap_modules(model, swaps)


def _together(linears: Sequence[nn.Module], kernel: Kernel) -> list[nn.Module]:
    codes, scales = zip(*(quantize_e4m3(linear.weight.detach()) for linear in linears), strict=True)
    joined = torch.cat([part.view(torch.uint8) for part in codes]).view(torch.float8_e4m3fn)
    biases = [linear.bias for linear in linears]
    bias = None if biases[0] is None else torch.cat([part.detach().bfloat16() for part in biases])
    product = Product(kernel, kernel.pack(joined), torch.cat(scales).bfloat16().float(), bias)
    shared, made, start = InputTransform(Transform(), linears[0].in_features), [], 0
    for linear in linears:
        stop = start + linear.out_features
        made.append(Fp8Linear(shared, product, start, stop, activation_bits=8, activation_clip=1.0))
        start = stop
    return made


def quantize(x: Tensor, up: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (M, K), and with `up` gelu_tanh(x)·up in its stead -> codes float8_e4m3fn (M, K) and scales fp32 (M,)."""
    m, k = x.shape
    codes = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(k)
    _quantize[(m,)](
        x,
        x if up is None else up,
        codes,
        scales,
        k,
        x.stride(0),
        0 if up is None else up.stride(0),
        E4M3_MOST,
        BLOCK=block,
        GATED=up is not None,
        num_warps=4 if block <= 4096 else 16,
        **launch(x.device, m),
    )
    return codes, scales


@triton.jit
def _quantize(
    x_ptr,
    up_ptr,
    codes_ptr,
    scales_ptr,
    K,
    x_stride,
    up_stride,
    limit,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid: (M,)."""
    pdl_wait(OVERLAP)
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = k < K
    x = tl.load(x_ptr + row * x_stride + k, mask=there, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(up_ptr + row * up_stride + k, mask=there, other=0.0).to(tl.float32)
        x = gelu_times(x, up, x_ptr.dtype.element_ty).to(tl.float32)
    scale = scale_of(peak_of(x, 0), 1.0, limit)
    value = tl.minimum(tl.maximum(tl.div_rn(x, scale), -limit), limit)
    tl.store(codes_ptr + row * K + k, value.to(tl.float8e4nv), mask=there)
    tl.store(scales_ptr + row, scale)


def errors(n: int, k: int, m: int) -> dict[str, float | bool]:
    """A product of m tokens, some channels 40 times louder, against the definition.

    codes: whether codes and scales are its own; one-hot: whether such tokens read every weight back; fast, slow: the
    largest |sum - definition| of either accumulation beyond the output's own rounding, as a share of Σ|q_x q_w|;
    allowed: the share that `qlibero.kernels.fp8` allows.
    """
    g = torch.Generator("cuda").manual_seed(m)
    x = torch.randn(m, k, device="cuda", generator=g).bfloat16()
    x[:, ::97] *= 40
    w = torch.randn(n, k, device="cuda", generator=g).bfloat16() / k**0.5
    (codes_x, s_x), (defined, s_defined) = quantize(x), quantize_e4m3(x)
    codes_w, s_w = quantize_e4m3(w)
    s_w = s_w.bfloat16().float()
    exact = ((codes_x.double() @ codes_w.double().t()).float() * s_x[:, None] * s_w).double()
    whole = codes_x.double().abs() @ codes_w.double().abs().t() * s_x[:, None] * s_w
    found: dict[str, float | bool] = {
        "codes": torch.equal(codes_x.view(torch.uint8), defined.view(torch.uint8)) and torch.equal(s_x, s_defined)
    }
    kernel = ScaledMm()
    for kernel.fast in (True, False):
        y = kernel.matmul(codes_x, s_x, kernel.pack(codes_w), s_w).double()
        beyond = ((y - exact).abs() - exact.abs() * 2**-8).clamp_min(0)
        found["fast" if kernel.fast else "slow"] = float((beyond / whole).max())
    hot, place = torch.zeros(16, k, device="cuda"), torch.arange(16, device="cuda")
    hot[place, place * 7] = 1.0
    ones = [torch.ones(count, device="cuda") for count in (16, n)]
    read = kernel.matmul(hot.to(torch.float8_e4m3fn), ones[0], kernel.pack(codes_w), ones[1])
    found["one-hot"] = torch.equal(read.float(), codes_w.float()[:, place * 7].t())
    return found | {"allowed": 33 * 2**-13 * -(-k // 32)}


if __name__ == "__main__":
    print("| N×K | tokens | codes are the definition's | one-hot | fast sums | slow sums | allowed |")
    print(f"|{'---|' * 7}")
    for n, k in ((2560, 2048), (2048, 16384), (1152, 4304)):
        for m in (1, 10, 542):
            e = errors(n, k, m)
            numbers = " | ".join(f"{e[name]:.2g}" for name in ("fast", "slow", "allowed"))
            print(f"| {n}×{k} | {m} | {e['codes']} | {e['one-hot']} | {numbers} |", flush=True)
