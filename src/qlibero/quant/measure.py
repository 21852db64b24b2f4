"""What rounding costs a layer, measured on calibration tokens with the very code that will run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Measures:
    """sqnr_db: 10·log10 of signal over error energy of the output; max_error: greatest |error| over |output|."""

    sqnr_db: float
    max_error: float


@torch.no_grad()
def measure(linear: nn.Linear, quantized: nn.Module, tokens: Tensor) -> Measures:
    """tokens (T, K) float32: inputs of the layer as the full-precision policy produced them."""
    bias = None if linear.bias is None else linear.bias.float()
    exact = nn.functional.linear(tokens, linear.weight.float(), bias)
    error = quantized(tokens).float() - exact
    signal, noise = float(exact.double().square().sum()), float(error.double().square().sum())
    # 200 dB stands for "no error at all", which JSON has no infinity for
    sqnr = 200.0 if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
    return Measures(round(sqnr, 4), float(f"{float(error.abs().max()) / max(float(exact.abs().max()), 1e-30):.6g}"))


def outlier_ratio(tokens: Tensor) -> float:
    """Mean over tokens of max|x| / rms(x): what a per-token step must cover. About sqrt(2·ln K) when Gaussian."""
    rms = tokens.float().square().mean(1).sqrt().clamp_min(1e-30)
    return float(f"{float((tokens.float().abs().amax(1) / rms).mean()):.6g}")
