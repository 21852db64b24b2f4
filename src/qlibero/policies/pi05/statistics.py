"""Reading a checkpoint's normalisation statistics, in openpi's and in LeRobot's files. Missing ones are an
error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from qlibero.errors import UserError
from qlibero.policies.pi05.checkpoint import Checkpoint, read_json
from qlibero.policies.pi05.normalize import Mode, Statistics, from_lerobot, from_openpi


def load_statistics(checkpoint: Checkpoint) -> dict[str, Statistics]:
    """{"state": …, "actions": …}; `UserError` when the files are missing or incomplete."""
    if checkpoint.kind == "lerobot":
        return {
            "state": _lerobot_statistics(
                checkpoint.path, "policy_preprocessor.json", "observation.state", "STATE"
            ),
            "actions": _lerobot_statistics(checkpoint.path, "policy_postprocessor.json", "action", "ACTION"),
        }
    path = statistics_file(checkpoint)
    content = read_json(path).get("norm_stats", {})
    mode: Mode = checkpoint.raw.get("normalization", "quantile")
    return {
        name: from_openpi(content.get(name, {}), mode, f"{path}: {name}") for name in ("state", "actions")
    }


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


def _lerobot_statistics(path: Path, processor: str, feature: str, kind: str) -> Statistics:
    for step in _steps(path, processor):
        if step.get("registry_name") not in ("normalizer_processor", "unnormalizer_processor"):
            continue
        modes = step.get("config", {}).get("norm_map", {})
        mode = {"QUANTILES": "quantile", "MEAN_STD": "mean_std"}.get(modes.get(kind))
        if mode is None:
            raise UserError(
                f"{path / processor}: normalisation {modes.get(kind)!r} of {kind} is not supported; "
                "known: QUANTILES, MEAN_STD"
            )
        state = path / step.get("state_file", "")
        if not state.is_file():
            raise UserError(
                f"{path / processor} names the statistics file {step.get('state_file')!r}, which is not there"
            )
        with safe_open(state, framework="pt") as file:
            entry = {
                key.rpartition(".")[2]: file.get_tensor(key).double().numpy()
                for key in file.keys()
                if key.rpartition(".")[0] == feature
            }
        return from_lerobot(entry, mode, f"{state}: {feature}")
    raise UserError(
        f"{path / processor} has no normaliser step; LeRobot checkpoints carry their statistics in "
        f"{processor} and a safetensors file it names"
    )


def _steps(path: Path, name: str) -> list[dict[str, Any]]:
    return read_json(path / name).get("steps", []) if (path / name).is_file() else []
