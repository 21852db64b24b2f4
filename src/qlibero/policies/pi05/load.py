"""From the settings of a pi0.5 to a policy that can be asked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from qlibero.config.policies import GPU_BATCH
from qlibero.documents import JsonObject
from qlibero.errors import GuardRefusal, UserError
from qlibero.policies.pi05.checkpoint import Checkpoint, load_model, open_checkpoint, profile_named
from qlibero.policies.pi05.declared import AGENT, WRIST, differences
from qlibero.policies.pi05.family import FAMILY, Family
from qlibero.policies.pi05.inputs import calibration_inputs
from qlibero.policies.pi05.match import ACTION_NUMBERS
from qlibero.policies.pi05.model import Pi05Model, cast, initialize
from qlibero.policies.pi05.normalize import Statistics
from qlibero.policies.pi05.policy import Pi05Policy
from qlibero.policies.pi05.profiles import Profile
from qlibero.policies.pi05.statistics import load_statistics, statistics_files
from qlibero.policies.pi05.tokenizer import Tokenizer, load_tokenizer
from qlibero.policies.settings import CheckpointSettings
from qlibero.policies.structured import Open, fit, read_json

MAX_UNTRAINED = 8_000_000_000
"""Parameters of a network of random weights: the published pi0.5 has 3.35 billion."""


class _UntrainedConfig(Open):
    architecture: Any
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    profile: Any = None


def load_policy(
    config: CheckpointSettings,
    skip: frozenset[str] = frozenset(),
    family: Family = FAMILY,
    loaded: Pi05Policy | None = None,
) -> Pi05Policy:
    """The policy that `config` describes.

    `loaded` is a policy of the same weights: its network is taken. `skip` names linear weights to leave unread on the
    meta device, because an artifact will replace them: that is how a full-size quantized policy loads without its
    full-precision language model ever being on the GPU.

    Raises:
        UserError: no such checkpoint, or one that does not fit (missing, extra, misshapen, non-finite
            tensors, no statistics, no tokenizer, unclear profile); the message lists what, says what to write.
        GuardRefusal: the weights' sha256 is not the expected one.
    """
    if config.untrained is not None:
        return untrained_policy(Path(config.untrained.config), config.untrained.seed, config, family, loaded)
    return _load(config, skip, family, loaded)


def _load(
    config: CheckpointSettings, skip: frozenset[str], family: Family, loaded: Pi05Policy | None = None
) -> Pi05Policy:
    checkpoint, profile, statistics = _opened(config, family)
    digest = checkpoint.weights.sha256
    if config.sha256 and digest != config.sha256:
        raise GuardRefusal(
            f"{checkpoint.weights} has sha256 {digest}, the config expects {config.sha256}: these are other "
            "weights than the ones the config was written for"
        )
    tokenizer = _tokenizer(config, checkpoint.path)
    device, dtype = _place(config)
    model = loaded.model if loaded is not None else load_model(checkpoint, dtype, device, skip)
    name = checkpoint.raw.get("name") or checkpoint.path.name
    identity: JsonObject = {"checkpoint": str(checkpoint.path), "kind": checkpoint.kind, "sha256": digest}
    remarks = [*differences(checkpoint.declared, config.flow_steps, config.replan_steps), *checkpoint.declared.remarks]
    if remarks:
        identity["remarks"] = remarks
    return _policy(config, family, name, model, profile, statistics, tokenizer, identity, checkpoint.declared.cameras)


def _opened(config: CheckpointSettings, family: Family) -> tuple[Checkpoint, Profile, dict[str, Statistics]]:
    """All that is read of a checkpoint before its weights."""
    checkpoint = open_checkpoint(config.folder, family).with_horizon(config.action_horizon)
    profile = choose_profile(checkpoint, config.profile)
    return checkpoint, profile, load_statistics(checkpoint, config.asset_id, config.norm_stats)


def inputs_of(config: CheckpointSettings, family: Family = FAMILY) -> dict[str, str] | None:
    """What `Pi05Policy.calibration_inputs` will say, without the weights; None where there is no checkpoint."""
    if config.checkpoint is None:
        return None
    checkpoint, profile, statistics = _opened(config, family)
    tokenizer, (device, dtype) = _tokenizer(config, checkpoint.path), _place(config)
    cameras = checkpoint.declared.cameras
    return calibration_inputs(
        family.name, checkpoint.config, profile, statistics, tokenizer.sha256, cameras, dtype, device
    )


def _policy(
    config: CheckpointSettings,
    family: Family,
    name: str,
    model: Pi05Model,
    profile: Profile,
    statistics: dict[str, Statistics],
    tokenizer: Tokenizer,
    identity: JsonObject,
    cameras: tuple[int, ...] = (AGENT, WRIST),
) -> Pi05Policy:
    return family.policy(
        name,
        model,
        profile,
        statistics,
        tokenizer,
        batch_size=_batch_size(config, model.action_in_proj.weight.device),
        flow_steps=config.flow_steps,
        cameras=cameras,
        identity={**identity, "parameters": sum(p.numel() for p in model.parameters())},
    )


def _tokenizer(config: CheckpointSettings, folder: Path) -> Tokenizer:
    return load_tokenizer(_tokenizer_path(config, folder))


def _tokenizer_path(config: CheckpointSettings, folder: Path) -> Path:
    return Path(config.tokenizer) if config.tokenizer else folder / "tokenizer.json"


def files_of(config: CheckpointSettings, family: Family = FAMILY) -> list[Path]:
    """Every file that the policy of `config` reads, in a fixed order.

    What is in them decides every action, beside the config itself. Raises UserError like `load_policy`.
    """
    if config.untrained is not None:
        path = Path(config.untrained.config)
        return [path, _tokenizer_path(config, path.parent)]
    checkpoint = open_checkpoint(config.folder, family)
    statistics = statistics_files(checkpoint, config.asset_id, config.norm_stats)
    return [*checkpoint.files, *statistics, _tokenizer_path(config, checkpoint.path)]


def weights_sha256(config: CheckpointSettings, family: Family = FAMILY) -> str | None:
    """The sha256 that the policy's provenance will name, without loading it; None where there is no checkpoint."""
    if config.checkpoint is None:
        return None
    return open_checkpoint(config.folder, family).weights.sha256


