"""A linear whose activations are floats of few bits, computed as its format defines it (`number_formats.py`), in
float64."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from qlibero.quant.linear import Weights
from qlibero.quant.number_formats import quantize_floats
from qlibero.quant.transform import InputTransform


class FloatLinear(nn.Module):
    """Drop-in for `nn.Linear` in inference. `weight` (N, K) float64: codes times their groups' scales, or the codes
    alone with one scale a row, which multiplies the exact sum as `kernels/fp8.py` has it."""

    weight: Tensor
    scales: Tensor | None
    bias: Tensor | None

    def __init__(self, transform: InputTransform, part: Weights, number_format: str, clip: float):
        super().__init__()
        self.transform, self.number_format, self.clip = transform, number_format, clip
        codes, scales = part.codes.double(), part.scales
        rows = scales.dim() == 1
        if not rows:
            n, groups = scales.shape
            codes = (codes.view(n, groups, -1) * scales.double().unsqueeze(-1)).view(codes.shape)
        self.register_buffer("weight", codes, persistent=False)
        self.register_buffer("scales", scales if rows else None, persistent=False)
        self.register_buffer("bias", None if part.bias is None else part.bias.float(), persistent=False)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N) in x's dtype."""
        elements, s_x = quantize_floats(self.transform(x.reshape(-1, x.shape[-1])), self.number_format, self.clip)
        y = (elements @ self.weight.t()).float() * s_x.unsqueeze(1)
        y = y if self.scales is None else y * self.scales
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.number_format}"


def assemble_floats(
    shared: InputTransform, parts: Sequence[Weights], number_format: str, clip: float
) -> list[nn.Module]:
    """`linear.assemble` for a float format: each linear by itself."""
    return [FloatLinear(shared, part, number_format, clip) for part in parts]
