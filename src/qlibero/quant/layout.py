"""Which linears are quantized: the policy's named layouts, regexes, per-layer bits; and which a correction scales.

The code this grew from matched zero layers when a pattern missed a `.model.` and went on in full precision;
here a pattern that matches nothing, or a named layout that is not whole, is an error. What linears there are, and what
they are called, only the policy knows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qlibero.config.quantization import Quant
from qlibero.errors import UserError
from qlibero.policies.base import Attention, Quantizable, QuantizablePolicy
from qlibero.policies.surgery import linear_in
from qlibero.quant.patterns import matching
from qlibero.registry import CorrectionPlugin, get


@dataclass(frozen=True)
class Choice:
    """One selected linear. `group` names the input it shares; `executed` is False where no action depends on it;
    `block` the layer of the network that it is part of."""

    name: str
    group: str
    weight_bits: int
    activation_bits: int
    executed: bool
    block: str = ""


@dataclass(frozen=True)
class Selection:
    """All selected linears in model order. `kept` are those that per-layer bits sent back to full precision."""

    choices: tuple[Choice, ...]
    kept: tuple[str, ...]

    @property
    def executed(self) -> tuple[Choice, ...]:
        """Those whose kernel will really run, which is what validation has to expect."""
        return tuple(choice for choice in self.choices if choice.executed)

    def groups(self) -> dict[str, list[Choice]]:
        """Choices by shared input."""
        found: dict[str, list[Choice]] = {}
        for choice in self.choices:
            found.setdefault(choice.group, []).append(choice)
        return found


def select(network: Quantizable, spec: Quant) -> Selection:
    """The linears that `spec` names in the network (parameters may live on the meta device).

    Raises:
        UserError: a pattern matches nothing, the policy has no such layout or not all of it, or a width does
            not divide into the spec's blocks or groups.
    """
    linears = network.linears()
    chosen = set(network.layout(spec.layout) if spec.layout else ())
    for pattern in spec.include:
        where = "any linear that this policy lets be quantized (projector, norms and heads are never quantized)"
        chosen.update(_matching(pattern, linears, "include", where))
    for pattern in spec.exclude:
        chosen.difference_update(_matching(pattern, sorted(chosen), "exclude", "any selected linear"))
    bits: dict[str, int] = dict.fromkeys(chosen, spec.weight_bits)
    for pattern, exception in spec.per_layer_bits.items():
        bits.update(
            dict.fromkeys(_matching(pattern, sorted(chosen), "per_layer_bits", "any selected linear"), exception)
        )
    choices, kept = [], []
    for name, linear in linears.items():
        if name not in chosen:
            continue
        if bits[name] == 16:
            kept.append(name)
            continue
        _check_width(name, linear_in(network.model, name).in_features, spec)
        choices.append(Choice(name, linear.group, bits[name], spec.activation_bits, linear.executed, linear.block))
    if not choices:
        raise UserError("quant: layout, include, exclude and per_layer_bits together leave no linear to quantize")
    return Selection(tuple(choices), tuple(kept))


@dataclass(frozen=True)
class Scaled:
    """What a correction does to a linear: its output rows, in `factors` equal parts, are multiplied by one each."""

    correction: CorrectionPlugin
    attention: Attention
    factors: int


def scaled(policy: QuantizablePolicy, spec: Quant) -> dict[str, Scaled]:
    """The linears that the spec's corrections may scale, by name; of attentions that a chunk depends on."""
    found: dict[str, Scaled] = {}
    for name in spec.corrections:
        plugin = get(CorrectionPlugin, name)
        for each in policy.attentions():
            of_query = plugin.scales == "query"
            linear = each.query if of_query else each.output
            found[linear] = Scaled(plugin, each, each.heads if of_query else 1)
    return found


def _matching(pattern: str, names: Iterable[str], key: str, where: str) -> list[str]:
    found = matching(pattern, names, key)
    if not found:
        raise UserError(
            f"quant.{key}: {pattern!r} does not match {where}; names look like {next(iter(names), '(none)')}"
        )
    return found


def _check_width(name: str, width: int, spec: Quant) -> None:
    if spec.transform.blocks and width % spec.block_size:
        raise UserError(
            f"quant.block_size {spec.block_size} does not divide the {width} inputs of {name}; "
            "write a divisor, or exclude the layer"
        )
    if spec.group_size and width % spec.group_size:
        raise UserError(
            f"quant.group_size {spec.group_size} does not divide the {width} inputs of {name}; "
            "write a divisor, null, or exclude the layer"
        )
