"""One kernel, one layer's shape: is every integer right, at every number of tokens the run will use?

Tolerances prove nothing here: a kernel that ignores a column, unpacks one nibble order wrong or quietly multiplies in
bf16 is within tolerance on random data. So every comparison is for equality with `int_ref`, on data chosen to break:

* every weight code read back by one-hot tokens, compared with what was packed (this does not even need the reference);
* tokens of random codes, all +127, all -127, alternating, zero, a single outlier;
* weights of random codes and of the extremes, no two neighbouring rows alike;
* the epilogue with real scales, with and without bias, in fp32 and in bf16: the same bits as the contract's;
* off-grid activations: quantized here, they must come back as the quantized answer, which is not the float one.

A kernel whose only output is a rounded one (`rounds_to`) is held to the rounded accumulator bit for bit, and with
scales to the two roundings it says it makes. Real activations come later: `try_layer`, on the finished policy.

On CUDA the allocator's memory is poisoned with NaN before each call, so an element that a kernel does not write shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qlibero.console import count_text
from qlibero.kernels.contract import (
    GemmShape,
    Kernel,
    PackedWeight,
    activation_limit,
    epilogue,
    quantize_activations,
    quantize_weights,
    weight_range,
)
from qlibero.kernels.int_ref import IntRef
from qlibero.kernels.known_errors import diagnose_shape, explain

READ_BACK_PRODUCTS = {"cpu": 1 << 32, "cuda": 1 << 42}  # beyond this only a sample of the columns is read back


@dataclass(frozen=True)
class ExactnessResult:
    """What the tests of a kernel found; `reason` says what was proven, or what was wrong and where."""

    ok: bool
    reason: str


class QuantizedInput(Protocol):
    """Codes int8 (M, K) and scales (M,) of a layer's input."""

    @property
    def codes(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor: ...


class QuantizedProduct(Protocol):
    """The packed weight that linears with a common input share, with its scales and bias."""

    @property
    def kernel(self) -> Kernel: ...
    @property
    def packed(self) -> PackedWeight: ...
    @property
    def scales(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...


class QuantizedLayer(Protocol):
    """What `try_layer` takes: rows `start` to `stop` of a product."""

    @property
    def product(self) -> QuantizedProduct: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def output_rotation(self) -> Tensor | None: ...
    def prepare(self, x: Tensor) -> QuantizedInput: ...
    def forward(self, x: Tensor) -> Tensor: ...


class _Wrong(Exception):
    """A comparison failed; the message is the finding."""


def try_kernel(kernel: Kernel, shape: GemmShape, tokens: Sequence[int], seed: int = 0) -> ExactnessResult:
    """Try `kernel` on `shape` at each M in `tokens`. Never raises."""
    support = kernel.supports(shape)
    if not support.ok:
        return ExactnessResult(False, support.reason)
    try:
        with torch.inference_mode():
            generator = torch.Generator(shape.device).manual_seed(seed)
            read = _read_back(kernel, shape, generator)
            for extreme in (False, True):
                codes = _weight_codes(shape, generator, extreme)
                packed = kernel.pack(codes, shape.weight_bits, shape.group_size)
                reference = IntRef().pack(codes, shape.weight_bits, shape.group_size)
                for m in tokens:
                    for x in _token_codes(m, shape, generator):
                        _compare_integers(kernel, x, packed, reference, f"M={m}")
                    _compare_outputs(kernel, m, packed, reference, shape, generator)
    except _Wrong as wrong:
        suspect = diagnose_shape(shape.n, shape.k) if shape.weight_bits <= 4 else None
        return ExactnessResult(False, f"{wrong}. {suspect}" if suspect else str(wrong))
    except Exception as error:  # a kernel may die in any way; a verdict names it, the user decides
        return ExactnessResult(False, explain(error))
    return ExactnessResult(True, f"exact at M = {', '.join(map(str, tokens))}; {read}; {support.reason}")


def try_layer(layer: QuantizedLayer, x: Tensor, codes: Tensor) -> ExactnessResult:
    """A whole quantized linear on real input: did int8 activations really decide its output?

    Linears with a rotated output are tried before that rotation. x (..., K), codes: the layer's own weight codes int8
    (N, K), from the artifact, not from the kernel.
    """
    prepared, product = layer.prepare(x), layer.product
    rows, kernel = slice(layer.start, layer.stop), product.kernel
    reference = IntRef().pack(codes, product.packed.weight_bits, product.packed.group_size)
    acc = IntRef().accumulate(prepared.codes, reference)
    bias = None if product.bias is None else product.bias[rows]
    if layer.output_rotation is None:
        found = layer.forward(x).reshape(acc.shape[-2:])
    else:
        found = kernel.matmul(prepared.codes, prepared.scales, product.packed, product.scales, product.bias)[:, rows]
    same, expected = agrees(kernel, found, acc, prepared.scales, product.scales[rows], bias)
    if not same:
        worst = (found.float() - expected.float()).abs().max().item()
        return ExactnessResult(
            False, f"int8 activations are not what decides this layer's output: largest difference {worst:.3g}"
        )
    return ExactnessResult(True, f"consumes int8 activations ({count_text(prepared.codes.shape[0], 'token')})")


def _read_back(kernel: Kernel, shape: GemmShape, generator: torch.Generator) -> str:
    codes = _weight_codes(shape, generator, extreme=False)
    packed = kernel.pack(codes, shape.weight_bits, shape.group_size)
    wanted = max(1, min(shape.k, READ_BACK_PRODUCTS[shape.device] // (shape.k * shape.n)))
    columns = torch.randperm(shape.k, generator=generator, device=shape.device)[:wanted].sort().values
    found = _one_hot_codes(kernel, packed, columns)
    wrong = (found != codes[:, columns]).nonzero()
    if len(wrong):
        n, c = wrong[0].tolist()
        raise _Wrong(
            f"{len(wrong)} of {found.numel()} weight codes do not read back (first: row {n}, column {int(columns[c])}: "
            f"packed {int(codes[n, columns[c]])}, read {float(found[n, c]):g})"
            + (_constant(found, dim=0) and ", all rows are alike" or "")
        )
    return (
        "every weight code read back"
        if wanted == shape.k
        else f"{wanted} of {count_text(shape.k, 'weight column')} read back"
    )


def _one_hot_codes(kernel: Kernel, packed: PackedWeight, columns: Tensor) -> Tensor:
    """The weight codes (N, len(columns)) as the kernel itself sees them: one one-hot token per column."""
    parts = []
    for part in columns.split(2048 if columns.is_cuda else 256):
        x = torch.zeros((len(part), packed.k), dtype=torch.int8, device=columns.device)
        x[torch.arange(len(part), device=columns.device), part] = 1
        parts.append(_unscaled(kernel, x, packed).t())
    return torch.cat(parts, dim=1)


def _unscaled(kernel: Kernel, x: Tensor, packed: PackedWeight) -> Tensor:
    """`matmul` with unit scales, summed over K-groups: the accumulator by the way that a run takes."""
    ones = torch.ones(x.shape[0], device=x.device)
    groups = () if packed.group_size is None else (packed.k // packed.group_size,)
    _poison(x.shape[0] * packed.n, x.device)
    return kernel.matmul(
        x, ones, packed, torch.ones((packed.n, *groups), device=x.device), None, kernel.rounds_to or torch.float32
    )


def _compare_integers(kernel: Kernel, x: Tensor, packed: PackedWeight, reference: PackedWeight, where: str) -> None:
    expected = IntRef().accumulate(x, reference)
    if kernel.rounds_to is None:
        _poison(x.shape[0] * packed.n, x.device)
        found = kernel.accumulate(x, packed)
        if found.shape != expected.shape or not torch.equal(found.double(), expected.double()):
            raise _Wrong(_describe(found, expected, where))
    total = expected if packed.group_size is None else expected.sum(0)
    found, total = _unscaled(kernel, x, packed), total.float().to(kernel.rounds_to or torch.float32)
    if not torch.equal(found, total):
        raise _Wrong(_describe(found, total, f"{where}, as a run calls it"))


def _compare_outputs(
    kernel: Kernel,
    m: int,
    packed: PackedWeight,
    reference: PackedWeight,
    shape: GemmShape,
    generator: torch.Generator,
) -> None:
    """The epilogue, on off-grid activations: their quantized answer, bit for bit, and not their float one."""
    x = torch.randn((m, shape.k), generator=generator, device=shape.device)
    codes_x, s_x = quantize_activations(x, shape.activation_bits)
    groups = () if shape.group_size is None else (shape.k // shape.group_size,)
    s_w = (torch.rand((shape.n, *groups), generator=generator, device=shape.device) + 0.5).bfloat16().float()
    acc = IntRef().accumulate(codes_x, reference)
    bias = torch.randn(shape.n, generator=generator, device=shape.device)
    cases = ((None, torch.bfloat16), (None, torch.float32), (bias, torch.float32))
    for added, dtype in cases if kernel.rounds_to is None else ((None, kernel.rounds_to), (bias, kernel.rounds_to)):
        _poison(m * shape.n, x.device)
        found = kernel.matmul(codes_x, s_x, packed, s_w, added, dtype)
        same, expected = agrees(kernel, found, acc, s_x, s_w, added)
        if not same:
            raise _Wrong(_describe(found, expected, f"M={m}, scales{'' if added is None else ' and bias'}, {dtype}"))


def _token_codes(m: int, shape: GemmShape, generator: torch.Generator) -> list[Tensor]:
    """As many (M, K) inputs as it takes for every kind of row to occur."""
    limit, k = activation_limit(shape.activation_bits), shape.k
    here: dict[str, Any] = {"dtype": torch.int8, "device": shape.device}
    outlier = torch.zeros(k, **here)
    outlier[torch.randint(k, (1,), generator=generator, device=shape.device)] = limit
    rows = [
        torch.randint(-limit, limit + 1, (k,), generator=generator, **here),
        torch.full((k,), limit, **here),
        torch.full((k,), -limit, **here),
        (torch.arange(k, device=shape.device) % 2 * 2 * limit - limit).to(torch.int8),
        torch.zeros(k, **here),
        outlier,
    ]
    if m >= len(rows):
        random = torch.randint(-limit, limit + 1, (m, k), generator=generator, **here)
        places = torch.randperm(m, generator=generator, device=shape.device)  # never always in the same tile
        random[places[: len(rows)]] = torch.stack(rows)
        return [random]
    return [torch.stack([rows[(start + i) % len(rows)] for i in range(m)]) for start in range(0, len(rows), m)]


def _weight_codes(shape: GemmShape, generator: torch.Generator, extreme: bool) -> Tensor:
    low, high = weight_range(shape.weight_bits)
    if not extreme:
        return torch.randint(
            low, high + 1, (shape.n, shape.k), generator=generator, dtype=torch.int8, device=shape.device
        )
    rows = torch.tensor([low, high, low + 1, high - 1, 0], dtype=torch.int8, device=shape.device)  # a shifted row shows
    return rows[torch.arange(shape.n, device=shape.device) % len(rows)].unsqueeze(1).repeat(1, shape.k)


def _poison(elements: int, device: torch.device) -> None:
    """Leave NaN in the memory that the caching allocator will hand to the kernel's output."""
    if device.type == "cuda":
        torch.full((elements,), float("nan"), device=device)


def agrees(
    kernel: Kernel, found: Tensor, acc: Tensor, s_x: Tensor, s_w: Tensor, bias: Tensor | None
) -> tuple[bool, Tensor]:
    """Whether `found` (M, N) is the contract's output, in found's dtype; and that output.

    A kernel that rounds may do so after each scale, and once more after the bias. How far that can lead depends on the
    product, not on the output: a bias that nearly cancels it leaves its rounding as large as it was.
    """
    exact = epilogue(acc, s_x, s_w, bias)
    expected = exact.to(found.dtype)
    if kernel.rounds_to is None:
        return found.shape == expected.shape and torch.equal(found, expected), expected
    unit = torch.finfo(kernel.rounds_to).eps / 2
    product = (exact if bias is None else epilogue(acc, s_x, s_w)).abs()
    allowed = product * (2 * unit + unit * unit)
    if bias is not None:
        allowed = allowed + unit * (exact.abs() + allowed)
    allowed = allowed + torch.finfo(kernel.rounds_to).tiny
    return found.shape == expected.shape and bool(((found.float() - exact).abs() <= allowed).all()), expected


def _constant(x: Tensor, dim: int) -> bool:
    return x.shape[dim] > 1 and bool((x == x.narrow(dim, 0, 1)).all())


def _describe(found: Tensor, expected: Tensor, where: str) -> str:
    if found.shape != expected.shape:
        return f"{where}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    differ = found.double() != expected.double()
    differ |= found.isnan() if found.is_floating_point() else False
    first = differ.nonzero()[0].tolist()
    hints = []
    if found.dim() == 2 and _constant(found, dim=1):
        hints.append("all output columns are alike")
    if not torch.isfinite(found.double()).all():
        hints.append("some outputs were never written or are not finite")
    return (
        f"{where}: {int(differ.sum())} of {count_text(differ.numel(), 'result')} wrong (first at {first}: "
        f"{found[tuple(first)].item():g}, right is {expected[tuple(first)].item():g})"
        + "".join(f"; {hint}" for hint in hints)
    )


def quantized_weight(n: int, k: int, bits: int, group_size: int | None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A Gaussian layer's codes and scales, for timing and tests."""
    generator = torch.Generator().manual_seed(seed)
    return quantize_weights(torch.randn((n, k), generator=generator) / k**0.5, bits, group_size)
