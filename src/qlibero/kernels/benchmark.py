"""How fast every backend is at the shapes that matter, against the unquantized product and the machine's limits.

On CUDA a measurement is one CUDA graph over many copies of the weight, more than the cache holds, because in a policy
every layer's weight comes from memory; replaying the graph leaves launch costs out, as the policy's own graphs do. On
the CPU it is the least of many single calls with warm weights: whatever else runs on the machine can only add.

The limit is max(bytes / bandwidth, operations / rate) with bandwidth and the bf16 rate *measured* on the same device,
and int8 taken as twice bf16 (its datasheet ratio on A100, A40, L40S, H100 and H200).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from qlibero.kernels import load
from qlibero.kernels import names as kernel_names
from qlibero.kernels.contract import GemmShape, PackedWeight, activation_limit, weight_range
from qlibero.kernels.shapes import Layer
from qlibero.kernels.tiled import tile

COLD_BYTES = 160 << 20  # of weights in rotation: three times the L2 of an H100
MAX_COPIES = 96


@dataclass(frozen=True)
class Ceilings:
    """What the device reached on the simplest work there is: bytes per second copied, bf16 operations per second."""

    bytes_per_s: float
    operations_per_s: float


@dataclass(frozen=True)
class Timing:
    """One backend at one shape and token count. `limit_us` is the least time the ceilings allow."""

    layer: str
    n: int
    k: int
    tokens: int
    backend: str
    us: float
    limit_us: float
    weight_bytes: int
    speedup: float  # over the unquantized product at the same place

    @property
    def of_limit(self) -> float:
        return self.limit_us / self.us


def measure_ceilings(device: str) -> Ceilings:
    """A large copy and a large matmul: bf16 on CUDA, fp32 on the CPU (its baseline)."""
    cuda = device == "cuda"
    source = torch.empty((1 << 30) if cuda else (1 << 22), dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), device)
    size, dtype = (8192, torch.bfloat16) if cuda else (320, torch.float32)
    a, b = torch.randn((size, size), device=device).to(dtype), torch.randn((size, size), device=device).to(dtype)
    return Ceilings(2 * source.numel() / copy, 2 * size**3 / seconds(lambda: a @ b, device))


def bench(
    layers: Sequence[Layer],
    tokens: Sequence[int] | None = None,
    backends: Sequence[str] | None = None,
    report: Callable[[Timing], None] = lambda timing: None,
) -> list[Timing]:
    """Time the unquantized product and each backend that supports the shape, at each layer's tokens (or those given).

    Layers of one size are timed once. Only real kernels and `fake` unless `backends` says otherwise.
    """
    device = layers[0].shape.device
    ceilings = measure_ceilings(device)
    names = backends or [name for name in kernel_names() if name == "fake" or load(name).real]
    seen: set[tuple[int, int]] = set()
    timings: list[Timing] = []
    for layer in layers:
        shape = layer.shape
        if (shape.n, shape.k) in seen:
            continue
        seen.add((shape.n, shape.k))
        plain: dict[int, float] = {}
        with torch.inference_mode():
            for name in ("unquantized", *(name for name in names if load(name).supports(shape).ok)):
                products, weight_bytes = _products(name, shape)
                for m in tokens or layer.tokens:
                    took = _time(products, m, shape)
                    plain.setdefault(m, took)
                    limit = _limit(ceilings, shape, m, weight_bytes, name)
                    timing = Timing(
                        layer.name, shape.n, shape.k, m, name, took * 1e6, limit * 1e6, weight_bytes, plain[m] / took
                    )
                    timings.append(timing)
                    report(timing)
    return timings


def left_out(layers: Sequence[Layer], names: Sequence[str]) -> dict[str, str]:
    """Which of these backends can run none of the layers here, and why."""
    reasons = {}
    for name in names:
        supports = [load(name).supports(layer.shape) for layer in layers]
        if not any(support.ok for support in supports):
            reasons[name] = supports[0].reason
    return reasons


def markdown(timings: Sequence[Timing]) -> str:
    """One row per shape and token count; per backend: microseconds, speed-up, share of the limit."""
    names = list(dict.fromkeys(t.backend for t in timings))
    places = list(dict.fromkeys((t.layer, t.n, t.k, t.tokens) for t in timings))
    by = {(t.n, t.k, t.tokens, t.backend): t for t in timings}
    lines = [
        "| layer | N×K | tokens | " + " | ".join(f"{name} µs (speed-up, of limit)" for name in names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for layer, n, k, m in places:
        cells = []
        for name in names:
            t = by.get((n, k, m, name))
            cells.append("" if t is None else f"{t.us:.1f} ({t.speedup:.2f}×, {t.of_limit:.0%})")
        lines.append(f"| {layer} | {n}×{k} | {m} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seconds(call: Callable[[], Any], device: str, budget_s: float = 0.25) -> float:
    """Seconds of one call, waiting for the device: the median on CUDA, the least on the CPU, of 9 to 200 calls."""
    times: list[float] = []
    while len(times) < 11 or (sum(times) < budget_s and len(times) < 200):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) if device == "cuda" else min(times[2:])


def graph_seconds(calls: Sequence[Callable[[], Any]], repeats: int = 7) -> float:
    """Median seconds per call of a CUDA graph that makes all of them in order."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in [
            *calls,
            *calls[:2],
        ]:  # each once: a weight may be made ready by its first call, which no graph may hold
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[2:]) / len(calls)


