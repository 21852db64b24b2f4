"""From selected linears and observations to transforms, codes and scales, input by input.

Everything is fitted on two thirds of the observations; errors are measured, and choices between roundings and between
methods made, on tokens of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from qlibero.activity import doing
from qlibero.config.quantization import Quant
from qlibero.documents import JsonObject
from qlibero.kernels import load as load_kernel
from qlibero.policies.base import Observation, QuantizablePolicy
from qlibero.policies.surgery import linear_in, swap_modules
from qlibero.quant import methods
from qlibero.quant.activation_stats import ActivationStats, executed_groups, group_seed, observe
from qlibero.quant.artifact import LayerRecord
from qlibero.quant.float_linear import assemble_floats
from qlibero.quant.layout import Choice, Selection, scaled
from qlibero.quant.linear import Weights, assemble
from qlibero.quant.measure import Measures, measure, outlier_ratio
from qlibero.quant.nibbles import pack_nibbles
from qlibero.quant.rounding import candidates
from qlibero.quant.transform import InputTransform, Transform
from qlibero.registry import MethodPlugin, get


def second_moment_bytes(device: torch.device) -> float:
    """What the inputs that are listened to at once may take; observations are run again for the others. pi0.5's widest
    input takes 1.07 GB, all of its inputs 22 GB."""
    if device.type != "cuda":
        return 8 << 30
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / 3


@dataclass
class Basis:
    """One input as its transform leaves it: what roundings are fitted and measured on. `seen` None: no token ever
    came."""

    shared: InputTransform
    seen: ActivationStats | None
    importance: Tensor | None
    """(K,) float32 mean of x'^2"""
    second: Tensor | None
    """(K, K) float64 mean of x'·x'^T"""


@dataclass
class Fitted:
    """A linear as it will run under `fake`, its tensors, and what held-out tokens said of every rounding tried."""

    module: nn.Module
    stored: dict[str, Tensor]
    rounding: str
    tried: dict[str, float]
    measures: Measures | None


class Chosen(TypedDict):
    """What a method that chooses took for one input, and the dB of every method it tried."""

    kept: str
    db: dict[str, float]


@dataclass
class Account:
    """What an artifact says of the data: tokens by input, notes for people, choices by input."""

    tokens: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    chosen: dict[str, Chosen] = field(default_factory=dict)

    def to_json(self, method: str) -> JsonObject:
        """As it is kept; choices under the name of the method that made them."""
        made = {method: self.chosen} if self.chosen else {}
        return {"tokens": self.tokens, "notes": self.notes, **made}


