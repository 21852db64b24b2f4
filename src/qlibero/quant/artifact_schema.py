"""What an artifact's metadata and tensors must be for the settings that it names, beyond being whole.

Its hash proves that nothing changed since it was written; this proves that what was written can be what
`quantize` writes: a file with a transform left out, a group renamed or a scale of zero has a right hash too, and other
actions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from qlibero.config.quantization import ROUNDINGS, Quant
from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.errors import GuardRefusal, UserError
from qlibero.policies.structured import Open, Strict, fit, short
from qlibero.quant.nibbles import unpack_nibbles
from qlibero.registry import CorrectionPlugin, MethodPlugin, get

if TYPE_CHECKING:
    from qlibero.quant.artifact import LayerRecord

LARGEST_SCALE = 1e4
ORTHOGONAL_WITHIN = 0.05
"""Of a rotation kept in bfloat16, times its transpose, from the identity."""
SMOOTHING_WITHIN = 0.02
"""Of the mean logarithm of smoothing factors from 0: their geometric mean is 1, but for rounding to bfloat16."""

_Name = Annotated[str, Field(min_length=1, max_length=300)]
_Size = Annotated[int, Field(ge=1, le=2**20)]
_Bytes = Annotated[int, Field(ge=0, le=2**40)]
_Measure = Annotated[float, Field(allow_inf_nan=True)] | None
_Text = Annotated[str, Field(max_length=10_000)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Layer(Strict):
    name: _Name
    group: _Name
    out_features: _Size
    in_features: _Size
    weight_bits: Literal[2, 3, 4, 5, 6, 8]
    activation_bits: Literal[4, 6, 8, 16]
    executed: bool
    method: _Name
    rounding: Literal["nearest", "search", "gptq"]
    tried: dict[Literal["nearest", "search", "gptq"], float] = Field(max_length=3)
    sqnr_db: _Measure
    max_error: _Measure
    outlier_before: _Measure
    outlier_after: _Measure
    codes_bytes: _Bytes
    scales_bytes: _Bytes
    transform_bytes: _Bytes


class _Calibration(Open):
    data_sha256: _Name
    inputs: dict[_Name, _Text] | None = Field(None, max_length=1024)


class Meta(Strict):
    """The metadata of an artifact file."""

    format: int
    spec: JsonObject
    spec_hash: _Hash
    checkpoint_sha256: _Hash
    calibration: _Calibration
    layers: list[_Layer] = Field(min_length=1, max_length=4096)
    corrections: dict[_Name, Annotated[list[float], Field(min_length=1, max_length=1024)]] = Field(max_length=4096)


def require_schema(content: JsonObject, where: str, hint: str) -> Quant:
    """The settings in an artifact's metadata. GuardRefusal for metadata that is none, or contradicts itself."""
    try:
        fit(Meta, content, where)
        spec = Quant.of_identity(content["spec"])
    except UserError as error:
        raise GuardRefusal(f"{where} holds no artifact of this version ({short(str(error))}): {hint}") from None
    if spec.hash != content["spec_hash"]:
        raise GuardRefusal(f"{where}: spec_hash is not the hash of its settings; they were edited: {hint}")
    return spec


