"""Reading a checkpoint's normalisation statistics, in openpi's and in LeRobot's files. Missing ones are an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from safetensors import safe_open

from qlibero.errors import UserError
from qlibero.policies.pi05.checkpoint import Checkpoint, read_json
from qlibero.policies.pi05.normalize import Mode, Statistics, from_lerobot, from_openpi

NUMBERS = {"state": 8, "actions": 7}
"""What LIBERO's robot has; statistics may have more (padded) dimensions."""
_LEROBOT = {
    "state": ("policy_preprocessor.json", "observation.state", "STATE"),
    "actions": ("policy_postprocessor.json", "action", "ACTION"),
}


def load_statistics(checkpoint: Checkpoint) -> dict[str, Statistics]:
    """{"state": …, "actions": …}; `UserError` when the files are missing or incomplete."""
    modes = normalization(checkpoint)
    found = {}
    for name, (mode, _) in modes.items():
        if checkpoint.kind == "lerobot":
            entry, where = _lerobot_entry(checkpoint.path, name)
            found[name] = from_lerobot(entry, mode, where)
        else:
            path = statistics_file(checkpoint)
            entry = read_json(path).get("norm_stats", {}).get(name, {})
            found[name] = from_openpi(entry, mode, f"{path}: {name}")
        if len(found[name].low) < NUMBERS[name]:
            raise UserError(
                f"{checkpoint.path}: statistics of {len(found[name].low)} {name} numbers; LIBERO has {NUMBERS[name]}"
            )
    return found


def normalization(checkpoint: Checkpoint) -> dict[str, tuple[Mode, str]]:
    """{"state": (mode, why), "actions": …}. `UserError` when the files name no mode, or one that is not known."""
    if checkpoint.kind == "lerobot":
        return {name: _lerobot_mode(checkpoint.path, name) for name in NUMBERS}
    mode = checkpoint.raw.get("normalization")
    if mode is None and checkpoint.kind == "openpi":
        # Its files do not say; its training config does: use_quantile_norm = model_type != ModelType.PI0.
        why = "openpi normalises every pi0.5 by quantiles, and the tensors (AdaRMS) are a pi0.5's"
        return dict.fromkeys(NUMBERS, ("quantile", why))
    if mode not in get_args(Mode):
        raise UserError(
            f"{checkpoint.path}/config.json: normalization is {mode!r}; write one of {', '.join(get_args(Mode))}, "
            "whichever the weights were trained with"
        )
    return dict.fromkeys(NUMBERS, (mode, "config.json names it"))


def statistics_file(checkpoint: Checkpoint) -> Path:
    """The one assets/**/norm_stats.json of an openpi-style directory."""
    found = sorted((checkpoint.path / "assets").glob("**/norm_stats.json"))
    if len(found) != 1:
        have = (
            f"found {len(found)}: {', '.join(str(p.relative_to(checkpoint.path)) for p in found)}"
            if found
            else "found none"
        )
        raise UserError(
            f"checkpoint {checkpoint.path} needs exactly one assets/<asset id>/norm_stats.json, {have}; openpi's "
            "conversion leaves assets/ in the parent folder of the JAX checkpoint: copy it here by hand"
        )
    return found[0]


def statistics_files(checkpoint: Checkpoint) -> list[Path]:
    """Every file that `load_statistics` reads."""
    if checkpoint.kind != "lerobot":
        return [statistics_file(checkpoint)]
    found = []
    for processor, _, _ in _LEROBOT.values():
        step = _normalizer(checkpoint.path, processor)
        found += [checkpoint.path / processor, checkpoint.path / step.get("state_file", "")]
    return found


def _lerobot_mode(path: Path, name: str) -> tuple[Mode, str]:
    processor, _, kind = _LEROBOT[name]
    said = _normalizer(path, processor).get("config", {}).get("norm_map", {}).get(kind)
    mode = {"QUANTILES": "quantile", "MEAN_STD": "mean_std"}.get(said)
    if mode is None:
        raise UserError(
            f"{path / processor}: normalisation {said!r} of {kind} is not supported; known: QUANTILES, MEAN_STD"
        )
    return mode, f"{processor} says {said}"


def _lerobot_entry(path: Path, name: str) -> tuple[dict[str, Any], str]:
    processor, feature, _ = _LEROBOT[name]
    step = _normalizer(path, processor)
    state = path / step.get("state_file", "")
    if not state.is_file():
        raise UserError(f"{path / processor} names the statistics file {step.get('state_file')!r}, which is not there")
    with safe_open(state, framework="pt") as file:
        entry = {
            key.rpartition(".")[2]: file.get_tensor(key).double().numpy()
            for key in file.keys()
            if key.rpartition(".")[0] == feature
        }
    return entry, f"{state}: {feature}"


def _normalizer(path: Path, processor: str) -> dict[str, Any]:
    steps = read_json(path / processor).get("steps", []) if (path / processor).is_file() else []
    for step in steps:
        if step.get("registry_name") in ("normalizer_processor", "unnormalizer_processor"):
            return step
    raise UserError(
        f"{path / processor} has no normaliser step; LeRobot checkpoints carry their statistics in "
        f"{processor} and a safetensors file it names"
    )
