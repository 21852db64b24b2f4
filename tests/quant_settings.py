"""Quantization settings for tests: `quant_of(...)` with the defaults of an experiment, and a layout."""

from __future__ import annotations

from typing import Any

from qlibero.config.quantization import Quant


def quant_of(*, calibration_samples: int = 64, calibration_seed: int = 0, **changes: Any) -> Quant:
    """DuQuant W4A8 of the language model, or what `changes` say."""
    drawn = {"path": None, "samples": calibration_samples, "seed": calibration_seed}
    layout = {} if "include" in changes else {"layout": "llm"}
    return Quant(**layout | {"calibration": drawn} | changes)
