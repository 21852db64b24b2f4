"""CUDA graphs of the sampler's phases, and a timer that is right on both kinds of device.

A policy call at full size is some two thousand kernel launches; replayed as graphs they cost the GPU's time
only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def graphed(phase: Callable[[Any], None], workspace: Any, pool: Any, warmup: int = 2) -> Callable[[Any], None]:
    """Capture `phase(workspace)` and return what replays it. The phase must read and write `workspace` tensors only,
    which were allocated outside; then all graphs of a sampler can share one memory `pool` for their intermediates.

    The warm-up runs initialise libraries and compile kernels outside the capture.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            phase(workspace)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        phase(workspace)

    def replay(_: Any) -> None:
        graph.replay()

    return replay


class Stopwatch:
    """Times consecutive phases of device work without stalling the device between them (CUDA events)."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, phase: str) -> None:
        """The phase that ends here."""
        self._marks.append((phase, self._now()))

    def read_ms(self) -> dict[str, float]:
        """Waits for the device; milliseconds a phase."""
        if self._cuda:
            self._marks[-1][1].synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._cuda:
            return {name: before.elapsed_time(event) for (_, before), (name, event) in pairs}
        return {name: (now - before) * 1e3 for (_, before), (name, now) in pairs}
