"""Bits where they matter: weight bits of every linear from what its rounding does to the actions, under a budget.

Each linear is quantized *alone*, at the fewest bits, and the policy asked on held-out observations: the mean square
change of the arm's actions is its effect. What more bits would leave of it is that times the ratio of the layer's own
noise, measured at every number of bits. Bits go, step by step, to the linear where a byte takes away most. Isolated
effects do not compose, so the result is quantized as a whole and measured against the same budget spent evenly.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlibero.activity import doing
from qlibero.config.fields import FieldError
from qlibero.config.number_formats import BITS, require_of_format
from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.errors import UserError
from qlibero.quant.action_error import ActionError, action_error, arm_error, between
from qlibero.quant.artifact import Artifact
from qlibero.quant.held_out import unseen

if TYPE_CHECKING:
    from qlibero.config.quantization import Quant
    from qlibero.config.schema import Experiment


@dataclass(frozen=True)
class Linear:
    """One linear to be given bits: its number of weights, and bits -> expected mean square change of the actions."""

    name: str
    weights: int
    effect: Mapping[int, float]


@dataclass(frozen=True)
class GivenBits:
    """What a linear got, its number of weights, and what the fewest bits do to the actions."""

    layer: str
    bits: int
    weights: int
    effect: float


@dataclass(frozen=True)
class Allocation:
    """Bits of every linear, the settings that say so, and what they do together and what the same budget does, spent
    evenly."""

    experiment: str
    observations: int
    unseen: bool
    levels: list[int]
    mean_bits: float
    weight_mb: float
    weight_bits: int
    per_layer_bits: dict[str, int]
    layers: list[GivenBits]
    together: ActionError
    even_bits: int
    evenly: ActionError

    def to_json(self) -> JsonObject:
        """What the command prints."""
        return {
            "experiment": self.experiment,
            "observations": self.observations,
            "unseen": self.unseen,
            "bits": self.levels,
            "mean_bits": self.mean_bits,
            "weight_mb": self.weight_mb,
            "weight_bits": self.weight_bits,
            "per_layer_bits": self.per_layer_bits,
            "layers": [asdict(layer) for layer in self.layers],
            "together": self.together.to_json(),
            "evenly": {"bits": self.even_bits, **self.evenly.to_json()},
        }


def allocate(
    experiment: Experiment, *, budget_mb: float | None, mean_bits: float | None, bits: Sequence[int], out: Path | None
) -> JsonObject:
    """What `qlibero allocate` does: measure, choose, verify, and write `quant.per_layer_bits` to `out` if it is given.

    budget_mb counts weight codes, in 10^6 bytes.

    Raises UserError for a budget that no choice of bits can keep, or an experiment without calibration data.
    """
    import torch

    from qlibero.policies import load_policy
    from qlibero.policies.base import quantizable
    from qlibero.quant.apply import quantize_policy
    from qlibero.quant.prepare import artifact_for, noise_for

    torch.set_num_threads(1)
    arm = next((arm for arm in experiment.arms() if arm.quant is not None), None)
    if arm is None or arm.quant is None:
        raise UserError(f"experiment {experiment.name} has no quantized arm; add one to `arms`, such as fake")
    if (budget_mb is None) == (mean_bits is None):
        raise UserError("give --budget-mb or --mean-bits, one of them")
    levels = sorted(set(bits))
    data, _, fresh = unseen([arm.quant])
    policy = quantizable(load_policy(arm.policy))
    noise, steps = noise_for(policy, len(data.observations), experiment.seed), arm.policy.replan_steps
    exact = policy.infer(data.observations, noise).actions
    spared = {pattern: bits for pattern, bits in arm.quant.per_layer_bits.items() if bits == 16}
    plain = arm.quant.model_copy(update={"artifact": None})
    settings_of = {b: with_bits(plain, b, spared) for b in levels}
    at = {b: artifact_for(policy, settings) for b, settings in settings_of.items()}
    lowest = at[levels[0]]
    names = [layer.name for layer in lowest.layers if layer.executed]
    effects: dict[str, float] = {}
    for index, name in enumerate(names):
        doing("quantizing each linear alone", index, len(names))
        alone = quantize_policy(policy, lowest, "fake", only=frozenset([name]))
        errors = arm_error(exact, alone.infer(data.observations, noise).actions, steps)
        effects[name] = float(np.mean(errors**2))
    linears = [linear_of(name, effects[name], at) for name in names]
    total = sum(linear.weights for linear in linears)
    budget = 8e6 * budget_mb if budget_mb is not None else float(mean_bits or 0) * total
    chosen = spend(linears, levels, budget)
    usual = max(set(chosen.values()), key=list(chosen.values()).count)
    wanted = spared | {f"^{re.escape(name)}$": b for name, b in chosen.items() if b != usual}
    mixed = with_bits(plain, usual, wanted)

    def verified(settings: Quant) -> ActionError:
        found = quantize_policy(policy, artifact_for(policy, settings), "fake").infer(data.observations, noise).actions
        return action_error(exact, found, steps)

    evenly = max((b for b in levels if b * total <= budget), default=levels[0])
    spent = sum(chosen[linear.name] * linear.weights for linear in linears)
    made = Allocation(
        experiment=experiment.name,
        observations=len(exact),
        unseen=fresh,
        levels=levels,
        mean_bits=round(spent / total, 4),
        weight_mb=round(spent / 8e6, 4),
        weight_bits=usual,
        per_layer_bits=wanted,
        layers=[
            GivenBits(x.name, chosen[x.name], x.weights, effects[x.name])
            for x in sorted(linears, key=lambda x: -effects[x.name])
        ],
        together=verified(mixed),
        even_bits=evenly,
        evenly=verified(settings_of[evenly]),
    )
    if out is None:
        return made.to_json()
    write(out, made)
    return made.to_json() | {"file": str(out)}


def with_bits(quant: Quant, weight_bits: int, per_layer_bits: Mapping[str, int]) -> Quant:
    """These settings at other bits. Raises UserError for bits that the number format has not."""
    found = quant.model_copy(update={"weight_bits": weight_bits, "per_layer_bits": dict(per_layer_bits)})
    try:
        require_of_format(found)
    except FieldError as error:
        raise UserError(f"--bits {weight_bits}: {error}; write others") from None
    return found


def linear_of(name: str, effect: float, at: Mapping[int, Artifact]) -> Linear:
    """`effect` at the fewest bits, and what the layer's own signal-to-noise ratio says of the others."""
    layers = {b: artifact.layer(name) for b, artifact in at.items()}
    fewest = layers[min(layers)]
    own = {b: 10 ** (-(layer.sqnr_db or 0.0) / 10) for b, layer in layers.items()}
    noise = {b: value / own[min(layers)] for b, value in own.items()}
    return Linear(name, fewest.out_features * fewest.in_features, {b: effect * noise[b] for b in sorted(noise)})


