"""Reading a checkpoint's normalisation statistics, in openpi's and in LeRobot's files. Missing ones are an error, and
so are those of another robot than LIBERO's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import numpy as np
from pydantic import Field
from safetensors import SafetensorError, safe_open

from qlibero.documents import JsonObject
from qlibero.errors import UserError
from qlibero.policies.pi05.checkpoint import Checkpoint
from qlibero.policies.pi05.lerobot import POST, PRE, LerobotFiles
from qlibero.policies.pi05.normalize import Mode, Statistics, from_lerobot, from_openpi
from qlibero.policies.structured import Open, fit, read_json, short

NUMBERS = {"state": 8, "actions": 7}
"""What LIBERO's robot has; statistics may be padded to more dimensions."""
LARGEST = 1e3
"""Far above anything LIBERO's robot measures or is told (metres, radians, a unit of control)."""
FILE = "norm_stats.json"
_KEYS = ("mean", "std", "q01", "q99")
_ZERO = 1e-6
_LEROBOT = {"state": (PRE, "observation.state", "STATE"), "actions": (POST, "action", "ACTION")}

_Numbers = Annotated[list[float], Field(min_length=1, max_length=4096)] | None


class _Entry(Open):
    mean: _Numbers = None
    std: _Numbers = None
    q01: _Numbers = None
    q99: _Numbers = None


class _NormStats(Open):
    norm_stats: JsonObject = Field(max_length=64)


def load_statistics(
    checkpoint: Checkpoint, asset_id: str | None = None, norm_stats: Path | None = None
) -> dict[str, Statistics]:
    """{"state": …, "actions": …}, from the file `norm_stats`, or the checkpoint's own of `asset_id`.

    Raises UserError when there are none or several, when they are incomplete, or not those of LIBERO's robot.
    """
    modes = normalization(checkpoint)
    found = {}
    for name, (mode, _) in modes.items():
        if checkpoint.lerobot is not None:
            _not_for_lerobot(checkpoint, asset_id, norm_stats)
            entry, where = _lerobot_entry(checkpoint, checkpoint.lerobot, name)
        else:
            path = statistics_file(checkpoint, asset_id, norm_stats)
            stats = fit(_NormStats, read_json(path), str(path)).norm_stats
            if name not in stats:
                raise UserError(f"{path}: norm_stats.{name} is missing; found: {short(', '.join(sorted(stats)))}")
            entry = fit(_Entry, stats[name], str(path), at=f"norm_stats.{name}").model_dump(include=set(_KEYS))
            where = f"{path}: {name}"
        arrays = {key: np.asarray(entry[key], np.float64) for key in _KEYS if entry.get(key) is not None}
        _require_libero(name, mode, arrays, where)
        found[name] = (from_lerobot if checkpoint.lerobot is not None else from_openpi)(arrays, mode, where)
    return found


def normalization(checkpoint: Checkpoint) -> dict[str, tuple[Mode, str]]:
    """{"state": (mode, why), "actions": …}. `UserError` when the files name no mode, or one that is not known."""
    if checkpoint.lerobot is not None:
        return {name: _lerobot_mode(checkpoint, checkpoint.lerobot, name) for name in NUMBERS}
    mode = checkpoint.raw.get("normalization")
    if mode is None and checkpoint.kind == "openpi":
        return dict.fromkeys(NUMBERS, checkpoint.family.openpi_mode)
    known: dict[str, Mode] = {word: word for word in get_args(Mode)}
    if not isinstance(mode, str) or mode not in known:
        raise UserError(
            f"{checkpoint.path}/config.json: normalization is {short(mode)!r}; write one of "
            f"{', '.join(known)}, whichever the weights were trained with"
        )
    return dict.fromkeys(NUMBERS, (known[mode], "config.json names it"))


def statistics_files(checkpoint: Checkpoint, asset_id: str | None = None, norm_stats: Path | None = None) -> list[Path]:
    """Every file that `load_statistics` reads."""
    if checkpoint.lerobot is None:
        return [statistics_file(checkpoint, asset_id, norm_stats)]
    _not_for_lerobot(checkpoint, asset_id, norm_stats)
    found = []
    for processor, _, _ in _LEROBOT.values():
        found += [checkpoint.path / processor, _state_file(checkpoint, checkpoint.lerobot, processor)]
    return found


