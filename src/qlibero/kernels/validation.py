"""Kernel validation: every layer's kernel is tested on its own shape before the first episode; no fallback is silent.

    requested backend ── exactness.py ──▶  pass | fall back to X | refuse      with the reason, per layer

`on_failure: refuse` (the default) stops the run; `fallback` goes to the next kernel that passes, and says so in every
record. Passes are remembered (`passes.py`).

Layers with 16-bit activations multiply no integers: their codes are dequantized once and an ordinary linear runs. They
are listed too, so that a record says what ran and nobody takes it for the kernel that was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from qlibero.activity import doing
from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.errors import GuardRefusal, UserError
from qlibero.kernels import DEQUANTIZED, SIMULATED, load, names, passes
from qlibero.kernels.benchmark import seconds
from qlibero.kernels.contract import GemmShape, Kernel
from qlibero.kernels.exactness import ExactnessResult, quantized_weight, try_kernel
from qlibero.kernels.shapes import Layer
from qlibero.kernels.tiled import tile

FALLBACKS = {"cuda": ("triton_w4a8", "w8a8", "fake"), "cpu": ("cpu_int4", "fake")}


@dataclass(frozen=True)
class KernelCheck:
    """What became of one layer. `executed` is None when it was refused."""

    layer: str
    shape: GemmShape
    tokens: tuple[int, ...]
    requested: str
    executed: str | None
    verdict: str  # "pass", "fall back to X" or "refuse"
    reason: str
    cached: bool
    seconds: float

    def to_json(self) -> JsonObject:
        return asdict(self)


def check(
    layers: Sequence[Layer], backend: str, on_failure: str = "refuse", remember: bool = True
) -> list[KernelCheck]:
    """Try `backend`, which may be "auto", on each layer. Layers with the same shape share a test.

    Raises UserError for an unknown backend or policy, or when there is no layer to run it; a failing kernel is a
    verdict, which `enforce` turns into a refusal.
    """
    if on_failure not in ("refuse", "fallback"):
        raise UserError(f"on_failure is {on_failure!r}: write refuse or fallback")
    if not layers:
        raise UserError(f"backend {backend}: no selected layer is ever run, so there is nothing for a kernel to do")
    kernel, note = backend, ""
    if backend == "auto":
        kernel, note = choose(layers)
    else:
        load(kernel)  # says which there are
    results = _Results(remember)
    verdicts = []
    for index, layer in enumerate(layers):
        doing(f"trying {kernel}", index, len(layers))
        verdicts.append(_check_layer(layer, backend, kernel, note, on_failure, results))
    return verdicts


def _check_layer(
    layer: Layer, requested: str, kernel: str, note: str, on_failure: str, results: _Results
) -> KernelCheck:
    if without_kernel(layer.shape):
        return _without_kernel(layer, requested, on_failure)
    finding, cached, took = results.of(kernel, layer)
    executed: str | None = kernel
    verdict, reason = "pass", finding.reason
    if not finding.ok:
        executed, verdict = None, "refuse"
        for other in FALLBACKS[layer.shape.device] if on_failure == "fallback" else ():
            if other == kernel:
                continue
            second, cached, more = results.of(other, layer)
            took += more
            if second.ok:
                executed, verdict, reason = other, f"fall back to {other}", f"{kernel}: {reason}"
                break
            reason = f"{reason}; {other}: {second.reason}"
    reason = f"{note}; {reason}" if note else reason
    return KernelCheck(
        layer.name, layer.shape, layer.tokens, requested, executed, verdict, reason, cached, round(took, 3)
    )


def without_kernel(shape: GemmShape) -> bool:
    """Whether no kernel multiplies such a layer: its activations are not quantized, or not to integers."""
    return shape.activation_bits == 16 or shape.number_format != "int"


def _without_kernel(layer: Layer, requested: str, on_failure: str) -> KernelCheck:
    """`fake` and `auto` are satisfied with what runs instead; whoever names a kernel is told that it would not run."""
    if layer.shape.activation_bits == 16:
        instead = DEQUANTIZED
        reason = (
            "16-bit activations: the codes are dequantized into an ordinary linear, "
            "no integers are multiplied and no memory is saved"
        )
    else:
        instead = SIMULATED
        reason = (
            f"{layer.shape.number_format} is computed as it is defined, in float64: no hardware multiplies it here and "
            "no memory is saved"
        )
    executed: str | None = instead
    verdict = "pass"
    if requested not in ("fake", "auto"):
        executed, verdict = (instead, f"fall back to {instead}") if on_failure == "fallback" else (None, "refuse")
        reason += f", so {requested} has nothing to do; write fake"
    return KernelCheck(layer.name, layer.shape, layer.tokens, requested, executed, verdict, reason, False, 0.0)


def enforce(verdicts: Sequence[KernelCheck]) -> dict[str, str]:
    """The kernel that executes each layer.

    Raises GuardRefusal naming the layers whose kernel was refused, with reasons and what an experiment can do.
    """
    if refused := refusals(verdicts):
        raise GuardRefusal(
            f"{refused}\nChoose another backend, exclude these layers (quant.exclude), or accept other kernels with "
            "`on_failure: fallback`"
        )
    return {verdict.layer: verdict.executed for verdict in verdicts if verdict.executed is not None}


def refusals(verdicts: Sequence[KernelCheck]) -> str:
    """What was refused and why, layers with one reason together; "" when nothing was."""
    refused = [v for v in verdicts if v.executed is None]
    if not refused:
        return ""
    reasons: dict[str, list[str]] = {}
    for v in refused:
        reasons.setdefault(f"{v.shape}: {v.reason}", []).append(v.layer)
    names = ", ".join(dict.fromkeys(v.requested for v in refused))
    return f"kernel {names} was refused in {len(refused)} of {count_text(len(verdicts), 'layer')}:\n" + "\n".join(
        f"  {reason}\n    ({count_text(len(names), 'layer')}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for reason, names in reasons.items()
    )


def choose(layers: Sequence[Layer]) -> tuple[str, str]:
    """`auto`: the fastest real kernel that passes on all layers, and why. GuardRefusal when none does."""
    times: dict[str, float] = {}
    against: dict[str, str] = {}
    results = _Results(remember=True)
    distinct = {(x.shape, x.tokens): x for x in layers if not without_kernel(x.shape)}.values()
    if not distinct:
        return "fake", ""
    for name in names():
        try:
            kernel = load(name)
        except ImportError as error:
            against[name] = str(error)
            continue
        if not kernel.real:
            continue
        failed = next((f.reason for layer in distinct if not (f := results.of(name, layer)[0]).ok), None)
        if failed is None:
            times[name] = sum(_seconds(kernel, layer) for layer in distinct)
        else:
            against[name] = failed
    if not times:
        raise GuardRefusal(
            "backend auto: no real kernel passes here:\n"
            + "\n".join(f"  {name}: {why}" for name, why in against.items())
            + "\nWrite `fake` to simulate the same integers"
        )
    best = min(times, key=times.__getitem__)
    ranking = ", ".join(f"{name} {took * 1e3:.2f} ms" for name, took in sorted(times.items(), key=lambda item: item[1]))
    return best, f"auto: fastest of those that pass ({ranking})"


def table(verdicts: Sequence[KernelCheck]) -> list[JsonObject]:
    """Rows for people: layers that share shape, kernel and verdict in one."""
    rows: dict[tuple[object, ...], JsonObject] = {}
    for v in verdicts:
        key = (v.shape, v.tokens, v.requested, v.verdict, v.reason)
        row = rows.setdefault(
            key,
            {
                "layer": v.layer,
                "layers": 0,
                "shape": str(v.shape),
                "tokens": v.tokens,
                "backend": v.requested,
                "executed": v.executed,
                "verdict": v.verdict,
                "cached": v.cached,
                "seconds": v.seconds,
                "reason": v.reason,
            },
        )
        row["layers"] += 1
    return list(rows.values())


class _Results:
    """Results of this call, each distinct one once, backed by the cache on disk."""

    def __init__(self, remember: bool):
        self._remember = remember
        self._done: dict[tuple[object, ...], ExactnessResult] = {}

    def of(self, name: str, layer: Layer) -> tuple[ExactnessResult, bool, float]:
        """(finding, whether it was known already, seconds it took)."""
        key = (name, layer.shape, layer.tokens)
        if key in self._done:
            return self._done[key], True, 0.0
        kernel = load(name)
        start = time.perf_counter()
        finding = passes.recall(kernel, layer) if self._remember else None
        cached = finding is not None
        if finding is None:
            finding = try_kernel(kernel, layer.shape, layer.tokens)
            if finding.ok:
                passes.remember(kernel, layer, finding)
        self._done[key] = finding
        return finding, cached, time.perf_counter() - start


def _seconds(kernel: Kernel, layer: Layer) -> float:
    """Seconds of one call at each token count, summed."""
    shape, total = layer.shape, 0.0
    codes, scales = quantized_weight(shape.n, shape.k, shape.weight_bits, shape.group_size)
    packed, scales = kernel.pack(codes.to(shape.device), shape.weight_bits, shape.group_size), scales.to(shape.device)
    for m in layer.tokens:
        x = torch.randint(-127, 128, (m, shape.k), dtype=torch.int8, device=shape.device)
        s_x = torch.ones(m, device=shape.device)
        matmul, x = (kernel.matmul_tiles, tile(x)) if kernel.in_tiles else (kernel.matmul, x)
        total += seconds(partial(matmul, x, s_x, packed, scales), shape.device, budget_s=0.05)
    return total
