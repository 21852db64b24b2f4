"""A quantized linear: transform and round the input once, multiply codes, scale back.

`prepare` is everything that depends on the input alone, so that q/k/v and gate/up share it; `from_prepared`
is the part that a kernel does. Linears that share an input also share one product: their codes lie below one
another in one packed weight, the first that is asked multiplies for all and each takes its columns. Rows are
independent, so no number depends on it; three small products become one.

Only the kernel differs between backends: the transform and the quantizer above it are this code in all of
them, which is what makes `fake` and a real kernel see identical codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from qlibero.kernels.contract import Kernel, PackedWeight
from qlibero.kernels.tiled import untile
from qlibero.quant.transform import InputTransform, block_product


@dataclass(frozen=True)
class Weights:
    """One linear as an artifact has it: codes int8 (N, K), scales float32 (N,) or (N, G), bias (N,) or None,
    and `output_rotation` (N/B, B, B) float32 or None with y = y'·R (weight_pca's row rotation)."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None = None
    output_rotation: Tensor | None = None


class Product(nn.Module):
    """Packed codes of the linears that share an input, one kernel call for all of them."""

    scales: Tensor
    bias: Tensor | None

    def __init__(self, kernel: Kernel, packed: PackedWeight, scales: Tensor, bias: Tensor | None):
        super().__init__()
        self.kernel, self.packed = kernel, packed
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @property
    def nbytes(self) -> int:
        """Live bytes of the packed codes."""
        return self.packed.nbytes


@dataclass
class Prepared:
    """An input in integers: codes int8 (M, K) or their image (`kernels/tiled.py`), scales float32 (M,), what is needed
    to shape the outputs, and the products that have been taken of it."""

    written: Tensor
    in_tiles: bool
    scales: Tensor
    leading: torch.Size
    dtype: torch.dtype
    products: dict[int, Tensor] = field(default_factory=dict)

    @property
    def codes(self) -> Tensor:
        """The codes row by row, (M, K)."""
        return untile(self.written, len(self.scales)) if self.in_tiles else self.written

    def product(self, of: Product) -> Tensor:
        """(..., N of all linears of the product) in the input's dtype; computed the first time it is asked for."""
        y = self.products.get(id(of))
        if y is None:
            y = self.products[id(of)] = self.multiply(of, of.bias, self.dtype).view(*self.leading, -1)
        return y

    def multiply(self, of: Product, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """(M, N) in `dtype`; in the layout that the codes were written in where the kernel takes it."""
        direct = self.in_tiles and of.kernel.in_tiles
        matmul, codes = (of.kernel.matmul_tiles, self.written) if direct else (of.kernel.matmul, self.codes)
        return matmul(codes, self.scales, of.packed, of.scales, bias, dtype)


class QuantLinear(nn.Module):
    """Drop-in for `nn.Linear` in inference: rows `start` to `stop` of a product.

    Attributes:
        transform: the input's change of basis; the same object in every linear that shares the input.
        product: the same object in every linear that is multiplied together with this one.
    """

    output_rotation: Tensor | None
    late_bias: Tensor | None

    def __init__(
        self,
        transform: InputTransform,
        product: Product,
        start: int,
        stop: int,
        *,
        activation_bits: int,
        activation_clip: float,
        output_rotation: Tensor | None = None,
        late_bias: Tensor | None = None,
    ):
        super().__init__()
        self.transform, self.product, self.start, self.stop = transform, product, start, stop
        self.activation_bits, self.activation_clip = activation_bits, activation_clip
        self.register_buffer("output_rotation", output_rotation, persistent=False)
        self.register_buffer("late_bias", late_bias, persistent=False)

    @property
    def in_features(self) -> int:
        return self.product.packed.k

    @property
    def out_features(self) -> int:
        return self.stop - self.start

    def prepare(self, x: Tensor) -> Prepared:
        """x (..., K) -> its codes; valid for every linear with the same `transform` object."""
        rows, in_tiles = x.reshape(-1, x.shape[-1]), self.product.kernel.in_tiles
        codes, scales = self.transform.quantize(rows, self.activation_bits, self.activation_clip, in_tiles=in_tiles)
        return Prepared(codes, in_tiles, scales, x.shape[:-1], x.dtype)

    def takes_gated(self, device: torch.device) -> bool:
        """Whether `of_gated` saves a pass over the input there; else it is not to be called."""
        return self.transform.takes_gated(device)

    def of_gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """This linear of gelu_tanh(gate)·up, each (..., K), which is computed on the way to the codes."""
        in_tiles = self.product.kernel.in_tiles
        codes, scales = self.transform.quantize_gated(
            gate.reshape(-1, gate.shape[-1]),
            up.reshape(-1, up.shape[-1]),
            self.activation_bits,
            self.activation_clip,
            in_tiles=in_tiles,
        )
        return self.from_prepared(Prepared(codes, in_tiles, scales, gate.shape[:-1], gate.dtype))

    def from_prepared(self, prepared: Prepared) -> Tensor:
        """(..., N) in the dtype of the input that was prepared."""
        if self.output_rotation is not None:
            return self._rotated(prepared, self.output_rotation)
        return prepared.product(self.product).narrow(-1, self.start, self.stop - self.start)

    def precedes(self, *others: nn.Module) -> bool:
        """Whether `others` are quantized linears whose rows follow these, in their order, in the same product."""
        stop = self.stop
        for other in others:
            if not isinstance(other, QuantLinear) or other.product is not self.product or other.start != stop:
                return False
            stop = other.stop
        return self.output_rotation is None

    def joined(self, x: Tensor, last: QuantLinear) -> Tensor:
        """x (..., K) -> the outputs of this linear to `last` side by side, where one precedes the other: no copy."""
        return self.prepare(x).product(self.product).narrow(-1, self.start, last.stop - self.start)

    def _rotated(self, prepared: Prepared, rotation: Tensor) -> Tensor:
        y = block_product(prepared.multiply(self.product), rotation)
        y = y if self.late_bias is None else y + self.late_bias
        return y.to(prepared.dtype).view(*prepared.leading, -1)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        return self.from_prepared(self.prepare(x))

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.product.kernel.name}, A{self.activation_bits}"


