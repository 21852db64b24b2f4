"""Reading a checkpoint directory: strictly, or not at all.

Three kinds of directory are understood. All hold `model.safetensors` (or shards and their index); they differ in the
rest:

`qlibero`  ours: openpi's names, tokenizer.json, assets/<id>/norm_stats.json, and a config.json that says it all
`openpi`   openpi's PyTorch: assets/<id>/norm_stats.json (often missing: openpi#810), sizes by shape, config.json or not
`lerobot`  LeRobot: names prefixed `model.`, policy_preprocessor.json with its normaliser safetensors

A missing, extra, misshapen, doubled or absurd tensor is an error that lists it; there is no path on which a network
with random weights comes back (LeRobot's own loader has one, even with strict=True).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from qlibero import files
from qlibero.documents import JsonObject
from qlibero.errors import UserError
from qlibero.policies.pi05.architecture import architecture
from qlibero.policies.pi05.config import Pi05Config
from qlibero.policies.pi05.declared import Declared
from qlibero.policies.pi05.family import FAMILY, Family
from qlibero.policies.pi05.lerobot import PRE, LerobotFiles, read_lerobot
from qlibero.policies.pi05.model import Pi05Model, is_float32_island
from qlibero.policies.pi05.normalize import Mode
from qlibero.policies.pi05.profiles import Profile
from qlibero.policies.pi05.tensor_table import TensorTable, faulty, tensor_table
from qlibero.policies.pi05.unreadable import require_type
from qlibero.policies.pi05.weights import WEIGHTS, Weights, fault_of, find_weights, sha256
from qlibero.policies.structured import Open, Strict, fit, read_json, short

Kind = Literal["qlibero", "openpi", "lerobot"]
_Text = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]+$")]


READERS = 8
"""Threads that read weights; what is found in them and where they go takes longer than the disk."""


class _Ours(Strict):
    """config.json of our own kind. `architecture` is `Pi05Config`'s."""

    format: str
    name: _Text | None = None
    profile: Any = None
    normalization: Any = None
    asset_id: _Text | None = None
    architecture: Any = None


class _Openpi(Open):
    """config.json of openpi's converter; its trainer writes none."""

    action_dim: Annotated[int, Field(ge=1, le=1024)] | None = None
    action_horizon: Annotated[int, Field(ge=1, le=1000)] | None = None
    max_token_len: Annotated[int, Field(ge=2, le=4096)] | None = None
    asset_id: _Text | None = None
    name: _Text | None = None
    pi05: bool | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A directory, looked at but not loaded."""

    path: Path
    family: Family
    kind: Kind
    config: Pi05Config
    """`action_horizon` is 0 where no file says it."""
    profile: Profile | None
    """What the files prove; None when they prove nothing and the user has to say."""
    guess: str
    """Name of the most likely profile."""
    profile_reason: str
    """Why it is proven or likely."""
    weights: Weights
    declared: Declared
    raw: JsonObject = field(repr=False)
    """config.json."""
    lerobot: LerobotFiles | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor in the files, by the files' names."""
        return self.weights.shapes

    @property
    def files(self) -> list[Path]:
        """Weights, their index and config.json: what was read to know this."""
        index = [self.weights.index] if self.weights.index else []
        settings = self.path / "config.json"
        return [*self.weights.files, *index, *([settings] if settings.is_file() else [])]

    def with_horizon(self, said: int | None) -> Checkpoint:
        """This checkpoint with the chunk length that its files or the user (`policy.action_horizon`) say.

        UserError when nobody says it, or both do and differ.
        """
        known = self.config.action_horizon
        horizon = known or said
        if not horizon:
            raise UserError(
                f"policy.action_horizon: no file of {self.path} says how many actions a chunk has, and the weights do "
                "not depend on it; write the number they were trained with (the published pi05_libero: 10)"
            )
        if known and said not in (None, known):
            raise UserError(
                f"policy.action_horizon: {said}, but {self.path}/config.json says {known}; leave the key out"
            )
        return dataclasses.replace(self, config=dataclasses.replace(self.config, action_horizon=horizon))