class Fitting:
    """All inputs of a selection. After `run`: `layers`, `tensors` and `account`."""

    def __init__(
        self,
        policy: QuantizablePolicy,
        observations: Sequence[Observation],
        noise: np.ndarray,
        spec: Quant,
        selection: Selection,
    ):
        self.policy, self.observations, self.noise = policy, observations, noise
        self.spec, self.selection = spec, selection
        self.layers: list[LayerRecord] = []
        self.tensors: dict[str, Tensor] = {}
        self.account = Account()
        self._scaled = scaled(policy, spec)
        self._bases: dict[str, Basis] = {}  # of those inputs whose linears a correction may scale

    @torch.no_grad()
    def run(self) -> None:
        model, groups, done = self.policy.model, self.selection.groups(), 0
        alive = executed_groups(self.selection)
        modules: dict[str, nn.Module] = {}
        for together in self._passes(groups):
            seen = observe(
                self.policy,
                self.observations,
                self.noise,
                {group: alive[group] for group in together if group in alive},
                self.spec.calibration_seed,
                second_moments=self.spec.rounding == "gptq",
                model=swap_modules(model, modules) if modules else None,
            )
            for group in together:
                doing("calibrating: input groups", done, len(groups))
                fitted = self._quantize(group, groups[group], seen.pop(group, None))
                if self.spec.sequential:
                    modules |= fitted
                done += 1

    def again(self, name: str, rows: Tensor) -> dict[str, Tensor]:
        """Tensors of a linear whose output rows are multiplied by `rows` (N,), rounded in the way that it keeps."""
        kept = next(layer.rounding for layer in self.layers if layer.name == name)
        choice = next(choice for choice in self.selection.choices if choice.name == name)
        linear = copy(linear_in(self.policy.model, name))
        linear._parameters = {
            "weight": nn.Parameter(linear.weight.detach() * rows[:, None].to(linear.weight)),
            "bias": None if linear.bias is None else nn.Parameter(linear.bias.detach() * rows.to(linear.bias)),
        }
        fitted = quantize_linear(linear, choice, self._bases[choice.group], self.spec, only=kept)
        return on_disk(fitted.stored, choice, self.spec)

    def _passes(self, groups: dict[str, list[Choice]]) -> Iterator[list[str]]:
        """Inputs that are observed together: all; as many as memory takes; or, sequentially, those of a block."""
        together: list[str] = []
        size, block, most = 0, "", second_moment_bytes(next(self.policy.model.parameters()).device)
        for group, choices in groups.items():
            width = linear_in(self.policy.model, choices[0].name).in_features
            more = 4 * width * width if self.spec.rounding == "gptq" else 0
            own = choices[0].block
            if together and (size + more > most or (self.spec.sequential and own != block)):
                yield together
                together, size = [], 0
            together.append(group)
            size, block = size + more, own
        yield together

    def _quantize(self, group: str, choices: list[Choice], seen: ActivationStats | None) -> dict[str, nn.Module]:
        """Fit one input and its linears, by the one method or by the best of several."""
        if seen is not None:
            self.account.tokens[group] = seen.tokens
            self._note(group, seen)
        chooser = get(MethodPlugin, self.spec.method)
        names = chooser.chooses if chooser.chooses and seen is not None else (self.spec.method,)
        found: dict[str, tuple[list[LayerRecord], dict[str, Tensor], dict[str, nn.Module], Basis]] = {}
        decibels: dict[str, float] = {}
        width = linear_in(self.policy.model, choices[0].name).in_features
        for name in names:
            if get(MethodPlugin, name).blocks and width % self.spec.block_size:
                continue
            spec = self.spec.model_copy(update={"method": name})
            found[name] = self._by_method(group, choices, seen, spec)
            decibels[name] = together_db([x.sqnr_db for x in found[name][0] if x.sqnr_db is not None])
        kept = chooser.load().choose(decibels) if len(names) > 1 else names[0]
        if len(names) > 1:
            rounded = {name: round(db, 4) for name, db in decibels.items()}
            self.account.chosen[group] = {"kept": kept, "db": rounded}
        records, tensors, modules, basis = found[kept]
        self.layers += records
        self.tensors |= tensors
        if any(choice.name in self._scaled for choice in choices):
            self._bases[group] = basis
        return modules

    def _note(self, group: str, seen: ActivationStats) -> None:
        width, notes = len(seen.peak), self.account.notes
        if seen.dead:
            notes.append(
                f"{group}: {seen.dead} of {width} channels were zero in every token; their weights are rounded"
            )
        if self.spec.rounding == "gptq" and seen.tokens < width:
            notes.append(
                f"{group}: {seen.tokens} tokens for {width} channels leave second moments without full rank; "
                f"GPTQ leans "
                "on its damping, and a layer keeps it only where held-out tokens prefer it"
            )

    def _by_method(
        self, group: str, choices: list[Choice], seen: ActivationStats | None, spec: Quant
    ) -> tuple[list[LayerRecord], dict[str, Tensor], dict[str, nn.Module], Basis]:
        linears = {choice.name: linear_in(self.policy.model, choice.name) for choice in choices}
        transform = fit_transform([linear.weight.detach().float() for linear in linears.values()], group, seen, spec)
        basis = basis_of(transform, next(iter(linears.values())), seen)
        tensors = {f"{group}.{factor}": value.cpu() for factor, value in transform.tensors().items()}
        transform_bytes = sum(t.nbytes for t in tensors.values())
        if basis.importance is not None and spec.rounding != "nearest":
            tensors[f"{group}.importance"] = basis.importance.cpu()
        before = after = None
        if seen is not None:
            before, after = outlier_ratio(seen.held), outlier_ratio(transform.forward(seen.held))
        records: list[LayerRecord] = []
        modules: dict[str, nn.Module] = {}
        for choice in choices:
            linear = linears[choice.name]
            fitted = quantize_linear(linear, choice, basis, spec)
            modules[choice.name] = fitted.module
            stored = on_disk(fitted.stored, choice, spec)
            tensors |= {f"{choice.name}.{key}": value for key, value in stored.items()}
            records.append(
                LayerRecord(
                    name=choice.name,
                    group=group,
                    out_features=linear.out_features,
                    in_features=linear.in_features,
                    weight_bits=choice.weight_bits,
                    activation_bits=choice.activation_bits,
                    executed=choice.executed,
                    method=spec.method if seen is not None or spec.transform.data_free else "rtn",
                    rounding=fitted.rounding,
                    tried=fitted.tried,
                    sqnr_db=None if fitted.measures is None else fitted.measures.sqnr_db,
                    max_error=None if fitted.measures is None else fitted.measures.max_error,
                    outlier_before=before if choice.executed else None,
                    outlier_after=after if choice.executed else None,
                    codes_bytes=stored["codes"].nbytes,
                    scales_bytes=stored["scales"].nbytes,
                    transform_bytes=transform_bytes if not records else 0,
                )
            )
        return records, tensors, modules, basis


