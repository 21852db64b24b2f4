"""What each arm of an experiment does to actions along demonstrations: a first answer before any rollout.

Every arm is asked the same observations with the same noise as full precision, observations that no arm was fitted on.
What comes of it is open loop: it says how far the next actions move, not whether the episode is still won.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from qlibero.activity import doing
from qlibero.documents import JsonObject
from qlibero.errors import UserError
from qlibero.quant.action_error import ActionError, action_error, arm_error, between
from qlibero.quant.held_out import PHASES, unseen

if TYPE_CHECKING:
    from qlibero.config.schema import Experiment
    from qlibero.policies.base import Observation, QuantizablePolicy


@dataclass(frozen=True)
class Questions:
    """What arms are asked. noise (n, H, D) float32; phases: a word of `PHASES` for each observation; unseen: whether no
    arm was fitted on any of them; source: where they come from; episodes: of which each is part, if of any."""

    observations: Sequence[Observation]
    noise: np.ndarray
    phases: Sequence[str]
    unseen: bool
    source: str
    episodes: Sequence[str] = ()


def of_demonstrations(experiment: Experiment, policy: QuantizablePolicy) -> Questions:
    """Observations of the experiment's calibration file that none of its arms was fitted on."""
    from qlibero.quant.prepare import noise_for

    data, phases, fresh = unseen([arm.quant for arm in experiment.arms() if arm.quant is not None])
    noise = noise_for(policy, len(data.observations), experiment.seed)
    return Questions(data.observations, noise, phases, fresh, data.source)


@dataclass(frozen=True)
class Ratio:
    """Geometric mean of paired ratios and its 95 % interval; None without a reference, of one observation, or where an
    error is zero."""

    mean: float | None
    interval95: tuple[float, float] | None


@dataclass(frozen=True)
class Flips:
    """Of `pairs` recorded episodes, those that ended otherwise than the baseline's; area under the curve by which the
    error along an episode tells them, with its 95 % interval."""

    flipped: int
    pairs: int
    auc: float | None
    auc95: tuple[float, float] | None

    def __str__(self) -> str:
        return f"{self.flipped}/{self.pairs}" + ("" if self.auc is None else f", {self.auc:.2f}")


@dataclass(frozen=True)
class ProbedArm:
    """change: of the executed actions; ratio: of this arm's change to the first quantized arm's; phases: median change
    by phase of an episode; errors (n,): root mean square change of each observation's arm actions."""

    arm: str
    label: str
    change: ActionError
    ratio: Ratio
    phases: dict[str, float]
    errors: np.ndarray
    flips: Flips | None = None

    def to_json(self) -> JsonObject:
        """One of `Probed.to_json`'s arms."""
        flips: JsonObject = {}
        if self.flips is not None:
            flips = {"flipped": self.flips.flipped, "flip_auc": self.flips.auc, "flip_auc95": self.flips.auc95}
            flips["flips"] = str(self.flips)
        return {
            "arm": self.arm,
            "label": self.label,
            "arm_error": self.change.arm,
            "arm95": self.change.arm95,
            "ratio": self.ratio.mean,
            "ratio95": self.ratio.interval95,
            "gripper_changed": self.change.gripper_changed,
            "gripper_actions": self.change.gripper_actions,
            "phases": self.phases,
            "errors": self.errors.tolist(),
            **flips,
        }


@dataclass(frozen=True)
class Probed:
    """What every arm does; `steps` of a chunk are executed; episodes: of which each observation is part, if of any."""

    experiment: str
    observations: int
    unseen: bool
    steps: int
    source: str
    episodes: tuple[str, ...]
    arm_action: float
    arms: tuple[ProbedArm, ...]

    def to_json(self) -> JsonObject:
        """What the command prints."""
        return {
            "experiment": self.experiment,
            "observations": self.observations,
            "unseen": self.unseen,
            "steps": self.steps,
            "source": self.source,
            "episodes": list(self.episodes),
            "arm_action": self.arm_action,
            "arms": [arm.to_json() for arm in self.arms],
        }


