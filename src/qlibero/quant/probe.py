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
from qlibero.quant.action_error import action_error, arm_error, between
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


def probe(
    experiment: Experiment, questions: Callable[[Experiment, QuantizablePolicy], Questions] = of_demonstrations
) -> JsonObject:
    """Ask every arm. Returns {"experiment", "observations", "source", "episodes": of which each observation is part,
    "arms": [{"arm", "label", "arm_error", "arm95", "ratio", "ratio95", "gripper_changed", "gripper_actions", "phases":
    {phase: median}, "errors": one an observation}]}.

    arm_error is the median over observations of the root mean square change of the arm's executed actions; ratio the
    geometric mean, over observations, of this arm's change over the first quantized arm's, with its 95 % interval.

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
    rows: list[JsonObject] = []
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
        rows.append(
            {
                "arm": arm.name,
                "label": ", ".join([arm.quant.label if arm.quant else arm.backend, *overrides_of(experiment, arm)]),
                "arm_error": summary.arm,
                "arm95": summary.arm95,
                **ratio(errors, first),
                "gripper_changed": summary.gripper_changed,
                "gripper_actions": summary.gripper_actions,
                "phases": {
                    phase: float(np.median(errors[here])) for phase in PHASES if (here := phases == phase).any()
                },
                "errors": errors.tolist(),
            }
        )
    return {
        "experiment": experiment.name,
        "observations": len(exact),
        "unseen": asked_of.unseen,
        "steps": steps,
        "source": asked_of.source,
        "episodes": list(asked_of.episodes),
        "arm_action": action_error(exact, exact, steps).arm_action,
        "arms": rows,
    }


def ratio(errors: np.ndarray, first: np.ndarray | None) -> JsonObject:
    """{"ratio", "ratio95"}: geometric mean of paired ratios and Student's interval of its logarithm; None without a
    reference, of one observation, or where an error is zero."""
    if first is None or len(errors) < 2 or not (errors > 0).all() or not (first > 0).all():
        return {"ratio": None, "ratio95": None}
    from scipy.special import stdtrit

    logs = np.log(errors / first)
    half = float(stdtrit(len(logs) - 1, 0.975)) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    middle = float(logs.mean())
    return {"ratio": math.exp(middle), "ratio95": (math.exp(middle - half), math.exp(middle + half))}


def readable(document: JsonObject) -> list[JsonObject]:
    """The arms as rows for a terminal."""
    return [
        {
            "arm": row["arm"],
            "settings": row["label"],
            "arm error": f"{row['arm_error']:.4f}",
            "95 %": between(row["arm95"]),
            "over the first": "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            "95 % ": between(row["ratio95"], 2),
            "gripper": f"{row['gripper_changed']}/{row['gripper_actions']}",
            **{phase: f"{value:.4f}" for phase, value in row["phases"].items()},
            **({"flips, AUC": row["flips"]} if "flips" in row else {}),
        }
        for row in document["arms"]
    ]
