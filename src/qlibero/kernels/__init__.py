"""Integer matrix products behind one small contract; `contract.py` defines it, `validation.py` enforces it.

A kernel declares itself in its own file (`registry.KernelPlugin`) and is loaded on first use, because some cannot even
be imported without a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from qlibero import registry

if TYPE_CHECKING:
    from qlibero.kernels.contract import Kernel

SIMULATED = "simulated"  # no kernel: what runs a layer in a float format, which is computed as it is defined
DEQUANTIZED = "dequantized"  # no kernel: what runs a layer whose activations are not quantized, an ordinary linear
NO_KERNEL = (DEQUANTIZED, SIMULATED)


def names() -> tuple[str, ...]:
    """Every kernel that needs no path, loadable here or not; `auto` prefers them in this order, when equally fast."""
    return registry.names(registry.KernelPlugin)


def load(name: str) -> Kernel:
    """The kernel called `name`. UserError for an unknown name; of a missing package the kernel's `supports` tells."""
    return cast("Kernel", registry.get(registry.KernelPlugin, name).load()())