def choose_profile(checkpoint: Checkpoint, wanted: str) -> Profile:
    """The profile asked for, or the one the files prove; `UserError` when `auto` and they prove nothing."""
    if wanted == "auto":
        if checkpoint.profile is None:
            raise UserError(
                f"policy.profile: the files of {checkpoint.path} ({checkpoint.kind}) do not prove under which "
                f"semantics the weights were trained; write `profile: {checkpoint.guess}` if that is it. "
                f"{checkpoint.profile_reason}"
            )
        return checkpoint.profile
    profile = checkpoint.family.profiles[wanted]
    if (profile.statistics == "lerobot") != (checkpoint.kind == "lerobot"):
        raise UserError(
            f"policy.profile: {wanted} is for {profile.statistics} checkpoints, {checkpoint.path} is of the "
            f"{checkpoint.kind} kind"
        )
    if checkpoint.profile is not None and checkpoint.profile != profile:
        raise UserError(
            f"policy.profile: {wanted} contradicts {checkpoint.path}/config.json, which says "
            f"{checkpoint.profile.name}; leave it at auto"
        )
    return profile


def untrained_policy(
    path: Path,
    seed: int,
    config: CheckpointSettings,
    family: Family = FAMILY,
    loaded: Pi05Policy | None = None,
) -> Pi05Policy:
    """Random weights from `seed` in the architecture of a config.json, beside which tokenizer.json lies; those of
    `loaded` where they are in memory already. Solves nothing, and its name says so."""
    content = fit(_UntrainedConfig, read_json(path), str(path))
    architecture = family.config.from_dict(content.architecture, str(path))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in family.model(architecture).parameters())
    if parameters > MAX_UNTRAINED:
        raise UserError(f"policy.untrained.config: {path} makes a network of {parameters / 1e9:.0f} G parameters")
    if loaded is not None:
        model, digest = loaded.model, str(loaded.provenance()["sha256"])
    else:
        model, digest = _random_model(architecture, seed, config, family)
    unit = Statistics("quantile", -np.ones(ACTION_NUMBERS), np.ones(ACTION_NUMBERS), 1e-6, 1e-6)
    statistics = {"state": Statistics("quantile", -np.ones(8), np.ones(8), 1e-6, 1e-6), "actions": unit}
    identity = {"checkpoint": None, "kind": "untrained", "sha256": digest, "seed": seed}
    name = f"untrained-{content.name or path.parent.name}-seed{seed}"
    profile = profile_named(content.profile or family.own_profile, path, family)
    return _policy(config, family, name, model, profile, statistics, _tokenizer(config, path.parent), identity)


def _random_model(architecture: Any, seed: int, config: CheckpointSettings, family: Family) -> tuple[Pi05Model, str]:
    """On its device, and the sha256 that names it."""
    device, dtype = _place(config)
    model = initialize(family.model(architecture), seed)
    digest = hashlib.sha256(json.dumps([architecture.to_dict(), seed], sort_keys=True).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    model = cast(model, dtype).to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, digest.hexdigest()


def _place(config: CheckpointSettings) -> tuple[torch.device, torch.dtype]:
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"policy.device: {config.device}, but this process sees no GPU; `qlibero doctor` says why")
    device = torch.device(kind)
    if config.dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, getattr(torch, config.dtype)


def _batch_size(config: CheckpointSettings, device: torch.device) -> int:
    """One row at a time on a CPU, where a padded row costs a whole one."""
    if config.batch_size == "auto":
        return GPU_BATCH if device.type == "cuda" else 1
    return config.batch_size
