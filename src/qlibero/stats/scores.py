"""The score test of a mean of paired differences that are fractions: an arm against the mean of m references.

A difference is then one of a/1 − j/m (a ∈ {0, 1}, j ∈ 0…m), and Tango's statistic, made for −1, 0, 1, is this one with
m = 1: at the mean Δ₀ in question the probabilities of the differences are those of maximum likelihood,

    p_k = c_k / (n(1 + λ(d_k − Δ₀))),   λ such that they have the mean Δ₀

with what is left of 1 on −1 or 1 where λ ends at its bound, and z = (Σ d − nΔ₀)/√(n·Var₀). A loss is one whole
difference and gains are many small ones, so z is skewed; with κ the skewness of the mean under the same probabilities

    z − κ(z² − 1)/6 + κ²z³/108

takes that out (Hall, J. R. Stat. Soc. B 54 (1992) 221: the cubic term keeps it monotone).
"""

from __future__ import annotations

import numpy as np

TINY = 1e-12


def score_zs(values: np.ndarray, counts: np.ndarray, delta: float) -> np.ndarray:
    """Statistics, (runs,), of H0: mean = `delta`, of `counts` (runs, k) of the differences `values` (k,).

    `values` contain −1 and 1, the ends of what is possible. Positive when the data lie above `delta`.
    """
    n, e = counts.sum(axis=1), values - delta
    low, high = np.full(len(counts), -1 / (1 - delta)), np.full(len(counts), 1 / (1 + delta))
    for _ in range(50):
        middle = (low + high) / 2
        above = (counts * e / np.maximum(1 + middle[:, None] * e, TINY)).sum(axis=1) > 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    slope = (low + high) / 2
    p = counts / n[:, None] / np.maximum(1 + slope[:, None] * e, TINY)
    left = np.maximum(1 - p.sum(axis=1), 0)
    p[:, np.argmin(values)] += np.where(slope > 0, left, 0)
    p[:, np.argmax(values)] += np.where(slope < 0, left, 0)
    variance = np.maximum((p * e**2).sum(axis=1), TINY)
    z = (counts * e).sum(axis=1) / np.sqrt(n * variance)
    skewness = (p * e**3).sum(axis=1) / variance**1.5 / np.sqrt(n)
    corrected: np.ndarray = z - skewness * (z**2 - 1) / 6 + skewness**2 * z**3 / 108
    return corrected