def require_consistent(
    spec: Quant,
    layers: Collection[LayerRecord],
    corrections: dict[str, list[float]],
    names: Collection[str],
    tensor: Callable[[str], Tensor],
    where: str,
    hint: str,
) -> None:
    """GuardRefusal where the tensors are not those that `spec` and the layers' records ask for.

    names, tensor: the names of the stored tensors, and how to get one.
    """

    def refuse(what: str) -> None:
        raise GuardRefusal(f"{where}: {what}: {hint}")

    expected: set[str] = set()
    if len({layer.name for layer in layers}) < len(layers):
        refuse("a linear is listed twice")
    widths: dict[str, int] = {}
    alive = {layer.group for layer in layers if layer.executed}
    for layer in layers:
        if layer.activation_bits != spec.activation_bits:
            refuse(f"{layer.name} has {layer.activation_bits}-bit activations, its settings say {spec.activation_bits}")
        if widths.setdefault(layer.group, layer.in_features) != layer.in_features:
            refuse(f"the linears of {layer.group} have inputs of different widths")
        expected |= {f"{layer.name}.codes", f"{layer.name}.scales"}
        expected |= {f"{layer.name}.output_rotation"} if spec.row_rotation else set()
    methods: dict[str, str] = {}
    for layer in layers:
        if fault := _choice_fault(spec, layer, methods.setdefault(layer.group, layer.method), layer.group in alive):
            refuse(f"{layer.name}: {fault}")
    made = {group: get(MethodPlugin, method).factors for group, method in methods.items()}
    expected |= {f"{group}.{factor}" for group, factors in made.items() for factor in factors}
    searched = {f"{group}.importance" for group in widths} if spec.rounding != "nearest" else set()
    expected |= searched & set(names)
    if lost := sorted(expected - set(names)):
        refuse(f"{count_text(len(lost), 'tensor')} missing that {spec.method} makes, first {lost[0]}")
    if strange := sorted(set(names) - expected):
        refuse(f"{count_text(len(strange), 'tensor')} of no linear in it, first {short(strange[0])}")
    for layer in layers:
        if fault := _layer_fault(spec, layer, tensor):
            refuse(f"{layer.name}: {fault}")
    for group, width in widths.items():
        folded = get(MethodPlugin, methods[group]).smooths_first
        for factor in made[group]:
            if fault := _factor_fault(spec, factor, tensor(f"{group}.{factor}"), width, folded):
                refuse(f"{group}.{factor} {fault}")
        if f"{group}.importance" in searched & set(names):
            value = tensor(f"{group}.importance")
            if (
                tuple(value.shape) != (width,)
                or value.dtype != torch.float32
                or not bool(((value >= 0) & value.isfinite()).all())
            ):
                refuse(f"{group}.importance is no vector of {width} mean squares")
    plugins = [get(CorrectionPlugin, name) for name in spec.corrections]
    for name, values in corrections.items():  # which linears they are of, `apply` holds against the policy
        if not any(all(plugin.low <= value <= plugin.high for value in values) for plugin in plugins):
            refuse(f"corrections of {short(name)} are none that its settings can make")


def _choice_fault(spec: Quant, layer: LayerRecord, group_method: str, alive: bool) -> str | None:
    """Of the method and the rounding that a linear's record names."""
    # an input that no action depends on is left as it is by a method that has to see data
    possible = spec.transform.chooses or (spec.method,)
    if layer.method not in possible and (alive or spec.transform.data_free or layer.method != "rtn"):
        return f"its method is {short(layer.method)}, its settings say {spec.method}"
    if layer.method != group_method:
        return "linears with one input have two methods"
    allowed = ROUNDINGS[: ROUNDINGS.index(spec.rounding) + 1]
    if layer.rounding not in allowed or not set(layer.tried) <= set(allowed):
        return f"its rounding is {layer.rounding}, its settings say {spec.rounding}"
    return None