def spend(linears: Sequence[Linear], levels: Sequence[int], budget: float) -> dict[str, int]:
    """Bits of every linear, at most `budget` bits in all: from the fewest on, the step that takes away most per bit
    first.

    A step whose price does not fit any more is passed over; a cheaper one may still.
    """
    chosen = {linear.name: levels[0] for linear in linears}
    spent = sum(linear.weights * levels[0] for linear in linears)
    if spent > budget:
        total = sum(linear.weights for linear in linears)
        raise UserError(
            f"{levels[0]} bits everywhere take {spent / 8e6:.3g} MB ({levels[0]} bits a weight), the budget is "
            f"{budget / 8e6:.3g} MB ({budget / total:.3g}): write more, or fewer bits (--bits)"
        )
    by_name = {linear.name: linear for linear in linears}
    steps: list[tuple[float, str, int]] = []

    def offer(linear: Linear, rung: int) -> None:
        if rung + 1 < len(levels):
            less, more = levels[rung], levels[rung + 1]
            gain = (linear.effect[less] - linear.effect[more]) / ((more - less) * linear.weights)
            heapq.heappush(steps, (-gain, linear.name, rung))

    for linear in linears:
        offer(linear, 0)
    while steps:
        gain, name, rung = heapq.heappop(steps)
        linear = by_name[name]
        price = (levels[rung + 1] - levels[rung]) * linear.weights
        if gain >= 0 or spent + price > budget:
            continue
        spent += price
        chosen[name] = levels[rung + 1]
        offer(linear, rung + 1)
    return chosen


def bits_of(text: str) -> list[int]:
    """`4,8` -> [4, 8]. UserError for what is none."""
    try:
        bits = sorted({int(word) for word in text.split(",")})
    except ValueError:
        bits = []
    known = BITS["int"][0]
    if not bits or not set(bits) <= set(known):
        raise UserError(f"--bits {text!r}: write some of {', '.join(map(str, known))}, separated by commas")
    return bits


def readable(document: JsonObject) -> list[JsonObject]:
    """Linears by number of bits, the ones that matter most first."""
    return [
        {"layer": row["layer"], "bits": row["bits"], "weights": row["weights"], "effect": f"{row['effect']:.3g}"}
        for row in document["layers"]
    ]


def write(path: Path, made: Allocation) -> None:
    """A fragment for `extends:`, with what was measured as its comment."""
    import yaml

    from qlibero import files

    together, evenly = (f"{error.arm:.4g} {between(error.arm95)}".rstrip() for error in (made.together, made.evenly))
    head = (
        f"# qlibero allocate: {made.mean_bits:g} bits a weight on average, {made.weight_mb:g} MB of codes.\n"
        f"# Arm error on {count_text(made.observations, 'held-out observation')}: {together}, "
        f"with {made.even_bits} bits everywhere {evenly}.\n"
    )
    content = {"quant": {"weight_bits": made.weight_bits, "per_layer_bits": made.per_layer_bits}}
    files.replace(path, head + yaml.safe_dump(content, sort_keys=False))
