"""The matrix products of pi0.5 and of the compact policies, for trying and timing kernels without a model at hand.

Token counts are one observation's: 542 live prefix positions (968 with the masked third camera and padding), 10 in the
expert's suffix; the compact policies have some 154 and 10. A run's own counts, batches included, come from its policy.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlibero.kernels.contract import GemmShape

QUERY_HEADS = 8  # with one shared key/value head, in every Gemma stack here


@dataclass(frozen=True)
class Layer:
    """A linear to be tried: its name, what it asks of a kernel, and the numbers of tokens it will see."""

    name: str
    shape: GemmShape
    tokens: tuple[int, ...]


# stack: (width, head_dim, mlp width)
PI05 = {"llm": (2048, 256, 16384), "expert": (1024, 256, 4096)}
COMPACT = {
    "XS": {"llm": (192, 32, 512), "expert": (128, 32, 384)},
    "S": {"llm": (192, 32, 512), "expert": (128, 32, 512)},
    "M": {"llm": (256, 32, 768), "expert": (192, 32, 512)},
    "L": {"llm": (256, 32, 1024), "expert": (192, 32, 768)},
    "XL": {"llm": (384, 48, 1536), "expert": (256, 48, 1024)},
}


def pi05_layers(
    weight_bits: int = 4, activation_bits: int = 8, device: str = "cuda", group_size: int | None = None
) -> list[Layer]:
    """Every product that pi0.5's linears make, alone and joined, with the full policy's token counts."""
    return _layers("pi05", PI05, (542, 968), (10,), weight_bits, activation_bits, device, group_size)


def compact_layers(
    weight_bits: int = 4, activation_bits: int = 8, device: str = "cpu", group_size: int | None = None
) -> list[Layer]:
    """The same of every compact policy size."""
    return [
        layer
        for size, stacks in COMPACT.items()
        for layer in _layers(size, stacks, (154,), (10,), weight_bits, activation_bits, device, group_size)
    ]


def _layers(
    policy: str,
    stacks: dict[str, tuple[int, int, int]],
    prefix: tuple[int, ...],
    suffix: tuple[int, ...],
    weight_bits: int,
    activation_bits: int,
    device: str,
    group_size: int | None,
) -> list[Layer]:
    layers = []
    for stack, (width, head_dim, mlp) in stacks.items():
        queries = QUERY_HEADS * head_dim
        sizes = {  # linears that share an input are one product, unless each has an output rotation of its own
            "q+k+v": (queries + 2 * head_dim, width),
            "o": (width, queries),
            "gate+up": (2 * mlp, width),
            "down": (width, mlp),
            "q": (queries, width),
            "k": (head_dim, width),
            "gate": (mlp, width),
        }
        for kind, (n, k) in sizes.items():
            shape = GemmShape(n, k, weight_bits, activation_bits, group_size, device)
            layers.append(Layer(f"{policy}.{stack}.{kind}", shape, prefix if stack == "llm" else suffix))
    return layers