def together_db(decibels: Sequence[float]) -> float:
    """Signal over noise of several outputs: the mean of noise over signal, in dB."""
    return -10 * math.log10(max(sum(10 ** (-db / 10) for db in decibels) / max(len(decibels), 1), 1e-20))


def basis_of(transform: Transform, linear: nn.Linear, seen: ActivationStats | None) -> Basis:
    """What the linears of an input see behind its transform."""
    shared = InputTransform(transform, linear.in_features).to(linear.weight.device)
    if seen is None:
        return Basis(shared, None, None, None)
    importance = transform.forward(seen.sample.double()).square().mean(0).float()
    second = None
    if seen.second is not None:
        half = transform.forward(seen.second.double())  # H·T, and T^T·H·T once more from the other side
        second = transform.forward(half.t().contiguous())
        second = (second + second.t()) / 2
    return Basis(shared, seen, importance, second)


def on_disk(stored: dict[str, Tensor], choice: Choice, spec: Quant) -> dict[str, Tensor]:
    """A linear's tensors as an artifact keeps them: integer codes of at most 4 bits two a byte, scales in bfloat16
    (exact, by contract)."""
    codes = stored["codes"]
    if codes.dtype == torch.int8 and choice.weight_bits <= 4 and spec.symmetric:
        codes = pack_nibbles(codes)
    kept = stored | {"codes": codes, "scales": stored["scales"].bfloat16()}
    return {key: value.cpu().contiguous() for key, value in kept.items()}


def fit_transform(weights: list[Tensor], group: str, seen: ActivationStats | None, spec: Quant) -> Transform:
    """The method's transform; the identity for an input that no action depends on, since nothing was seen of it."""
    if seen is None and not spec.transform.data_free:
        return Transform()
    width, device = weights[0].shape[1], weights[0].device
    nothing = torch.zeros(width, device=device)
    peak, mean, rms = (nothing,) * 3 if seen is None else (seen.peak, seen.mean, seen.rms)
    tokens = torch.zeros(0, width, device=device) if seen is None else torch.cat([seen.outlier_tokens, seen.sample])
    data = methods.GroupData(tuple(weights), peak, mean, rms, tokens, group_seed(spec.calibration_seed, group))
    return methods.fit(data, spec)


def quantize_linear(linear: nn.Linear, choice: Choice, basis: Basis, spec: Quant, only: str | None = None) -> Fitted:
    """The linear under each rounding that `spec` allows, and of these the one with the least error on held-out tokens
    (the first of equals); the last where no token was seen."""
    weight = linear.weight.detach().float()
    rotation = methods.output_rotation(weight, spec)
    transformed = basis.shared.factors().weights(weight)
    if rotation is not None:
        g, b, _ = rotation.shape
        transformed = torch.bmm(rotation.double(), transformed.view(g, b, -1)).reshape(weight.shape)
    bias = None if linear.bias is None else linear.bias.detach()
    held = basis.seen.held if basis.seen is not None and choice.executed else None
    best: Fitted | None = None
    most, tried = 0.0, dict[str, float]()
    tries = candidates(transformed.float(), spec, choice.weight_bits, basis.importance, basis.second, choice.name)
    for order, (how, codes, scales) in enumerate(tries):
        if only not in (None, how):
            continue
        stored = {"codes": codes, "scales": scales} | ({} if rotation is None else {"output_rotation": rotation})
        module = as_run(basis.shared, Weights(codes, scales, bias, rotation), choice, spec)
        measures = None if held is None else measure(linear, module, held)
        if measures is not None:
            tried[how] = measures.sqnr_db
        score = float(order) if measures is None else measures.sqnr_db
        if best is None or score > most:
            best, most = Fitted(module, stored, how, tried, measures), score
        if how == only:
            break  # what comes after is not even made
    assert best is not None  # `nearest` is always tried
    return best


def as_run(shared: InputTransform, part: Weights, choice: Choice, spec: Quant) -> nn.Module:
    """The linear under `fake`."""
    if spec.number_format != "int" and choice.activation_bits < 16:
        return assemble_floats(shared, [part], spec.number_format, spec.activation_clip)[0]
    kernel = None if choice.activation_bits == 16 else load_kernel("fake")
    return assemble(
        kernel,
        shared,
        [part],
        weight_bits=spec.kernel_bits(choice.weight_bits),
        activation_bits=choice.activation_bits,
        activation_clip=spec.activation_clip,
        dtype=torch.float32,
    )[0]
