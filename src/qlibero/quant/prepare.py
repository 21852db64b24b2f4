"""The artifact of an experiment's arm: found if it was ever made, made if not. What `qlibero quantize` and `run` call.

An artifact lies under <place>/<key>/, where the key is a hash of what it is made from; a second arm, run or machine
with the same settings, checkpoint and data finds the same file. It is looked for in every place of `artifact_places`
and made in the first that can be written, so a checkout mounted read-only runs as well.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from qlibero.cache import cache_directory
from qlibero.config.arms import Arm
from qlibero.config.quantization import Quant
from qlibero.documents import JsonObject
from qlibero.errors import UserError, WorkFailed, cause
from qlibero.places import RUNS
from qlibero.policies import weights_sha256
from qlibero.policies.base import quantizable
from qlibero.quant.action_error import between
from qlibero.quant.against_weights import require_of_weights
from qlibero.quant.artifact import Artifact, artifact_key, load, require, save
from qlibero.quant.inputs import differences, inputs_of, inputs_of_settings
from qlibero.quant.observations import Demonstrations, read_demonstrations
from qlibero.quant.shared_weights import full_policies

if TYPE_CHECKING:
    from qlibero.config.policies import PolicySettings
    from qlibero.config.schema import Experiment
    from qlibero.policies.base import Policy

log = logging.getLogger(__name__)

#: where the artifacts of all runs lie, if it can be written
ARTIFACTS = RUNS / "artifacts"
FILE = "artifact.safetensors"
NO_DATA = Demonstrations((), "none", "none")


@dataclass(frozen=True)
class Found:
    """An artifact, where it lies, and whether it had to be made (then `seconds` says how long that took)."""

    artifact: Artifact
    path: Path
    made: bool
    seconds: float

    def summary(self) -> JsonObject:
        """One JSON-ready row about it."""
        layers = self.artifact.layers
        executed = [layer for layer in layers if layer.executed]
        measured = [layer.sqnr_db for layer in executed if layer.sqnr_db is not None]
        codes, bf16 = (
            sum(x.codes_bytes + x.scales_bytes for x in layers),
            sum(2 * x.out_features * x.in_features for x in layers),
        )
        return {
            "path": str(self.path),
            "key": self.artifact.key,
            "sha256": self.artifact.sha256,
            "settings": self.artifact.spec.label,
            "made": self.made,
            "seconds": round(self.seconds, 1),
            "layers": len(layers),
            "executed": len(executed),
            "kept_in_full_precision": len(self.artifact.calibration["kept_in_full_precision"]),
            "worst_sqnr_db": min(measured, default=None),
            "weight_bytes": codes,
            "transform_bytes": sum(x.transform_bytes for x in layers),
            "bf16_bytes": bf16,
            "action_error": self.artifact.calibration.get("action_error"),
        }


def artifact_places(run_dir: Path | None = None) -> list[Path]:
    """Where artifacts are looked for and made, best first: beside the run, with all runs, in the cache.

    `quant.artifact_dir` replaces them all.
    """
    beside = [] if run_dir is None else [run_dir.parent / "artifacts"]
    return list(dict.fromkeys([*beside, ARTIFACTS, cache_directory("artifacts")]))


def demonstrations(quant: Quant) -> Demonstrations:
    """The observations an arm is calibrated on; none for data-free methods without a path."""
    if quant.calibration is None or quant.calibration.path is None:
        return NO_DATA
    data = read_demonstrations(quant.calibration.path)
    return data.sample(quant.calibration.samples, quant.calibration.seed)


def noise_for(policy: Policy, count: int, seed: int) -> np.ndarray:
    """(count, H, D) float32 flow noise for calibration, from `seed`: other numbers than any evaluation's."""
    return np.random.default_rng([seed, 0x63616C]).standard_normal((count, *policy.noise_shape), dtype=np.float32)