def open_checkpoint(path: Path, family: Family = FAMILY) -> Checkpoint:
    """Look at a directory. `UserError` when it is no checkpoint of the family, or cannot be read (truncated, JAX …)."""
    path = Path(path)
    if not path.is_dir():
        what = (
            "is a link whose target is not there" if path.is_symlink() and not path.exists() else "is not a directory"
        )
        raise UserError(f"checkpoint {path} {what}; give the directory that holds {WEIGHTS}")
    where = path / "config.json"
    raw = read_json(where) if where.exists() or where.is_symlink() else {}
    if "format" in raw:
        return _open_ours(path, raw, family)
    require_type(raw, where, family.name, family.title)
    weights = find_weights(path)
    if raw.get("type") == family.name or (path / PRE).is_file():
        return _open_lerobot(path, raw, weights, family)
    said = fit(_Openpi, raw, str(where))
    if said.pi05 is not None:
        require_type({"type": "pi05" if said.pi05 else "pi0"}, where, family.name, family.title)
    declared = Declared("config.json", action_horizon=said.action_horizon, max_token_len=said.max_token_len)
    config = _sizes(weights, declared, said.action_dim, where, family)
    guess, why = family.openpi
    return Checkpoint(path, family, "openpi", config, None, guess, why, weights, declared, raw)


def _open_ours(path: Path, raw: JsonObject, family: Family) -> Checkpoint:
    where = path / "config.json"
    if raw["format"] != family.format:
        raise UserError(
            f"{where}: format is {short(raw['format'])!r}; of policy.type {family.name} this version reads "
            f"{family.format}"
        )
    said = fit(_Ours, raw, str(where))
    silent = isinstance(said.architecture, dict) and "action_horizon" not in said.architecture
    architecture = {"action_horizon": 0, **said.architecture} if silent else said.architecture
    config = family.config.from_dict(architecture, str(where))
    if not (config.action_horizon or silent):
        raise UserError(f"{where}: architecture.action_horizon is 0; a chunk has at least one action")
    if config.vision.type == "conv" and config.vision.cameras != 2:
        raise UserError(f"{where}: architecture.vision.cameras is {config.vision.cameras}; LIBERO feeds two")
    profile = profile_named(said.profile, where, family)
    declared = Declared("config.json", action_horizon=config.action_horizon or None, flow_steps=config.flow_steps)
    weights = find_weights(path)
    return Checkpoint(
        path, family, "qlibero", config, profile, profile.name, "config.json names it", weights, declared, raw
    )


def _open_lerobot(path: Path, raw: JsonObject, weights: Weights, family: Family) -> Checkpoint:
    files = read_lerobot(path, raw, family)
    config = _sizes(weights, files.declared, files.config.max_action_dim, path / "config.json", family)
    guess, why = family.lerobot(raw)
    proven = family.profiles[guess] if family.lerobot_proves else None
    return Checkpoint(path, family, "lerobot", config, proven, guess, why, weights, files.declared, raw, files)


def _sizes(weights: Weights, declared: Declared, action_dim: int | None, where: Path, family: Family) -> Pi05Config:
    """The network that the tensors make, with the numbers that only the files' text can say."""
    config = architecture(weights.shapes, declared.action_horizon or 0, str(weights), family)
    if action_dim not in (None, config.action_dim):
        raise UserError(
            f"{where} says {action_dim} action dimensions, the tensor action_in_proj has {config.action_dim}"
        )
    said = {name: getattr(declared, name) for name in ("max_token_len", "min_period", "max_period")}
    return dataclasses.replace(config, **{name: value for name, value in said.items() if value is not None})


