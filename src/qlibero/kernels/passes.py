"""Passes of the validation that are remembered, on disk and per machine: nothing that they depend on has changed since.

That is the package versions, the processor, the layer's shape and tokens, and the source of this room. Failures are
never kept, so that a mended machine is believed at once; nor are passes under Triton's interpreter, which say nothing
about a GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from qlibero.cache import cache_directory, keep
from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.kernels import load
from qlibero.kernels.contract import Kernel
from qlibero.kernels.exactness import ExactnessResult
from qlibero.kernels.shapes import Layer


def recall(kernel: Kernel, layer: Layer) -> ExactnessResult | None:
    """The pass of this kernel on this layer, where it is known."""
    try:
        return (
            None if _interpreted() else ExactnessResult(True, json.loads(_place(kernel, layer).read_text())["reason"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(kernel: Kernel, layer: Layer, finding: ExactnessResult) -> None:
    """Keep a pass; one under the interpreter says nothing about this machine."""
    if _interpreted():
        return
    device = layer.shape.device
    known = {
        "reason": finding.reason,
        "shape": str(layer.shape),
        "tokens": layer.tokens,
        "device": device,
        "facts": _facts(kernel, device),
    }
    keep(_place(kernel, layer), json.dumps(known))


def validation_status(name: str) -> str:
    """Which shapes a backend has passed on this machine as it is now, for `ls backends`.

    Files that another version or another program left in the cache, whatever they hold, are passed over.
    """
    kernel = load(name)
    if not kernel.real:
        return "reference"
    passed: dict[str, set[str]] = {}
    for path in cache_directory("kernels").glob(f"{name}-*.json"):
        try:
            known = json.loads(path.read_text())
            if known["facts"] == _facts(kernel, known["device"]):
                shape = str(known["shape"])
                passed.setdefault(known["facts"]["processor"], set()).add(shape)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if not passed:
        return "unproven"
    return "; ".join(
        f"passed {count_text(len(shapes), 'shape')} on {processor}" for processor, shapes in sorted(passed.items())
    )


def _facts(kernel: Kernel, device: str) -> JsonObject:
    """What a result depends on besides the layer."""
    return {
        "kernel": kernel.name,
        "processor": _processor(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "package": _version(kernel.package),
        "source": _source_hash(),
        "core": getattr(kernel, "core", None),
    }


def _place(kernel: Kernel, layer: Layer) -> Path:
    facts = {**_facts(kernel, layer.shape.device), "shape": asdict(layer.shape), "tokens": layer.tokens}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    return cache_directory("kernels") / f"{kernel.name}-{digest}.json"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".py", ".cu")):
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
