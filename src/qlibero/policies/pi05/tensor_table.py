"""Which tensor of a checkpoint's files is which of the network's: by name, shape and type, strictly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from qlibero.console import count_text
from qlibero.policies.pi05.architecture import EMBEDDING, TIED, strip
from qlibero.policies.pi05.unreadable import other_network
from qlibero.policies.pi05.weights import FLOATING

if TYPE_CHECKING:
    from qlibero.policies.pi05.checkpoint import Checkpoint

_UNUSED = (TIED, "paligemma_with_expert.gemma_expert.lm_head.weight")
_LISTED = 8
"""Tensors named in a message before "and n more"."""


@dataclass(frozen=True)
class TensorTable:
    """How the file's tensors map to the network's: `source[name]` is the file's name of a network tensor."""

    source: dict[str, str]
    missing: list[str]
    extra: list[str]
    misshapen: list[str]
    notes: list[str]
    twins: list[str] = field(default_factory=list)
    """Names of the file that mean the same tensor, one line for each pair."""
    mistyped: list[str] = field(default_factory=list)
    other: str | None = None
    """What network this is instead, if that is known."""

    @property
    def problems(self) -> list[str]:
        """Human-readable, empty when the file fits."""
        found = [self.other] if self.other else []
        for word, names in (
            ("missing", self.missing),
            ("extra", self.extra),
            ("of another shape", self.misshapen),
            (f"of another type than {', '.join(FLOATING)}", self.mistyped),
            ("twice", self.twins),
        ):
            if names:
                found.append(f"{count_text(len(names), 'tensor')} {word}: {listed(names)}")
        return found


def tensor_table(checkpoint: Checkpoint) -> TensorTable:
    """Match the file's names, shapes and types with the network's, by loader rules (prefixes, tied embedding, unused
    heads)."""
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in checkpoint.family.model(checkpoint.config).state_dict().items()}
    notes, twins = [], []
    shapes, dtypes = checkpoint.weights.shapes, checkpoint.weights.dtypes
    renamed: dict[str, str] = {}
    for name in shapes:
        twin = renamed.setdefault(strip(name), name)
        if twin != name:
            twins.append(f"{twin} and {name}")
    prefixes = sorted({name.removesuffix(strip(name)) or "_orig_mod." for name in shapes if strip(name) != name})
    if prefixes:
        notes.append(f"prefix {', '.join(f'`{prefix}`' for prefix in prefixes)} removed")
    if EMBEDDING not in renamed and TIED in renamed:
        renamed[EMBEDDING] = renamed[TIED]
        notes.append("token embedding taken from lm_head (tied weights)")
    for name in _UNUSED:
        if renamed.pop(name, None):
            notes.append(f"{name} dropped: never used for actions")
    missing = [name for name in wanted if name not in renamed]
    extra = [name for name in renamed if name not in wanted]
    misshapen = [
        f"{name} {shapes[renamed[name]]}, expected {shape}"
        for name, shape in wanted.items()
        if name in renamed and shapes[renamed[name]] != shape
    ]
    source = {name: renamed[name] for name in wanted if name in renamed}
    mistyped = [f"{name} {dtypes[of]}" for name, of in source.items() if dtypes[of] not in FLOATING]
    other = other_network(map(strip, extra), checkpoint.family.name) if extra else None
    return TensorTable(source, missing, extra, misshapen, notes, twins, mistyped, other)


def faulty(faults: dict[str, str]) -> str:
    """{tensor: what is wrong with its numbers} as a sentence."""
    kinds = sorted(set(faults.values()))
    return "; ".join(
        f"{count_text(len(names), 'tensor')} with {kind}: {listed(names)}"
        for kind in kinds
        for names in [[name for name, fault in faults.items() if fault == kind]]
    )


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"
