"""The flow steps of a compact policy on a CPU core as one compiled function.

Ten steps through four to six tiny layers are a thousand torch calls on ten tokens each, and on a CPU nine
tenths of the time goes into calling. Here the whole of it is one function, compiled by numba (which the
simulator brings along; the compiled code is cached on disk). Only for float32 on a CPU with every linear of
the expert in full precision; anything else takes the torch path.

Same mathematics as `Sampler.step`, in float32; the sums are grouped differently, so the last bits differ.
"""

# What numba compiles is no Python: its types are the compiler's
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import llvmlite
import numba
import numpy as np
import torch
from numba import njit
from torch import Tensor, nn

from qlibero.policies.pi05.model import Pi05Model
from qlibero.policies.surgery import linear_in

# Reassociation and contraction only: NaN and infinity must travel to the check of the actions.
_FAST = {"reassoc", "contract", "arcp", "nsz"}


def _compiled(function):
    """Compiled as part of whoever calls it, so that `_flow` is one piece of machine code that calls none of ours: the
    bits are the same whether it was compiled in this process or read from the cache. Left to itself, a process that
    compiles calls functions that were optimised alone, one that reads the cache only `_flow`'s own copies of them, and
    with sums that may be reordered the two round differently."""
    return njit(function, fastmath=_FAST, cache=True, forceinline=True)


def code_version() -> str:
    """What decides the compiled code besides the processor: this source and the compiler, as 64 hex digits."""
    source = Path(__file__).read_bytes()
    return hashlib.sha256(source + f"|numba {numba.__version__}|llvmlite {llvmlite.__version__}".encode()).hexdigest()


