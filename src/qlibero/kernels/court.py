"""The court: before the first episode every layer's kernel is tried on its own shape, and nothing falls back in silence.

    requested backend ── trial (trial.py) ──▶  pass | fall back to X | refuse      with the reason, per layer

`on_failure: refuse` (the default) stops the run; `fallback` goes to the next kernel that passes, and says so in every
record. Passing trials are remembered per (package versions, processor, shape, tokens, source of this room): any change
of those is a new trial. Failures are never remembered, so that a mended machine is believed at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlibero.errors import GuardRefusal, UserError
from qlibero.kernels import BACKENDS, load
from qlibero.kernels.contract import GemmShape, Kernel
from qlibero.kernels.shapes import Layer
from qlibero.kernels.trial import Finding, quantized_weight, try_kernel

FALLBACKS = {"cuda": ("triton_w4a8", "w8a8", "fake"), "cpu": ("cpu_int4", "fake")}


@dataclass(frozen=True)
class Verdict:
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check(
    layers: Sequence[Layer],
    backend: str,
    on_failure: str = "refuse",
    captured: Mapping[str, Tensor] | None = None,
    remember: bool = True,
) -> list[Verdict]:
    """Try `backend` on each layer. captured: int8 codes (M, K) by layer name. `backend` may be "auto".

    Layers with the same shape share a trial. Raises UserError for an unknown backend or policy; a failing kernel is a
    verdict, which `enforce` turns into a refusal.
    """
    if on_failure not in ("refuse", "fallback"):
        raise UserError(f"on_failure is {on_failure!r}: write refuse or fallback")
    note = ""
    if backend == "auto":
        backend, note = choose(layers)
    trials = _Trials(captured or {}, remember)
    verdicts = []
    for layer in layers:
        finding, cached, seconds = trials.of(backend, layer)
        executed, verdict, reason = backend, "pass", finding.reason
        if not finding.ok:
            executed, verdict = None, "refuse"
            if on_failure == "fallback":
                for other in FALLBACKS[layer.shape.device]:
                    if other == backend:
                        continue
                    second, cached, more = trials.of(other, layer)
                    seconds += more
                    if second.ok:
                        executed, verdict, reason = other, f"fall back to {other}", f"{backend}: {reason}"
                        break
                    reason = f"{reason}; {other}: {second.reason}"
        reason = f"{note}; {reason}" if note else reason
        verdicts.append(Verdict(layer.name, layer.shape, layer.tokens, backend, executed, verdict, reason, cached, round(seconds, 3)))
    return verdicts


def enforce(verdicts: Sequence[Verdict]) -> None:
    """Raises GuardRefusal naming the layers whose kernel was refused, with the reasons and what to do."""
    refused = [v for v in verdicts if v.executed is None]
    if not refused:
        return
    reasons: dict[str, list[str]] = {}
    for v in refused:
        reasons.setdefault(f"{v.shape}: {v.reason}", []).append(v.layer)
    lines = [f"  {reason}\n    ({len(names)} layers: {', '.join(names[:3])}{', …' if len(names) > 3 else ''})" for reason, names in reasons.items()]
    raise GuardRefusal(
        f"kernel {refused[0].requested} was refused in {len(refused)} of {len(verdicts)} layers:\n" + "\n".join(lines)
        + "\nChoose another backend, exclude these layers (quant.exclude), or accept other kernels with `on_failure: fallback`"
    )  # fmt: skip


def choose(layers: Sequence[Layer]) -> tuple[str, str]:
    """`auto`: the fastest real kernel that passes the court on all layers, and why. Raises GuardRefusal when none does."""
    times: dict[str, float] = {}
    against: dict[str, str] = {}
    trials = _Trials({}, remember=True)
    distinct = {(layer.shape, layer.tokens): layer for layer in layers}.values()
    for name in BACKENDS:
        kernel = load(name)
        if not kernel.real:
            continue
        failed = next((f.reason for layer in distinct if not (f := trials.of(name, layer)[0]).ok), None)
        if failed is None:
            times[name] = sum(_seconds(kernel, layer) for layer in distinct)
        else:
            against[name] = failed
    if not times:
        raise GuardRefusal(
            "backend auto: no real kernel passes here:\n" + "\n".join(f"  {name}: {why}" for name, why in against.items())
            + "\nWrite `fake` to simulate the same integers"
        )  # fmt: skip
    best = min(times, key=times.__getitem__)
    ranking = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in sorted(times.items(), key=lambda item: item[1]))
    return best, f"auto: fastest of those that pass ({ranking})"


def standing(name: str) -> str:
    """What is known of a backend on this machine, for `ls backends`."""
    if not load(name).real:
        return "reference"
    devices = {}
    for path in _cache_directory().glob(f"{name}-*.json"):
        try:
            passed = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        devices.setdefault(passed.get("processor"), set()).add(passed.get("shape"))
    if not devices:
        return "unproven"
    return "; ".join(f"passed {len(shapes)} shapes on {processor}" for processor, shapes in sorted(devices.items()))


def table(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Rows for people: layers that share shape, kernel and verdict in one."""
    rows: dict[tuple, dict[str, Any]] = {}
    for v in verdicts:
        key = (v.shape, v.tokens, v.requested, v.verdict, v.reason)
        row = rows.setdefault(
            key,
            {"layer": v.layer, "layers": 0, "shape": str(v.shape), "tokens": v.tokens, "backend": v.requested,
             "verdict": v.verdict, "cached": v.cached, "seconds": v.seconds, "reason": v.reason},
        )  # fmt: skip
        row["layers"] += 1
    return list(rows.values())


