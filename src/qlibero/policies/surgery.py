"""A model with some modules exchanged, sharing everything else with the original, which stays as it was.

One full-precision policy and several quantized arms live in one process; copying the unquantized two thirds
of the weights for each would cost what quantization saves.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def swap_modules(model: Network, replacements: Mapping[str, nn.Module]) -> Network:
    """A shallow twin of `model` in which each dotted name is the given module. Parameters, buffers and every
    untouched submodule are the same objects in both."""
    by_child: dict[str, dict[str, nn.Module]] = {}
    for name, module in replacements.items():
        child, _, rest = name.partition(".")
        by_child.setdefault(child, {})[rest] = module
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    for child, inner in by_child.items():
        old = twin._modules.get(child)
        if old is None:
            raise KeyError(f"{type(model).__name__} has no submodule {child!r}")
        twin._modules[child] = inner[""] if "" in inner else swap_modules(old, inner)
    return twin


def linear_in(model: nn.Module, name: str) -> nn.Linear:
    """The full-precision linear of that dotted name. TypeError for anything else."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, no nn.Linear")
    return module