@dataclass(frozen=True)
class CpuFlow:
    """The expert's weights, transposed to (inputs, outputs) and stacked over layers."""

    head: tuple[np.ndarray, np.ndarray]
    tail: tuple[np.ndarray, np.ndarray]
    layers: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    """qkv (L, W, (heads + 2)·d), o (L, heads·d, W), gate|up (L, W, 2F), down (L, F, W)."""
    modulations: np.ndarray
    """(steps, 2L + 1, 3, W): 1 + scale, shift, gate."""

    @property
    def code(self) -> str:
        """See `code_version`."""
        return code_version()

    @staticmethod
    def unfit(model: Pi05Model) -> str:
        """Why a model on a CPU cannot have a compiled flow; empty when it can."""
        if not model.adaptive:
            return "the network takes the flow time with the actions, which the compiled flow does not"
        if model.stream_dtype != torch.float32:
            return f"the model is in {model.stream_dtype}"
        linears = [
            linear for layer in model.expert.layers for linear in (*layer.self_attn.children(), *layer.mlp.children())
        ]
        quantized = sum(type(linear) is not nn.Linear for linear in linears)
        return f"{quantized} of {len(linears)} linears of the expert are quantized" if quantized else ""

    @staticmethod
    def of(model: Pi05Model, modulations: list[list[tuple[Tensor, Tensor, Tensor]]]) -> CpuFlow:
        """For a model that is not `unfit`."""

        def stacked(*names: str) -> np.ndarray:
            rows = [torch.cat([linear_in(layer, name).weight for name in names]).t() for layer in model.expert.layers]
            return np.ascontiguousarray(torch.stack(rows).numpy())

        def pair(linear: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
            return np.ascontiguousarray(linear.weight.t().numpy()), linear.bias.numpy().copy()

        table = np.stack(
            [np.stack([np.stack([part.flatten().numpy() for part in norm]) for norm in row]) for row in modulations]
        )
        a, m = "self_attn.", "mlp."
        return CpuFlow(
            pair(model.action_in_proj),
            pair(model.action_out_proj),
            (
                stacked(f"{a}q_proj", f"{a}k_proj", f"{a}v_proj"),
                stacked(f"{a}o_proj"),
                stacked(f"{m}gate_proj", f"{m}up_proj"),
                stacked(f"{m}down_proj"),
            ),
            table,
        )

    def run(
        self,
        x: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
    ) -> None:
        """All Euler steps of x (B, H, D), in place. keys, values: a layer (B, P + H, d), prefix filled in;
        cos, sin (B, H, 1, d); mask (B, 1, P + H) additive or None."""
        for row in range(x.shape[0]):
            k = np.ascontiguousarray(torch.stack([layer[row].t() for layer in keys]).numpy())
            v = torch.stack([layer[row] for layer in values]).numpy()
            bias = np.zeros(k.shape[2], np.float32) if mask is None else mask[row, 0].numpy()
            _flow(
                x[row].numpy(),
                k,
                v,
                bias,
                cos[row, :, 0].numpy(),
                sin[row, :, 0].numpy(),
                *self.head,
                *self.tail,
                *self.layers,
                self.modulations,
            )


@_compiled
def _matmul(x, w, y):
    """y = x·w for x (M, K), w (K, N): four rows of w and two of x at a time, so every loaded value is used twice."""
    rows, inner, columns = x.shape[0], x.shape[1], w.shape[1]
    y[:, :] = 0.0
    whole = inner - inner % 4
    for k in range(0, whole, 4):
        w0, w1, w2, w3 = w[k], w[k + 1], w[k + 2], w[k + 3]
        for m in range(0, rows - 1, 2):
            a0, a1, a2, a3 = x[m, k], x[m, k + 1], x[m, k + 2], x[m, k + 3]
            b0, b1, b2, b3 = x[m + 1, k], x[m + 1, k + 1], x[m + 1, k + 2], x[m + 1, k + 3]
            ya, yb = y[m], y[m + 1]
            for n in range(columns):
                ya[n] += a0 * w0[n] + a1 * w1[n] + a2 * w2[n] + a3 * w3[n]
                yb[n] += b0 * w0[n] + b1 * w1[n] + b2 * w2[n] + b3 * w3[n]
        if rows % 2:
            m = rows - 1
            a0, a1, a2, a3 = x[m, k], x[m, k + 1], x[m, k + 2], x[m, k + 3]
            ya = y[m]
            for n in range(columns):
                ya[n] += a0 * w0[n] + a1 * w1[n] + a2 * w2[n] + a3 * w3[n]
    for k in range(whole, inner):
        w0 = w[k]
        for m in range(rows):
            a0, ya = x[m, k], y[m]
            for n in range(columns):
                ya[n] += a0 * w0[n]


@_compiled
def _exp(x, out, bits):
    """out = exp(x) for x ≤ about 80, to 2 ulp; `bits` is an int32 scratch of that length. Vectorises, unlike libm's."""
    powers = bits.view(np.float32)
    for i in range(x.shape[0]):
        value = np.float32(-87.0) if x[i] < np.float32(-87.0) else x[i]  # NaN stays NaN
        n = np.floor(value * np.float32(1.4426950408889634) + np.float32(0.5))
        r = value - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        out[i] = p * r * r + r + np.float32(1.0)
        bits[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
    for i in range(x.shape[0]):
        out[i] *= powers[i]


@_compiled
def _modulated(h, modulation, y):
    width = h.shape[1]
    for m in range(h.shape[0]):
        total = np.float32(0.0)
        for i in range(width):
            total += h[m, i] * h[m, i]
        inverse = np.float32(1.0) / np.sqrt(total / np.float32(width) + np.float32(1e-6))
        for i in range(width):
            y[m, i] = h[m, i] * inverse * modulation[0, i] + modulation[1, i]


@_compiled
def _attention(joined, keys, values, bias, cos, sin, q, scores, weights, bits, out):
    """Rotate q and k, put k and v behind the prefix, and attend; out (H, heads·d)."""
    horizon, dim = cos.shape
    half, heads, total = dim // 2, joined.shape[1] // dim - 2, bias.shape[0]
    scale = np.float32(1.0) / np.sqrt(np.float32(dim))
    for t in range(horizon):
        for part in range(heads + 1):
            for i in range(dim):
                other = i + half if i < half else i - half
                rotated = joined[t, part * dim + i] * cos[t, i] + joined[t, part * dim + other] * sin[t, i]
                if part < heads:
                    q[t * heads + part, i] = rotated * scale
                else:
                    keys[i, total - horizon + t] = rotated
        for i in range(dim):
            values[total - horizon + t, i] = joined[t, (heads + 1) * dim + i]
    _matmul(q, keys, scores)
    for row in range(horizon * heads):
        s = scores[row]
        peak = np.float32(-3.0e38)
        for n in range(total):
            s[n] += bias[n]
            peak = max(peak, s[n])
        for n in range(total):
            s[n] -= peak
        _exp(s, weights[row], bits)
        norm = np.float32(0.0)
        for n in range(total):
            norm += weights[row, n]
        norm = np.float32(1.0) / norm
        for n in range(total):
            weights[row, n] *= norm
    _matmul(weights, values, out.reshape(horizon * heads, dim))


@_compiled
def _flow(x, keys, values, bias, cos, sin, head_w, head_b, tail_w, tail_b, qkv, o, gate_up, down, modulations):
    """x (H, D) from noise to actions, in place; see `CpuFlow`. keys (L, d, P + H), values (L, P + H, d)."""
    horizon, actions = x.shape
    depth, width = qkv.shape[0], qkv.shape[1]
    dim, total, hidden = cos.shape[1], bias.shape[0], down.shape[1]
    rows = o.shape[1] // dim * horizon
    h, y = np.empty((horizon, width), np.float32), np.empty((horizon, width), np.float32)
    delta = np.empty((horizon, width), np.float32)
    joined = np.empty((horizon, qkv.shape[2]), np.float32)
    q, attended = np.empty((rows, dim), np.float32), np.empty((horizon, o.shape[1]), np.float32)
    scores, weights = np.empty((rows, total), np.float32), np.empty((rows, total), np.float32)
    both, gated, inner = (
        np.empty((horizon, 2 * hidden), np.float32),
        np.empty((horizon, hidden), np.float32),
        np.empty(hidden, np.float32),
    )
    velocity, bits = np.empty((horizon, actions), np.float32), np.empty(max(total, hidden), np.int32)
    steps = modulations.shape[0]
    for step in range(steps):
        _matmul(x, head_w, h)
        for m in range(horizon):
            for i in range(width):
                h[m, i] += head_b[i]
        for layer in range(depth):
            first, second = modulations[step, 2 * layer], modulations[step, 2 * layer + 1]
            _modulated(h, first, y)
            _matmul(y, qkv[layer], joined)
            _attention(joined, keys[layer], values[layer], bias, cos, sin, q, scores, weights, bits[:total], attended)
            _matmul(attended, o[layer], delta)
            for m in range(horizon):
                for i in range(width):
                    h[m, i] += delta[m, i] * first[2, i]
            _modulated(h, second, y)
            _matmul(y, gate_up[layer], both)
            for m in range(horizon):
                for i in range(hidden):
                    g = both[m, i]
                    twice = np.float32(-1.5957691216057308) * (g + np.float32(0.044715) * g * g * g)
                    inner[i] = np.float32(80.0) if twice > np.float32(80.0) else twice
                _exp(inner, gated[m], bits[:hidden])
                for i in range(hidden):
                    gated[m, i] = both[m, i] / (np.float32(1.0) + gated[m, i]) * both[m, hidden + i]
            _matmul(gated, down[layer], delta)
            for m in range(horizon):
                for i in range(width):
                    h[m, i] += delta[m, i] * second[2, i]
        _modulated(h, modulations[step, 2 * depth], y)
        _matmul(y, tail_w, velocity)
        for m in range(horizon):
            for i in range(actions):
                x[m, i] -= (velocity[m, i] + tail_b[i]) / np.float32(steps)