def statistics_file(checkpoint: Checkpoint, asset_id: str | None = None, norm_stats: Path | None = None) -> Path:
    """The norm_stats.json of an openpi-style directory: the one named, the one of the asset id named (by the user or by
    config.json), or the only one there is, in assets/<asset id>/, <asset id>/ or the directory itself."""
    if norm_stats is not None:
        if asset_id is not None:
            raise UserError("policy: asset_id and norm_stats both say which statistics to read; give one")
        return Path(norm_stats)
    path, found = checkpoint.path, asset_ids(checkpoint.path)
    listed = ", ".join(f"{name or '(none)'} ({file.relative_to(path)})" for name, file in found.items())
    wanted = asset_id or checkpoint.raw.get("asset_id")
    if wanted:
        if wanted in found:
            return found[wanted]
        said = f"policy.asset_id is {wanted}" if asset_id else f"{path}/config.json: asset_id is {short(wanted)}"
        raise UserError(f"{said}, of which {path} has no {FILE}; found: {listed or 'none'}. {_CURE}")
    if len(found) != 1:
        have = f"found {len(found)} asset ids: {listed}; write policy.asset_id" if found else f"found none; {_CURE}"
        raise UserError(f"checkpoint {path} needs exactly one assets/<asset id>/{FILE}, {have}")
    return next(iter(found.values()))


_CURE = (
    "openpi's conversion leaves assets/ in the parent folder of the JAX checkpoint: copy it here by hand, or name the "
    "file with policy.norm_stats"
)


def asset_ids(path: Path) -> dict[str, Path]:
    """{asset id: its norm_stats.json} of a directory; "" is a file beside the weights."""
    found: dict[str, Path] = {}
    assets = path / "assets"
    for file in [
        *sorted(assets.glob(f"**/{FILE}")),
        *(path / FILE,),
        *sorted(path.glob(f"*/{FILE}")),
        *sorted(path.glob(f"*/*/{FILE}")),
    ]:
        root = assets if file.is_relative_to(assets) else path
        if file.is_file():
            name = str(file.parent.relative_to(root)).removeprefix(".")
            # one id in two places is two statistics: the second is listed under its whole path
            if found.get(name, file) != file:
                name = str(file.parent.relative_to(path))
            found.setdefault(name, file)
    return found


def _require_libero(name: str, mode: Mode, arrays: dict[str, np.ndarray], where: str) -> None:
    """UserError for statistics that no data of LIBERO's robot can have."""
    wanted = NUMBERS[name]
    lengths = {len(values) if values.ndim == 1 else -1 for values in arrays.values()}
    if len(lengths) > 1 or -1 in lengths:
        shapes = ", ".join(f"{key} {list(values.shape)}" for key, values in arrays.items())
        raise UserError(f"{where}: statistics are vectors of one length; found {shapes}")
    for key, values in arrays.items():
        if not np.isfinite(values).all():
            raise UserError(f"{where}: {key} is not finite in dimension {int(np.argmin(np.isfinite(values)))}")
    dimensions = next(iter(lengths), 0)
    real = next((n for n in range(dimensions, 0, -1) if not _padding({k: v[n - 1] for k, v in arrays.items()})), 0)
    if arrays and real != wanted:
        padded = f" (of {dimensions}, the others are padding)" if real != dimensions else ""
        raise UserError(
            f"{where}: statistics of {real} {name} numbers{padded}; LIBERO's robot has {wanted}: these are another "
            "robot's, or another quantity's"
        )
    for key, values in arrays.items():
        worst = int(np.argmax(np.abs(values)))
        if abs(values[worst]) > LARGEST:
            raise UserError(
                f"{where}: {key} is {values[worst]:g} in dimension {worst}; nothing of LIBERO is that large"
            )
    if "std" in arrays and (arrays["std"] < 0).any():
        raise UserError(f"{where}: std is negative in dimension {int(np.argmin(arrays['std']))}")
    if {"q01", "q99"} <= arrays.keys() and (wrong := np.flatnonzero(arrays["q01"] > arrays["q99"])).size:
        raise UserError(f"{where}: q01 is above q99 in dimension {int(wrong[0])}; were they exchanged?")
    if mode == "quantile" and {"q01", "q99"} <= arrays.keys():
        spread = arrays["q99"] - arrays["q01"]
    else:
        spread = arrays.get("std", np.ones(wanted))
    still = np.flatnonzero(spread[:wanted] <= _ZERO)
    # An action that is always the same is played back as that; a state would be divided by nothing.
    if still.size and (name == "state" or still.size == wanted):
        raise UserError(f"{where}: the {name} do not vary in dimension {int(still[0])}, in LIBERO they do")


