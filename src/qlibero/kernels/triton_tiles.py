"""Which tile the Triton product uses for which number of tokens. Reasoned, not searched: a search at run time would
make latency depend on luck, and its winner would have to be validated again. `qlibero kernels bench` tries
`CANDIDATES`.

Few tokens (an expert's step has 10): the product reads weights and little else, so the grid must fill the GPU; K is cut
until it does. Many tokens (a prefix has some 540 or 968): arithmetic rules, tiles are large and K is whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MAX_SPLITS = 16


@dataclass(frozen=True)
class Tile:
    """One launch shape: tokens × outputs × packed bytes along K per step, and how many ways K is cut."""

    tokens: int
    outputs: int
    depth: int  # packed bytes, two codes each
    split_k: int = 1
    warps: int = 4
    stages: int = 4


# (most tokens, tile); the last one takes everything above.
BUCKETS = (
    (16, Tile(16, 64, 128, stages=5)),
    (32, Tile(32, 64, 128, stages=4)),
    (128, Tile(64, 64, 128, stages=4)),
    (1 << 62, Tile(128, 128, 64, warps=4, stages=3)),
)
# Of many tokens: where large tiles would leave processors without work; where groups take a second accumulator.
NARROW = Tile(64, 64, 128, warps=4, stages=3)
GROUPED = Tile(128, 128, 64, warps=8, stages=4)

# What the benchmark may try beyond the bucket's own tile. Bounded on purpose.
CANDIDATES = {
    16: (
        Tile(16, 64, 128, stages=5),
        Tile(16, 128, 128, stages=4),
        Tile(16, 64, 256, stages=3),
        Tile(16, 32, 256, warps=2),
    ),
    32: (Tile(32, 64, 128), Tile(32, 128, 128, stages=3)),
    128: (Tile(64, 64, 128), Tile(64, 128, 64), Tile(128, 64, 64), Tile(64, 128, 128, warps=8, stages=3)),
    1 << 62: (
        Tile(128, 128, 64, warps=4, stages=3),
        NARROW,
        GROUPED,
        Tile(256, 64, 64, warps=8),
        Tile(256, 128, 64, warps=8, stages=3),
        Tile(128, 128, 128, warps=8, stages=3),
    ),
}


def bucket(tokens: int) -> int:
    """The bucket's upper bound: the key into CANDIDATES."""
    return next(most for most, _ in BUCKETS if tokens <= most)


def choose_tile(tokens: int, n: int, k: int, processors: int, group_size: int | None = None) -> Tile:
    """The tile for M = tokens on a GPU with so many streaming multiprocessors."""
    tile = dict(BUCKETS)[bucket(tokens)]
    if tile is BUCKETS[-1][1]:
        if group_size:
            tile = GROUPED
        elif -(-tokens // tile.tokens) * -(-n // tile.outputs) < 2 * processors:
            tile = NARROW
    return with_split(tile, tokens, n, k, processors, group_size)


def with_split(tile: Tile, tokens: int, n: int, k: int, processors: int, group_size: int | None = None) -> Tile:
    """`tile` with K cut until the grid nearly fills the GPU, in powers of two, never finer than one step a slice, nor
    so fine that writing and reading the partial sums (8 bytes each) moves over twice the packed weights (K/2 each).

    K-groups are never split: each group's accumulator is scaled before groups are added, in ascending order.
    """
    if group_size:
        return tile
    tiles = -(-tokens // tile.tokens) * -(-n // tile.outputs)
    steps = -(-(k // 2) // tile.depth)
    split = 1
    while (
        split < MAX_SPLITS and tiles * split <= 0.75 * processors and split * 2 <= steps and split * 2 * 8 * tokens <= k
    ):
        split *= 2
    return replace(tile, split_k=split)