def ensure_artifact(policy: Policy, quant: Quant, places: Sequence[Path] = ()) -> Found:
    """The artifact for `quant` (an arm's settings) and `policy` (in full precision), calibrated now if need be.

    `places` are directories, by default `artifact_places()`.

    Raises:
        WorkFailed: none of the places can be written.
        GuardRefusal: `quant.artifact`, or what lies at the default place, is damaged, stale or foreign.
        UserError: no data, no such file, or settings that do not fit the model.
    """
    from qlibero.quant.calibrate import calibrate

    policy = quantizable(policy)
    checkpoint, inputs = policy.provenance()["sha256"], inputs_of(policy, quant)
    if quant.artifact is not None:
        artifact = load(Path(quant.artifact))
        require(artifact, quant, checkpoint, inputs)
        _say_what_may_differ(artifact, inputs)
        require_of_weights(policy.model, artifact)
        return Found(artifact, Path(quant.artifact), made=False, seconds=0.0)
    data = demonstrations(quant)
    places = _places(quant, places)
    key = artifact_key(quant, checkpoint, data.sha256, inputs)
    if path := _found(key, places):
        artifact = load(path)
        require(artifact, quant, checkpoint, inputs)
        require_of_weights(policy.model, artifact)
        return Found(artifact, path, made=False, seconds=0.0)
    path = _first_writable(places) / key / FILE
    started = time.perf_counter()
    noise = noise_for(policy, len(data.observations), quant.calibration_seed)
    provenance = {
        "data_sha256": data.sha256,
        "source": data.source,
        "seed": quant.calibration_seed,
        "file": quant.calibration.path.name if quant.calibration and quant.calibration.path else None,
    }
    made = calibrate(policy.for_calibration(), data.observations, noise, quant, provenance)
    save(made, path, over=False)  # where another process was first, it may be running on its own
    # From disk on purpose: what runs is what was written, and reading it back proves that it is whole.
    artifact = load(path)
    require(artifact, quant, checkpoint, inputs)
    return Found(artifact, path, made=True, seconds=time.perf_counter() - started)


def _say_what_may_differ(artifact: Artifact, inputs: Mapping[str, str]) -> None:
    if artifact.inputs is None:
        log.warning(f"{artifact.path} does not say on what inputs (profile, statistics, …) it was calibrated")
    elif told := differences(artifact.inputs, inputs):  # those that `require` lets pass
        log.warning(f"{artifact.path} was calibrated in another arithmetic: {'; '.join(told)}")


def _places(quant: Quant, places: Sequence[Path]) -> Sequence[Path]:
    return [Path(quant.artifact_dir)] if quant.artifact_dir is not None else places or artifact_places()


def _found(key: str, places: Sequence[Path]) -> Path | None:
    return next((path for place in places if (path := place / key / FILE).is_file()), None)


def _first_writable(places: Sequence[Path]) -> Path:
    """Asked before calibration, which takes minutes. Permissions do not tell of a read-only mount, so a file does."""
    problems = []
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return place
        except OSError as problem:
            problems.append(f"{place}: {cause(problem)}")
    raise WorkFailed("no place for an artifact can be written: " + "; ".join(problems))


def ready_artifact(
    settings: PolicySettings, checkpoint: str, quant: Quant, places: Sequence[Path] = ()
) -> Artifact | None:
    """The artifact that `ensure_artifact` would find for the policy of `settings`, whose weights have that sha256; None
    if it must be made, or cannot be known without the policy.

    Needs no policy: a policy whose artifact is ready need not load the weights that the artifact replaces.
    """
    path = quant.artifact
    if path is None and (inputs := inputs_of_settings(settings, quant)) is not None:
        key = artifact_key(quant, checkpoint, demonstrations(quant).sha256, inputs)
        path = _found(key, _places(quant, places))
    return load(Path(path)) if path and Path(path).is_file() else None


def replaced_in_all(arms: Sequence[Arm], places: Sequence[Path] = ()) -> frozenset[str]:
    """Weights that none of these arms of one checkpoint needs in full precision, because each is quantized and its
    artifact is ready: they are not even read, so that a full-size W4A8 policy fits where its bf16 language model would
    not."""
    quants = [(arm.policy, arm.quant) for arm in arms if arm.quant is not None]
    if not quants or len(quants) < len(arms):
        return frozenset()
    checkpoint = weights_sha256(arms[0].policy)
    if checkpoint is None:
        return frozenset()
    ready = [ready_artifact(settings, checkpoint, quant, places) for settings, quant in quants]
    artifacts = [artifact for artifact in ready if artifact is not None]
    if len(artifacts) < len(quants):
        return frozenset()
    names = [{f"{layer.name}.weight" for layer in artifact.layers} for artifact in artifacts]
    return frozenset(set.intersection(*names))