def _products(name: str, shape: GemmShape) -> tuple[list[Callable[[int], Callable[[], Tensor]]], int]:
    """Products, each m → a call, with as many copies of one weight as keep it cold (one on the CPU); and its bytes."""
    cuda = shape.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if name == "unquantized":
        w = torch.randn((shape.n, shape.k), device=shape.device, dtype=dtype)
        floats = cache(lambda m: torch.randn((m, shape.k), device=shape.device, dtype=dtype))

        def product(weight: Tensor) -> Callable[[int], Callable[[], Tensor]]:
            return lambda m: partial(torch.nn.functional.linear, floats(m), weight)

        copies = _copies(w.nbytes) if cuda else 1
        return [product(w)] + [product(w.clone()) for _ in range(copies - 1)], w.nbytes
    kernel = load(name)
    low, high = weight_range(shape.weight_bits)
    codes = torch.randint(low, high + 1, (shape.n, shape.k), dtype=torch.int8, device=shape.device)
    groups = () if shape.group_size is None else (shape.k // shape.group_size,)
    scales = (torch.rand((shape.n, *groups), device=shape.device) + 0.5).bfloat16().float()
    limit = activation_limit(shape.activation_bits)

    @cache
    def inputs(m: int) -> tuple[Tensor, Tensor]:
        codes_x = torch.randint(-limit, limit + 1, (m, shape.k), dtype=torch.int8, device=shape.device)
        s_x = torch.rand(m, device=shape.device) + 0.01
        return (tile(codes_x) if kernel.in_tiles else codes_x), s_x  # as a quantizer leaves them

    def packed_product(packed: PackedWeight) -> Callable[[int], Callable[[], Tensor]]:
        matmul = kernel.matmul_tiles if kernel.in_tiles else kernel.matmul

        def at(m: int) -> Callable[[], Tensor]:
            codes_x, s_x = inputs(m)
            return partial(matmul, codes_x, s_x, packed, scales, None, dtype)

        return at

    first = kernel.pack(codes, shape.weight_bits, shape.group_size)
    copies = _copies(first.nbytes) if cuda else 1
    rest = [kernel.pack(codes, shape.weight_bits, shape.group_size) for _ in range(copies - 1)]
    return [packed_product(packed) for packed in (first, *rest)], first.nbytes


def _time(products: Sequence[Callable[[int], Callable[[], Tensor]]], m: int, shape: GemmShape) -> float:
    calls = [product(m) for product in products]
    return graph_seconds(calls) if shape.device == "cuda" else seconds(calls[0], shape.device)


def _copies(weight_bytes: int) -> int:
    return min(MAX_COPIES, max(4, COLD_BYTES // weight_bytes))


def _limit(ceilings: Ceilings, shape: GemmShape, m: int, weight_bytes: int, backend: str) -> float:
    integers = shape.device == "cuda" and backend not in ("unquantized", "fake")
    rate = ceilings.operations_per_s * (2 if integers else 1)
    per_input = 1 if backend != "unquantized" else (2 if shape.device == "cuda" else 4)
    moved = weight_bytes + m * shape.k * per_input + m * shape.n * (2 if shape.device == "cuda" else 4)
    return max(moved / ceilings.bytes_per_s, 2 * m * shape.n * shape.k / rate)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
