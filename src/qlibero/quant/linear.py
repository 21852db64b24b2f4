"""A quantized linear: transform and round the input once, multiply codes, scale back.

`prepare` is everything that depends on the input alone, so that q/k/v and gate/up share it; `from_prepared` is the
part that a kernel does. Only the kernel differs between backends: the transform and the quantizer above it are this
code in all of them, which is what makes `fake` and a real kernel see identical codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlibero.kernels.contract import Kernel, PackedWeight
from qlibero.quant.transform import InputTransform, block_product


@dataclass(frozen=True)
class Prepared:
    """An input in integers: codes int8 (M, K), scales float32 (M,), and what is needed to shape the outputs."""

    codes: Tensor
    scales: Tensor
    leading: torch.Size
    dtype: torch.dtype


class QuantLinear(nn.Module):
    """Drop-in for `nn.Linear` in inference.

    Attributes:
        transform: the input's change of basis; the same object in every linear that shares the input.
        kernel, packed: the backend and the weight codes in its layout.
        scales: weight scales float32, (N,) or (N, G).
        output_rotation: (N/B, B, B) float32 or None; y = y'·R (weight_pca's row rotation).
    """

    def __init__(
        self,
        transform: InputTransform,
        kernel: Kernel,
        packed: PackedWeight,
        scales: Tensor,
        bias: Tensor | None = None,
        *,
        activation_bits: int = 8,
        activation_clip: float = 1.0,
        output_rotation: Tensor | None = None,
    ):
        super().__init__()
        self.transform, self.kernel, self.packed = transform, kernel, packed
        self.activation_bits, self.activation_clip = activation_bits, activation_clip
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("output_rotation", output_rotation, persistent=False)

    @property
    def in_features(self) -> int:
        return self.packed.k

    @property
    def out_features(self) -> int:
        return self.packed.n

    def prepare(self, x: Tensor) -> Prepared:
        """x (..., K) -> its codes; valid for every linear with the same `transform` object."""
        rows = x.reshape(-1, x.shape[-1])
        codes, scales = self.transform.quantize(rows, self.activation_bits, self.activation_clip)
        return Prepared(codes, scales, x.shape[:-1], x.dtype)

    def from_prepared(self, prepared: Prepared) -> Tensor:
        """(..., N) in the dtype of the input that was prepared."""
        if self.output_rotation is None:
            y = self.kernel.matmul(prepared.codes, prepared.scales, self.packed, self.scales, self.bias, prepared.dtype)
        else:
            y = self.kernel.matmul(prepared.codes, prepared.scales, self.packed, self.scales)
            y = block_product(y, self.output_rotation)
            y = (y if self.bias is None else y + self.bias.float()).to(prepared.dtype)
        return y.view(*prepared.leading, -1)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        return self.from_prepared(self.prepare(x))

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.kernel.name}, A{self.activation_bits}"


def assemble(
    kernel: Kernel,
    shared: InputTransform,
    codes: Tensor,
    scales: Tensor,
    *,
    weight_bits: int,
    activation_bits: int,
    activation_clip: float,
    bias: Tensor | None,
    output_rotation: Tensor | None,
    dtype: torch.dtype,
) -> nn.Module:
    """The module that runs one linear's codes int8 (N, K) and scales (N,) or (N, G), all on one device.

    With 16-bit activations nothing happens online: the codes are dequantized, every rotation is undone in the weights
    and the result is an ordinary linear of `dtype`. It has the error of its bits but saves no memory.
    """
    group_size = None if scales.dim() == 1 else codes.shape[1] // scales.shape[1]
    if activation_bits < 16:
        packed = kernel.pack(codes, weight_bits, group_size)
        return QuantLinear(shared, kernel, packed, scales, bias, activation_bits=activation_bits,
                           activation_clip=activation_clip, output_rotation=output_rotation)
    n, k = codes.shape
    weight = (codes.double().view(n, -1, group_size or k) * scales.double().view(n, -1, 1)).view(n, k)
    if output_rotation is not None:
        weight = block_product(weight.t(), output_rotation.double()).t().contiguous()
    linear = nn.Linear(k, n, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(shared.factors().unweights(weight).to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return linear