def assemble(
    kernel: Kernel | None,
    shared: InputTransform,
    parts: Sequence[Weights],
    *,
    weight_bits: int,
    activation_bits: int,
    activation_clip: float,
    dtype: torch.dtype,
) -> list[nn.Module]:
    """The modules that run linears with a common input, all on one device; one product for all of them.

    With 16-bit activations nothing happens online: the codes are dequantized, every rotation is undone in the
    weights and the results are ordinary linears of `dtype`. They have the error of their bits but save no
    memory, and `kernel` is None.
    """
    if activation_bits == 16:
        assert kernel is None
        return [_dequantized(shared, part, dtype) for part in parts]
    assert kernel is not None
    made = partial(QuantLinear, activation_bits=activation_bits, activation_clip=activation_clip)
    if any(part.output_rotation is not None for part in parts):  # rotated outputs need the product before its bias
        return [
            made(
                shared,
                _product(kernel, [Weights(part.codes, part.scales)], weight_bits),
                0,
                len(part.codes),
                output_rotation=part.output_rotation,
                late_bias=None if part.bias is None else part.bias.float(),
            )
            for part in parts
        ]
    modules: list[nn.Module] = []
    product, start = _product(kernel, parts, weight_bits), 0
    for part in parts:
        modules.append(made(shared, product, start, start + len(part.codes)))
        start += len(part.codes)
    return modules


def _product(kernel: Kernel, parts: Sequence[Weights], weight_bits: int) -> Product:
    codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
    biases = [part.bias for part in parts]
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat(
            [torch.zeros(len(p.codes), device=codes.device) if p.bias is None else p.bias.float() for p in parts]
        )
    return Product(kernel, kernel.pack(codes, weight_bits, _group_size(codes, scales)), scales, bias)


def _dequantized(shared: InputTransform, part: Weights, dtype: torch.dtype) -> nn.Linear:
    n, k = part.codes.shape
    group = _group_size(part.codes, part.scales) or k
    weight = (part.codes.double().view(n, -1, group) * part.scales.double().view(n, -1, 1)).view(n, k)
    if part.output_rotation is not None:
        weight = block_product(weight.t(), part.output_rotation.double()).t().contiguous()
    linear = nn.Linear(k, n, bias=part.bias is not None, device="meta")
    linear.weight = nn.Parameter(shared.factors().unweights(weight).to(dtype), requires_grad=False)
    if part.bias is not None:
        linear.bias = nn.Parameter(part.bias.to(dtype), requires_grad=False)
    return linear


def _group_size(codes: Tensor, scales: Tensor) -> int | None:
    return None if scales.dim() == 1 else codes.shape[1] // scales.shape[1]