def tensors(
    checkpoint: Checkpoint, table: TensorTable, skip: frozenset[str] = frozenset()
) -> Iterator[tuple[str, Tensor]]:
    """Network name and tensor, one at a time, in the file's dtype on the CPU. Tensors in `skip` are not read."""
    return checkpoint.weights.read({name: of for name, of in table.source.items() if name not in skip})


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, skip: frozenset[str] = frozenset()
) -> Pi05Model:
    """The network with the checkpoint's weights, strictly, in `dtype` (with float32 islands) on `device`.

    Read tensor by tensor in a few threads: the host never holds a second copy. `skip` names linear weights that stay
    on the meta device because an artifact will bring their quantized replacement; they are neither read nor checked for
    what is in them.
    """
    table = tensor_table(checkpoint)
    if table.problems:
        raise UserError(f"{checkpoint.weights} does not fit its architecture: {'; '.join(table.problems)}")
    with torch.device("meta"):
        model = checkpoint.family.model(checkpoint.config)
    faults: dict[str, str] = {}

    def read(names: dict[str, str]) -> None:
        for name, tensor in checkpoint.weights.read(names):
            if fault := fault_of(tensor):
                faults[name] = fault
            else:
                _place(model, name, tensor.to(device, torch.float32 if is_float32_island(name) else dtype))

    wanted = [(name, of) for name, of in table.source.items() if name not in skip]
    count = min(READERS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(count, "weights") as threads:
        for done in [threads.submit(read, dict(wanted[part::count])) for part in range(count)]:
            done.result()
    for name in skip & table.source.keys():
        shape = model.get_parameter(name).shape
        _place(model, name, torch.empty(shape, dtype=dtype, device="meta"))
    if faults:
        raise UserError(f"{checkpoint.weights}: {faulty({name: faults[name] for name, _ in wanted if name in faults})}")
    return model


def _place(model: Pi05Model, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(tensor, requires_grad=False))


def profile_named(name: Any, where: Path, family: Family = FAMILY) -> Profile:
    """The family's profile that a file names; UserError when there is none of that name."""
    if not isinstance(name, str) or name not in family.profiles:
        raise UserError(f"{where}: profile {short(name)!r} is not known; known: {', '.join(family.profiles)}")
    return family.profiles[name]


# -- writing -------------------------------------------------------------------------------------------------------
def write_checkpoint(
    path: Path,
    model: Pi05Model,
    *,
    name: str,
    statistics: dict[str, dict[str, list[float]]],
    tokenizer: str,
    profile: str = "qlibero",
    normalization: Mode = "quantile",
    asset_id: str = "qlibero/libero",
    dtype: torch.dtype = torch.bfloat16,
    family: Family = FAMILY,
) -> str:
    """Write our own kind of directory (openpi's plus config.json and tokenizer.json); returns the weights' sha256.

    statistics: {"state": {"mean": …, "std": …, "q01": …, "q99": …}, "actions": {…}}; tokenizer:
    tokenizer.json's content.
    """
    path = Path(path)
    assets = path / "assets" / asset_id
    state = {key: value.detach().to("cpu", dtype).contiguous().clone() for key, value in model.state_dict().items()}
    partial = files.beside(path / WEIGHTS)
    save_file(state, partial, metadata={"format": "pt"})
    files.settle(partial, path / WEIGHTS)
    content = {
        "format": family.format,
        "name": name,
        "profile": profile,
        "normalization": normalization,
        "asset_id": asset_id,
        "architecture": model.config.to_dict(),
    }
    files.replace(path / "config.json", json.dumps(content, indent=2) + "\n")
    files.replace(path / "tokenizer.json", tokenizer)
    files.replace(assets / "norm_stats.json", json.dumps({"norm_stats": statistics}, indent=2) + "\n")
    return sha256(path / WEIGHTS)


# -- small parts -----------------------------------------------------------------------------------------------------
def file_hashes(path: Path) -> dict[str, str]:
    """{relative name: sha256} of the files of a checkpoint that give it its meaning."""
    keep = {".safetensors", ".json", ".model"}
    return {
        str(file.relative_to(path)): sha256(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.suffix in keep
    }