def probe(
    experiment: Experiment, questions: Callable[[Experiment, QuantizablePolicy], Questions] = of_demonstrations
) -> Probed:
    """Ask every arm.

    Raises UserError without an arm but the baseline, or without demonstrations.
    """
    import torch

    from qlibero.config.arms import Arm, overrides_of
    from qlibero.policies.base import RearrangeablePolicy, quantizable
    from qlibero.quant.apply import quantize_policy
    from qlibero.quant.prepare import artifact_for
    from qlibero.quant.shared_weights import full_policies

    torch.set_num_threads(1)
    arms = [arm for arm in experiment.arms() if arm.backend != "baseline" or arm.policy != experiment.policy]
    if not arms:
        raise UserError(f"experiment {experiment.name} has no arm beside the baseline; add one to `arms`, such as fake")
    reference = Arm("", "baseline", None, experiment.policy)  # its name is no arm's
    policies = full_policies([reference, *arms])
    policy = quantizable(policies[""])
    asked_of = questions(experiment, policy)
    noise, phases = asked_of.noise, np.array(asked_of.phases)
    steps = experiment.policy.replan_steps
    exact = policy.infer(asked_of.observations, noise).actions
    probed: list[ProbedArm] = []
    first: np.ndarray | None = None
    for index, arm in enumerate(arms):
        doing("probing arms", index, len(arms))
        asked = policies[arm.name]
        if asked.noise_shape != policy.noise_shape:
            raise UserError(
                f"arm {arm.name}: its chunks have the shape {asked.noise_shape}, the experiment's policy makes "
                f"{policy.noise_shape}: their actions cannot be set side by side"
            )
        if arm.quant is not None:
            asked = quantize_policy(quantizable(asked), artifact_for(asked, arm.quant), "fake")
        elif arm.backend == "aa":
            asked = cast("RearrangeablePolicy", asked).rearranged(arm.replicate)
        found = asked.infer(asked_of.observations, noise).actions
        errors, summary = arm_error(exact, found, steps), action_error(exact, found, steps)
        if first is None and arm.quant is not None:
            first = errors
        probed.append(
            ProbedArm(
                arm.name,
                ", ".join([arm.quant.label if arm.quant else arm.backend, *overrides_of(experiment, arm)]),
                summary,
                ratio(errors, first),
                {phase: float(np.median(errors[here])) for phase in PHASES if (here := phases == phase).any()},
                errors,
            )
        )
    return Probed(
        experiment=experiment.name,
        observations=len(exact),
        unseen=asked_of.unseen,
        steps=steps,
        source=asked_of.source,
        episodes=tuple(asked_of.episodes),
        arm_action=action_error(exact, exact, steps).arm_action,
        arms=tuple(probed),
    )


def ratio(errors: np.ndarray, first: np.ndarray | None) -> Ratio:
    """Of paired errors; the interval is Student's, of the logarithm."""
    if first is None or len(errors) < 2 or not (errors > 0).all() or not (first > 0).all():
        return Ratio(None, None)
    from scipy.special import stdtrit

    logs = np.log(errors / first)
    half = float(stdtrit(len(logs) - 1, 0.975)) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    middle = float(logs.mean())
    return Ratio(math.exp(middle), (math.exp(middle - half), math.exp(middle + half)))


def readable(found: Probed) -> list[JsonObject]:
    """The arms as rows for a terminal."""
    return [
        {
            "arm": row.arm,
            "settings": row.label,
            "arm error": f"{row.change.arm:.4f}",
            "95 %": between(row.change.arm95),
            "over the first": "" if row.ratio.mean is None else f"{row.ratio.mean:.2f}",
            "95 % ": between(row.ratio.interval95, 2),
            "gripper": f"{row.change.gripper_changed}/{row.change.gripper_actions}",
            **{phase: f"{value:.4f}" for phase, value in row.phases.items()},
            **({"flips, AUC": str(row.flips)} if row.flips is not None else {}),
        }
        for row in found.arms
    ]
