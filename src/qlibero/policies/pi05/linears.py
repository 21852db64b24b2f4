"""The linears of a network with openpi's names: which may be quantized, what they share, what runs, the named layouts.

Names are openpi's, so one list serves the 3.35 B checkpoint (126/126/180/252), the embedded policy, and pi0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from qlibero.console import count_text
from qlibero.errors import UserError
from qlibero.policies.base import Attention, Linear
from qlibero.policies.pi05.config import Pi05Config

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
_LAYER = re.compile(r"(\.layers\.\d+)\..*")
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
class Network:
    """A network without the policy around it: enough to select its linears (`base.Quantizable`)."""

    model: nn.Module

    def linears(self) -> dict[str, Linear]:
        return linears(self.model)

    def layout(self, name: str) -> list[str]:
        return layout(self.model, name)


def linears(model: nn.Module) -> dict[str, Linear]:
    """Every linear that may be quantized, in the model's order (parameters may live on the meta device)."""
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(QUANTIZABLE, name)]
    last = f"{LLM}{_depth(names, LLM) - 1}."
    return {
        name: Linear(
            name,
            _group(name),
            part_of(name),
            executed=not (name.startswith(last) and _kind(name) in UNREAD_IN_LAST_LLM_LAYER),
            block=_LAYER.sub(r"\1", name),
        )
        for name in names
    }


def layout(model: nn.Module, name: str) -> list[str]:
    """The linears of a named layout. UserError for an unknown name, or when a count is not what the depth says."""
    if name not in NAMED:
        raise UserError(f"quant.layout: {name!r} is not known to this policy; write one of {', '.join(NAMED)}")
    there = linears(model)
    found: list[str] = []
    for stem, kinds in NAMED[name]:
        depth = _depth(there, stem)
        names = [each for each in there if each.startswith(stem) and _kind(each) in kinds]
        if depth == 0 or len(names) != depth * len(kinds):
            raise UserError(
                f"layout {name}: found {count_text(len(names), 'linear')} under {stem}, expected "
                f"{count_text(depth, 'layer')} × "
                f"{len(kinds)} = {depth * len(kinds)}; this model does not use openpi's names "
                "(see `qlibero checkpoint verify`)"
            )
        found.extend(names)
    return found


def attentions(config: Pi05Config) -> list[Attention]:
    """In the order in which a chunk first meets them; the last LLM layer has no attention of its own."""
    depth = config.llm.depth
    stems = [(f"{LLM}{i}.self_attn", config.llm.num_heads) for i in range(depth - 1)]
    stems += [(f"{EXPERT}{i}.self_attn", config.expert.num_heads) for i in range(depth)]
    return [Attention(stem, f"{stem}.q_proj", f"{stem}.o_proj", heads) for stem, heads in stems]


def part_of(name: str) -> str:
    """Whose rows a linear multiplies: those of the "llm", of the action "expert" or of the "vision" tower."""
    return "expert" if name.startswith(EXPERT) else "vision" if name.startswith(VISION) else "llm"


def _kind(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _depth(names: Iterable[str], stem: str) -> int:
    indices = {int(name[len(stem) :].split(".", 1)[0]) for name in names if name.startswith(stem)}
    return max(indices) + 1 if indices else 0


def _group(name: str) -> str:
    parent, _, kind = name.rpartition(".")
    return f"{parent}.{SHARED_INPUT[kind]}" if kind in SHARED_INPUT else name