class _Trials:
    """Trials of this call, each distinct one once, backed by the cache on disk."""

    def __init__(self, captured: Mapping[str, Tensor], remember: bool):
        self._captured, self._remember = captured, remember
        self._done: dict[tuple, Finding] = {}

    def of(self, name: str, layer: Layer) -> tuple[Finding, bool, float]:
        """(finding, whether it was known already, seconds it took)."""
        captured = self._captured.get(layer.name)
        key = (name, layer.shape, layer.tokens, layer.name if captured is not None else None)
        if key in self._done:
            return self._done[key], True, 0.0
        kernel = load(name)
        path = _cache_directory() / f"{name}-{_trial_key(kernel, layer)}.json"
        finding = _remembered(path) if self._remember and captured is None else None
        cached, start = finding is not None, time.perf_counter()
        if finding is None:
            finding = try_kernel(kernel, layer.shape, layer.tokens, captured)
            if finding.ok and captured is None:
                _remember(path, finding, layer)
        self._done[key] = finding
        return finding, cached, time.perf_counter() - start


def _seconds(kernel: Kernel, layer: Layer, repeats: int = 5) -> float:
    """Median seconds of one call at each token count, summed."""
    shape, total = layer.shape, 0.0
    codes, scales = quantized_weight(shape.n, shape.k, shape.weight_bits, shape.group_size)
    packed, scales = kernel.pack(codes.to(shape.device), shape.weight_bits, shape.group_size), scales.to(shape.device)
    for m in layer.tokens:
        x = torch.randint(-127, 128, (m, shape.k), dtype=torch.int8, device=shape.device)
        s_x = torch.ones(m, device=shape.device)
        times = []
        for _ in range(repeats + 2):
            _wait(shape.device)
            start = time.perf_counter()
            kernel.matmul(x, s_x, packed, scales)
            _wait(shape.device)
            times.append(time.perf_counter() - start)
        total += sorted(times[2:])[repeats // 2]
    return total


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --------------------------------------------------------------------------------------------- what is remembered
def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qlibero" / "court"


def _trial_key(kernel: Kernel, layer: Layer) -> str:
    facts = {
        "kernel": kernel.name, "shape": asdict(layer.shape), "tokens": layer.tokens, "processor": _processor(layer.shape.device),
        "torch": torch.__version__, "triton": _version("triton"), "package": _version(kernel.package), "source": _source_hash(),
        "core": getattr(kernel, "core", None), "interpreted": os.environ.get("TRITON_INTERPRET"),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


@cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@cache
def _version(package: str | None) -> str | None:
    try:
        return metadata.version(package) if package else None
    except metadata.PackageNotFoundError:
        return None


def _processor(device: str) -> str:
    if device == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (SM{major}{minor}, CUDA {torch.version.cuda})"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _remembered(path: Path) -> Finding | None:
    try:
        return Finding(True, json.loads(path.read_text())["reason"])
    except (OSError, ValueError, KeyError):
        return None


def _remember(path: Path, finding: Finding, layer: Layer) -> None:
    known = {"reason": finding.reason, "shape": str(layer.shape), "tokens": layer.tokens, "processor": _processor(layer.shape.device)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(known))
        temporary.replace(path)
    except OSError:
        pass  # a read-only home costs a few seconds next time, nothing else
