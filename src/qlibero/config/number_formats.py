"""Which bits a number format has, and what cannot be asked of it together."""

from __future__ import annotations

from typing import Any, Literal

from qlibero.config.fields import FieldError

NumberFormat = Literal["int", "fp8", "nvfp4", "mxfp4"]
#: weight bits and activation bits of each; 16-bit activations are weight-only quantization
BITS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "int": ((2, 3, 4, 5, 6, 8), (4, 6, 8, 16)),
    "fp8": ((4, 8), (8,)),
    "nvfp4": ((4,), (4, 16)),
    "mxfp4": ((4,), (4, 16)),
}
#: channels that share a scale where the format says so
SCALE_GROUP = {"nvfp4": 16, "mxfp4": 32}


def require_of_format(quant: Any) -> None:
    """Raises FieldError for bits, groups, zero points or rotations that a `quantization.Quant`'s format has not."""
    name = quant.number_format
    for key, allowed in zip(("weight_bits", "activation_bits"), BITS[name], strict=True):
        if getattr(quant, key) not in allowed:
            known = " or ".join(map(str, allowed))
            raise FieldError((key,), f"{name} has {key} {known}, not {getattr(quant, key)}")
    for pattern, bits in quant.per_layer_bits.items():
        if bits not in (*BITS[name][0], 16):
            raise FieldError(
                ("per_layer_bits", pattern), f"{name} has weights of {' or '.join(map(str, BITS[name][0]))} bits"
            )
    integer_weights = name == "int" or (name == "fp8" and quant.weight_bits == 4)
    if quant.group_size is not None and not integer_weights:
        raise FieldError(("group_size",), f"is for integer weights; {name} says itself what shares a scale")
    if quant.row_rotation and name != "int":
        raise FieldError(("row_rotation",), f"has no {name} layer; write number_format: int")
    if not quant.symmetric and (name != "int" or 8 in (quant.weight_bits, *quant.per_layer_bits.values())):
        raise FieldError(
            ("symmetric",),
            "false is for integer weights of at most 6 bits: with its zero point taken off an 8-bit code needs 9",
        )
