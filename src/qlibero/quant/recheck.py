"""Kernels held to the contract while they run and once more at the end.

Validation and the policy check test kernels before the first episode. A kernel that is right for its first calls, or
wrong once in thousands of products, passes both. So while an arm runs, every `EVERY`-th policy call is put to its twin
too, the same policy on `fake`, with the same observations and noise: an exact kernel gives the very same actions. What
is compared is what was executed, CUDA graphs and fused ops included; the twin shares all weights but the codes. At the
end each product is multiplied again on a real call's codes, `PRODUCTS` times in all, outside any graph, against the
integer reference: a kernel that is wrong once in 2,000 products passes that with a probability below 1 %.

A kernel that rounds (`rounds_to`) has no twin to be equal to; it is tried at the end, to the roundings it may make.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import nn

from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.errors import GuardRefusal
from qlibero.kernels.exactness import agrees
from qlibero.kernels.int_ref import IntRef
from qlibero.policies.base import Observation, QuantizablePolicy
from qlibero.quant.artifact import Artifact
from qlibero.quant.linear import QuantLinear
from qlibero.quant.policy_check import listen

EVERY = 100  # policy calls; one of so many is asked twice, which costs about 1 %
PRODUCTS = 10_000  # of an arm's end test: (1 - 1/2000)^10000 is 0.7 %
LEAST_BUDGET_S = 30.0  # for the end test, or 1 % of the arm's policy time where that is more
FEW_ROWS = 16  # every second product is one of few tokens: other tiles, and faster


@dataclass(frozen=True)
class Rechecked:
    """Policy calls, those put to the twin (and why not), layers and products tried at the end, and what was wrong."""

    calls: int
    repeated: int
    not_repeated: str
    layers: int
    products: int
    wrong: tuple[str, ...]

    def to_json(self) -> JsonObject:
        """As it is kept."""
        return asdict(self)


class Recheck:
    """Of one arm with a real kernel, in one process. `twin` is None where there is none, `why` then says why."""

    def __init__(self, policy: QuantizablePolicy, artifact: Artifact, twin: QuantizablePolicy | None, why: str = ""):
        self.policy, self.artifact, self.twin, self.why = policy, artifact, twin, why
        self.calls = self.repeated = 0
        self.policy_s = 0.0
        self.wrong: list[str] = []
        self._kept: tuple[Observation, np.ndarray] | None = None

    def call(self, observations: Sequence[Observation], noise: np.ndarray, actions: np.ndarray, seconds: float) -> None:
        """A policy call of the arm and what came out; `observations` may change once this returns."""
        self.calls += 1
        self.policy_s += seconds
        due = self.calls % EVERY == EVERY // 2
        if due or self._kept is None:
            first = observations[0]
            kept = replace(
                first, image=first.image.copy(), wrist_image=first.wrist_image.copy(), state=first.state.copy()
            )
            self._kept = kept, noise[0].copy()
        if due and self.twin is not None:
            self.repeated += 1
            expected = self.twin.infer(observations, noise).actions
            if not np.array_equal(actions, expected, equal_nan=True):
                apart = float(np.nanmax(np.abs(actions - expected), initial=0.0))
                self.wrong.append(f"policy call {self.calls}: actions differ from `fake` by up to {apart:.3g}")

    def guard(
        self, observations: Sequence[Observation], noise: np.ndarray, actions: np.ndarray, seconds: float
    ) -> None:
        """`call`, and a GuardRefusal once a call was wrong: what is served may go to a robot, not to a ledger."""
        self.call(observations, noise, actions, seconds)
        if self.wrong:
            raise GuardRefusal(
                f"{self.wrong[-1]}: the kernels are not what they were when they were tried, so nothing more is "
                "served. Choose another backend, and see `qlibero kernels check --forget`"
            )

    def finish(self) -> Rechecked | None:
        """Try every product again; the arm's result, None when the arm was not asked at all."""
        if self._kept is None:
            return None
        layers, products = self._try_again(*self._kept)
        return Rechecked(self.calls, self.repeated, self.why, layers, products, tuple(self.wrong))

    @torch.inference_mode()
    def _try_again(self, observation: Observation, noise: np.ndarray) -> tuple[int, int]:
        """Layers and products that were tried."""
        inputs = listen(self.policy, observation, noise)
        together: dict[int, list[tuple[str, QuantLinear]]] = {}
        for record in self.artifact.layers:
            layer: nn.Module = self.policy.model.get_submodule(record.name)
            if record.executed and isinstance(layer, QuantLinear):
                together.setdefault(id(layer.product), []).append((record.name, layer))
        if not together:
            return 0, 0
        each = -(-PRODUCTS // len(together))
        budget = max(LEAST_BUDGET_S, 0.01 * self.policy_s) / len(together)
        return sum(map(len, together.values())), sum(
            self._multiply(members, inputs[id(members[0][1].transform)], each, budget) for members in together.values()
        )

    def _multiply(self, members: list[tuple[str, QuantLinear]], x: torch.Tensor, times: int, budget_s: float) -> int:
        """One product, `times` times or until its time is over but twice at least; returns how often."""
        members = sorted(members, key=lambda member: member[1].start)
        layer, names = members[0][1], ", ".join(name for name, _ in members)
        product, prepared = layer.product, layer.prepare(x)
        codes = torch.cat([self.artifact.codes(name) for name, _ in members]).to(x.device)
        reference = IntRef().pack(codes, product.packed.weight_bits, product.packed.group_size)
        acc = IntRef().in_float64(prepared.codes, reference)
        dtype = torch.float32 if layer.output_rotation is not None else prepared.dtype
        rounds = product.kernel.rounds_to is not None
        exact = None
        started, wrong = time.perf_counter(), torch.zeros((), dtype=torch.int64, device=x.device)
        for done in range(times):
            rows = slice(None) if done % 2 == 0 else slice(0, FEW_ROWS)
            codes_x, s_x = prepared.codes[rows], prepared.scales[rows]
            found = product.kernel.matmul(codes_x, s_x, product.packed, product.scales, product.bias, dtype)
            if exact is None or rounds:
                same, expected = agrees(product.kernel, found, acc[..., rows, :], s_x, product.scales, product.bias)
                exact = expected if exact is None else exact
                wrong += not same
            else:  # summed where it lies: asking after each product would stall the device
                wrong += (found != exact[rows]).any()
            if done and time.perf_counter() - started > budget_s:
                break
        if int(wrong):
            self.wrong.append(
                f"after the run: kernel {product.kernel.name} gave other integers than the reference in {int(wrong)} "
                f"of {count_text(done + 1, 'product')} of {names}"
            )
        return done + 1
