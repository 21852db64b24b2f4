"""Which linears are quantized: named layouts, regexes, per-layer bits, with every count asserted.

The code this grew from matched zero layers when a pattern missed a `.model.` and went on in full precision;
here a pattern that matches nothing, or a named layout whose count is not what the model's depth says, is an
error. Names are openpi's, so one layout serves the 3.35 B checkpoint (126/126/180/252) and the embedded
policy alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from qlibero.errors import UserError
from qlibero.quant.patterns import matching
from qlibero.quant.spec import QuantSpec

LLM = "paligemma_with_expert.paligemma.model.language_model.layers."
EXPERT = "paligemma_with_expert.gemma_expert.model.layers."
VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
#: layout -> ((stem, linears of one decoder layer), …)
NAMED = {
    "llm": ((LLM, ATTENTION + MLP),),
    "expert": ((EXPERT, ATTENTION + MLP),),
    "llm+expert_mlp": ((LLM, ATTENTION + MLP), (EXPERT, MLP)),
    "llm+expert": ((LLM, ATTENTION + MLP), (EXPERT, ATTENTION + MLP)),
}
#: what may be quantized at all: linears that the model only ever calls. Projector, adaptive norms and heads
#: are not among them; they are 1.7 % of the parameters, and the model reads their dtype
QUANTIZABLE = r"\.layers\.\d+\.(self_attn|mlp)\.\w+$"
#: linears that read the same input, and so share one transform and one set of codes
SHARED_INPUT = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
}
#: linears of the last LLM layer that no action depends on: the sampler reads only that layer's K and V
UNREAD_IN_LAST_LLM_LAYER = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Choice:
    """One selected linear. `group` names the input it shares; `executed` is False where no action depends on it."""

    name: str
    group: str
    weight_bits: int
    activation_bits: int
    executed: bool


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


def select(model: nn.Module, spec: QuantSpec) -> Selection:
    """The linears that `spec` names in `model` (parameters may live on the meta device).

    Raises:
        UserError: a pattern matches nothing, a named layout's count is wrong for this depth, or a width does
            not divide into the spec's blocks or groups.
    """
    linears = {
        name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(QUANTIZABLE, name)
    }
    chosen = set(_named(linears, spec.layout) if spec.layout else ())
    for pattern in spec.include:
        where = "any linear of LLM, expert or vision layers (projector, norms and heads are never quantized)"
        chosen.update(_matching(pattern, linears, "include", where))
    for pattern in spec.exclude:
        chosen.difference_update(_matching(pattern, sorted(chosen), "exclude", "any selected linear"))
    bits = dict.fromkeys(chosen, spec.weight_bits)
    for pattern, exception in spec.per_layer_bits:
        bits.update(
            dict.fromkeys(_matching(pattern, sorted(chosen), "per_layer_bits", "any selected linear"), exception)
        )
    choices, kept = [], []
    depth = _depth(linears, LLM)
    for name, linear in linears.items():
        if name not in chosen:
            continue
        if bits[name] == 16:
            kept.append(name)
            continue
        _check_width(name, linear, spec)
        choices.append(Choice(name, _group(name), bits[name], spec.activation_bits, _executed(name, depth)))
    if not choices:
        raise UserError("quant: layout, include, exclude and per_layer_bits together leave no linear to quantize")
    return Selection(tuple(choices), tuple(kept))


def part_of(name: str) -> str:
    """Whose rows a linear multiplies: those of the "llm", of the action "expert" or of the "vision" tower."""
    return "expert" if name.startswith(EXPERT) else "vision" if name.startswith(VISION) else "llm"


def _named(linears: dict[str, nn.Linear], layout: str) -> list[str]:
    found = []
    for stem, kinds in NAMED[layout]:
        depth = _depth(linears, stem)
        names = [name for name in linears if name.startswith(stem) and name.rsplit(".", 1)[-1] in kinds]
        if depth == 0 or len(names) != depth * len(kinds):
            raise UserError(
                f"layout {layout}: found {len(names)} linears under {stem}, expected {depth} layers × "
                f"{len(kinds)} = {depth * len(kinds)}; this model does not use openpi's names "
                "(see `qlibero checkpoint verify`)"
            )
        found.extend(names)
    return found


def _depth(names, stem: str) -> int:
    indices = {int(name[len(stem) :].split(".", 1)[0]) for name in names if name.startswith(stem)}
    return max(indices) + 1 if indices else 0


def _matching(pattern: str, names, key: str, where: str) -> list[str]:
    found = matching(pattern, names, key)
    if not found:
        raise UserError(
            f"quant.{key}: {pattern!r} does not match {where}; names look like {next(iter(names), '(none)')}"
        )
    return found


def _executed(name: str, depth: int) -> bool:
    last = f"{LLM}{depth - 1}."
    return not (name.startswith(last) and name.rsplit(".", 1)[-1] in UNREAD_IN_LAST_LLM_LAYER)


def _group(name: str) -> str:
    parent, _, kind = name.rpartition(".")
    return f"{parent}.{SHARED_INPUT[kind]}" if kind in SHARED_INPUT else name


def _check_width(name: str, linear: nn.Linear, spec: QuantSpec) -> None:
    width = linear.in_features
    if spec.method in ("duquant", "weight_pca", "hadamard") and width % spec.block_size:
        raise UserError(
            f"quant.block_size {spec.block_size} does not divide the {width} inputs of {name}; "
            "write a divisor, or exclude the layer"
        )
    if spec.group_size and width % spec.group_size:
        raise UserError(
            f"quant.group_size {spec.group_size} does not divide the {width} inputs of {name}; "
            "write a divisor, null, or exclude the layer"
        )