def artifact_for(policy: Policy, quant: Quant, places: Sequence[Path] = ()) -> Artifact:
    """`ensure_artifact` for a run: the artifact itself; where it came from is logged."""
    found = ensure_artifact(policy, quant, places)
    how = f"calibrated in {found.seconds:.0f} s" if found.made else "found"
    log.info(f"artifact {found.artifact.spec.label}: {how}, {found.path}")
    return found.artifact


def quantize(experiment: Experiment, root: Path | None = None) -> JsonObject:
    """Make (or find) the artifact of every quantized arm: what `qlibero quantize CONFIG` does and prints.

    Returns {"experiment": …, "artifacts": [{"arms": [...], "path": …, "settings": …, …}]}; arms with equal
    settings share one.
    """
    import torch

    torch.set_num_threads(1)  # as a run has it: the same sums, so the same artifact
    arms = [arm for arm in experiment.arms() if arm.quant is not None]
    if not arms:
        raise UserError(f"experiment {experiment.name} has no quantized arm; add one to `arms`, such as fake")
    policies = full_policies(arms)
    found: dict[str, JsonObject] = {}
    for arm in arms:
        result = ensure_artifact(policies[arm.name], cast("Quant", arm.quant), [root] if root else ())
        row = found.setdefault(os.fspath(result.path), {"arms": [], **result.summary()})
        row["arms"].append(arm.name)
    return {"experiment": experiment.name, "artifacts": list(found.values())}


def measured_sensitivity(experiment: Experiment, path: Path) -> list[JsonObject]:
    """`inspect.sensitivity` of the artifact at `path` with the experiment's policy and calibration observations.

    Raises:
        UserError: the experiment has no calibration data. GuardRefusal: the artifact is not this policy's.
    """
    import torch

    from qlibero.policies import load_policy
    from qlibero.quant.held_out import unseen
    from qlibero.quant.inspect import sensitivity

    torch.set_num_threads(1)
    artifact = load(path)
    arms = [arm for arm in experiment.arms() if arm.quant is not None and arm.quant.calibration]

    def apart(arm: Arm) -> tuple[bool, int]:
        asked = inputs_of_settings(arm.policy, artifact.spec)
        others = differences(artifact.inputs, asked) if artifact.inputs and asked else []
        return weights_sha256(arm.policy) != artifact.checkpoint_sha256, len(others)

    arm = min(arms, key=apart, default=None)  # of several policies, the one that the artifact is of
    if arm is None:
        raise UserError(
            f"experiment {experiment.name} names no calibration data, which the measurement needs: "
            "give quant.calibration.path"
        )
    data, _, _ = unseen([cast("Quant", arm.quant)])
    policy = quantizable(load_policy(arm.policy))
    require(artifact, None, policy.provenance()["sha256"], inputs_of(policy, artifact.spec))
    noise = noise_for(policy, len(data.observations), artifact.spec.calibration_seed)
    return sensitivity(policy, artifact, data.observations, noise)


def readable(document: JsonObject) -> list[JsonObject]:
    """`quantize`'s document as short rows for a terminal."""
    return [
        {
            "arms": row["arms"],
            "settings": row["settings"],
            "layers": f"{row['layers']}, {row['executed']} run",
            "worst SQNR dB": row["worst_sqnr_db"] and round(row["worst_sqnr_db"], 1),
            "weights / bf16": f"{row['weight_bytes'] / row['bf16_bytes']:.3f}",
            "with transforms": f"{(row['weight_bytes'] + row['transform_bytes']) / row['bf16_bytes']:.3f}",
            "arm error": row["action_error"] and f"{row['action_error']['arm']:.4f}",
            "95 %": row["action_error"] and between(row["action_error"]["arm95"]),
            "gripper": row["action_error"]
            and f"{row['action_error']['gripper_changed']}/{row['action_error']['gripper_actions']}",
            "": f"made in {row['seconds']:.0f} s" if row["made"] else "found",
        }
        for row in document["artifacts"]
    ]
