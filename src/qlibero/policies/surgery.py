"""A model with some modules exchanged, sharing everything else with the original, which stays as it was.

One full-precision policy and several quantized arms live in one process; copying the unquantized two thirds
of the weights for each would cost what quantization saves.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn


def swap_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow twin of `model` in which each dotted name is the given module. Parameters, buffers and every
    untouched submodule are the same objects in both."""
    by_child: dict[str, dict[str, nn.Module]] = {}
    for name, module in replacements.items():
        child, _, rest = name.partition(".")
        by_child.setdefault(child, {})[rest] = module
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    for child, inner in by_child.items():
        if child not in twin._modules:
            raise KeyError(f"{type(model).__name__} has no submodule {child!r}")
        twin._modules[child] = inner[""] if "" in inner else swap_modules(twin._modules[child], inner)
    return twin
