"""What kind of machine this is, as far as it can decide the last bits of a policy's actions."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
import torch


def machine_facts(device: str) -> dict[str, str]:
    """Processor, compilers and libraries that compute a policy's answer on `device` ("cpu" or "cuda")."""
    processor = _processor()
    facts = {
        "processor": processor.get("model name") or platform.machine(),
        "processor features": hashlib.sha256(
            processor.get("flags", processor.get("Features", "")).encode()
        ).hexdigest(),
        "vector code": torch.backends.cpu.get_cpu_capability(),
        "compiled for": numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        facts |= {
            "GPU": f"{torch.cuda.get_device_name()} (SM{major}{minor})",
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    return facts


def machine_kind(facts: dict[str, str]) -> str:
    """One short text for a record: what people know the machine by, and 8 hex digits over all facts."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    name = facts.get("GPU") or f"{facts['processor']} {facts['vector code']}"
    return f"{name}, torch {facts['torch']} [{digest}]"


def _processor() -> dict[str, str]:
    """The first core's lines of /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