def _layer_fault(spec: Quant, layer: LayerRecord, tensor: Callable[[str], Tensor]) -> str | None:
    n, k = layer.out_features, layer.in_features
    codes, scales = tensor(f"{layer.name}.codes"), tensor(f"{layer.name}.scales")
    floats = spec.number_format in ("nvfp4", "mxfp4") or (spec.number_format == "fp8" and layer.weight_bits == 8)
    nibbles = layer.weight_bits <= 4 and spec.symmetric and not floats
    dtype = torch.float8_e4m3fn if floats else torch.uint8 if nibbles else torch.int8
    shape = (n, k // 2) if nibbles else (n, k)
    if k % 2 and nibbles or tuple(codes.shape) != shape or codes.dtype != dtype:
        return f"codes are {tuple(codes.shape)} {codes.dtype}, expected {shape} {dtype}"
    if fault := _range_fault(spec, layer, unpack_nibbles(codes) if nibbles else codes):
        return fault
    group = spec.scale_group
    grouped = (n,) if group is None else (n, k // group)
    if group and k % group or tuple(scales.shape) != grouped or scales.dtype != torch.bfloat16:
        return f"scales are {tuple(scales.shape)} {scales.dtype}, expected {grouped} torch.bfloat16"
    low, high = (float(value) for value in torch.aminmax(scales.float()))
    if not (0 < low <= high < LARGEST_SCALE):
        return f"scales run from {low:g} to {high:g}; they are positive and small"
    if codes.nbytes != layer.codes_bytes or scales.nbytes != layer.scales_bytes:
        return "its record names other sizes than its tensors have"
    if spec.row_rotation:
        block = spec.block_size if n % spec.block_size == 0 else n
        return _rotation_fault(tensor(f"{layer.name}.output_rotation"), n, block, torch.float32)
    return None


def _range_fault(spec: Quant, layer: LayerRecord, codes: Tensor) -> str | None:
    """Of codes that their bits do not hold."""
    low, high = (float(value) for value in torch.aminmax(codes.float()))
    bits = layer.weight_bits
    if codes.dtype == torch.float8_e4m3fn:
        least, most = (-448.0, 448.0) if spec.number_format == "fp8" else (-6.0, 6.0)
    elif spec.symmetric:
        least, most = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    else:
        least, most = 1 - 2.0**bits, 2.0**bits - 1
    return None if least <= low <= high <= most else f"codes run from {low:g} to {high:g}, beyond {least:g} to {most:g}"


def _factor_fault(spec: Quant, factor: str, value: Tensor, width: int, folded: bool) -> str | None:
    if factor == "order":
        whole = tuple(value.shape) == (width,) and value.dtype == torch.int32
        same = whole and torch.equal(value.sort().values.long(), torch.arange(width))
        return None if same else f"is no permutation of {width} channels"
    if factor == "scale":
        right = tuple(value.shape) == (width,) and value.dtype == torch.float32
        right = right and bool(torch.isfinite(value).all()) and bool((value > 0).all())
        right = right and abs(float(value.double().log().mean())) <= SMOOTHING_WITHIN
        return None if right else f"is no vector of {width} positive factors whose geometric mean is 1"
    if factor == "hadamard":
        right = tuple(value.shape) == (width,) and value.dtype == torch.bfloat16
        right = right and bool((value.abs() > 0).all()) and bool((value.abs() < LARGEST_SCALE**2).all())
        return None if right else f"is no vector of {width} signed factors"
    return _rotation_fault(value, width, spec.block_size, torch.bfloat16, factor == "first" and folded)


def _rotation_fault(value: Tensor, width: int, block: int, dtype: torch.dtype, scaled: bool = False) -> str | None:
    groups = value.shape[0] if value.dim() == 3 else 0
    shared = groups == 1
    if value.dtype != dtype or tuple(value.shape[1:]) != (block, block) or (not shared and groups * block != width):
        return f"has shape {tuple(value.shape)} of {value.dtype}; expected blocks of {block} over {width} channels"
    rows = value.float()
    lengths = rows.norm(dim=2, keepdim=True)
    if not bool(torch.isfinite(lengths).all()) or not bool((lengths > 0).all()):
        return "is no rotation: it has rows of zeros, NaN or infinity"
    if scaled and abs(float(lengths.double().log().mean())) > SMOOTHING_WITHIN:
        return "is no rotation with a smoothing whose geometric mean is 1"
    rows = rows / lengths if scaled else rows
    apart = (rows @ rows.transpose(1, 2) - torch.eye(block)).abs().max()
    return (
        None
        if float(apart) <= ORTHOGONAL_WITHIN
        else f"is no rotation: its rows are {float(apart):.2g} from orthogonal"
    )