def _padding(dimension: dict[str, float]) -> bool:
    """Whether one dimension holds no data: all zeros (std 0 or 1), or the identity in every statistic."""

    def near(key: str, *values: float) -> bool:
        return key not in dimension or any(abs(dimension[key] - value) <= _ZERO for value in values)

    centred = near("mean", 0.0) and near("std", 0.0, 1.0)
    identity = {"mean", "std"} <= dimension.keys() and near("q01", -1.0) and near("q99", 1.0)
    return centred and ((near("q01", 0.0) and near("q99", 0.0)) or identity)


def _not_for_lerobot(checkpoint: Checkpoint, asset_id: str | None, norm_stats: Path | None) -> None:
    for key, value in (("asset_id", asset_id), ("norm_stats", norm_stats)):
        if value is not None:
            raise UserError(
                f"policy.{key}: {checkpoint.path} is a LeRobot checkpoint, whose statistics are in {PRE} and {POST}; "
                "leave the key out"
            )


def _lerobot_mode(checkpoint: Checkpoint, lerobot: LerobotFiles, name: str) -> tuple[Mode, str]:
    processor, _, kind = _LEROBOT[name]
    said = lerobot.normalizer(processor).config.get("norm_map")
    said = said.get(kind) if isinstance(said, dict) else said
    modes: dict[str, Mode] = {"QUANTILES": "quantile", "MEAN_STD": "mean_std"}
    mode = modes.get(said) if isinstance(said, str) else None
    if mode is None:
        raise UserError(
            f"{checkpoint.path / processor}: normalisation {short(said)!r} of {kind} is not supported; known: "
            "QUANTILES, MEAN_STD"
        )
    return mode, f"{processor} says {said}"


def _lerobot_entry(checkpoint: Checkpoint, lerobot: LerobotFiles, name: str) -> tuple[JsonObject, str]:
    processor, feature, _ = _LEROBOT[name]
    file = _state_file(checkpoint, lerobot, processor)
    images = lerobot.normalizer(processor).config["norm_map"].get("VISUAL", "IDENTITY")
    entry = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                of, _, statistic = key.rpartition(".")
                if of == feature and statistic in _KEYS:
                    entry[statistic] = tensors.get_tensor(key).double().numpy()
                elif of.startswith("observation.image") and images != "IDENTITY":
                    raise UserError(
                        f"{checkpoint.path / processor}: normalisation {short(images)!r} of VISUAL, with statistics of "
                        f"{of}, is not supported; {checkpoint.family.title} takes frames as they are (IDENTITY)"
                    )
    except (SafetensorError, OSError, ValueError, MemoryError, TypeError) as error:
        raise UserError(f"{file} cannot be read as safetensors: {error}") from None
    return entry, f"{file}: {feature}"


def _state_file(checkpoint: Checkpoint, lerobot: LerobotFiles, processor: str) -> Path:
    name = lerobot.normalizer(processor).state_file
    file = checkpoint.path / (name or "")
    if name is None or not file.is_file():
        raise UserError(
            f"{checkpoint.path / processor} names the statistics file {short(name)!r}, which is not there; without it "
            "LeRobot leaves states and actions as they are, silently"
        )
    return file
