"""How `cuda_w4a8` cuts one product: a tile and a cut of K by formula, no search, so latency does not depend on luck.

The formula counts cycles of one multiprocessor: products at the tensor cores' rate or shared memory filled at the rate
the L2 cache gives, whichever is longer, plus what a tile and the exchange of a cluster cost. Its constants are fitted
to an H100 (docs/h100.md); a wrong guess costs time, never a bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

WIDTHS = (16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176)  # of tokens, that integer wgmma and the registers allow
SHARED = 232_448  # bytes of shared memory that one CTA may have
MAX_STAGES = 10
OUTPUTS, DEPTH = 128, 128  # N and K are multiples of these


@dataclass(frozen=True)
class Plan:
    """One instance of the kernel: HALVES × 128 outputs by `tokens`, K cut among `cluster` CTAs."""

    halves: int
    tokens: int
    cluster: int

    @property
    def outputs(self) -> int:
        return self.halves * OUTPUTS

    @property
    def stage(self) -> int:
        """Bytes of one stage of the pipeline: 128 of K, tokens in int8 and weights in int4."""
        return self.tokens * DEPTH + self.outputs * DEPTH // 2

    @property
    def scales(self) -> int:
        """Bytes of two tiles' scales."""
        return 2 * 4 * (self.tokens + self.outputs)

    @property
    def stages(self) -> int:
        """As many as fit beside scales and barriers."""
        return min(MAX_STAGES, (SHARED - self.scales - 16 - 16 * MAX_STAGES) // self.stage)

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: stages, scales, two barriers a stage and two more."""
        return self.stages * self.stage + self.scales + 16 * self.stages + 16

    @property
    def threads(self) -> int:
        """A warpgroup for each half, and one that fetches."""
        return 128 * (self.halves + 1)

    def tiles(self, m: int, n: int) -> int:
        return -(-m // self.tokens) * (n // self.outputs)


@cache
def choose(m: int, n: int, k: int, processors: int) -> Plan:
    """The plan for (m, k) codes times (n, k) codes on a GPU with so many multiprocessors; n and k multiples of 128."""
    plans = [
        Plan(halves, tokens, cluster)
        for halves in (1, 2)
        if n % (halves * OUTPUTS) == 0
        for tokens in WIDTHS
        for cluster in (1, 2, 4)
        if _allowed(Plan(halves, tokens, cluster), m, n, k, processors)
    ]
    return min(plans, key=lambda plan: (_cycles(plan, m, n, k, processors), -plan.tokens, plan.halves))


def _allowed(plan: Plan, m: int, n: int, k: int, processors: int) -> bool:
    """A cluster does one tile, and every CTA of it needs a part of K. Clusters must lie within one of the GPU's parts:
    66 of two and 30 of four fit on an H100."""
    if plan.cluster == 1:
        return True
    room = processors if plan.cluster == 2 else processors * 10 // 11
    return plan.tiles(m, n) <= room // plan.cluster and plan.cluster <= k // DEPTH


def _cycles(plan: Plan, m: int, n: int, k: int, processors: int) -> float:
    waves = -(-plan.tiles(m, n) * plan.cluster // processors)
    steps = -(-(k // DEPTH) // plan.cluster)
    step = max(plan.outputs * plan.tokens / 32, plan.stage / 44)
    tile = steps * step + 1500 + 14 * plan.halves * plan.tokens
    exchange = 0 if plan.cluster == 1 else 1000 + 17 * plan.tokens
    return waves * (tile + exchange)


def band(plan: Plan, n: int) -> int:
    """Weight tiles whose token tiles are done before the next ones begin: together they stay in the L2 cache."""
    return min(8 if plan.halves == 2 else 16, n // plan.outputs)


def wgmma(tokens: int) -> str:
    """CUDA source of `Wgmma<tokens>::mma`: D (64 × tokens, int32, registers) (+)= A (64 × 32, int8, registers) times
    B (tokens × 32, int8, shared memory, K-major)."""
    r = tokens // 2
    d = ", ".join(f"%{i}" for i in range(r))
    bound = ", ".join(f'"+r"(d[{i}])' for i in range(r))
    operands = f"{{{d}}}, {{%{r}, %{r + 1}, %{r + 2}, %{r + 3}}}, %{r + 4}, p;"
    return f"""template <int N> struct Wgmma;
template <> struct Wgmma<{tokens}> {{
  static __device__ __forceinline__ void mma(int (&d)[{r}], const uint32_t (&a)[4], uint64_t b, int keep) {{
    asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{r + 5}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.s8.s8 {operands} }}"
      : {bound} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
  }}
}};
"""
