"""Reading a checkpoint directory: strictly, or not at all.

Three kinds of directory are understood. All hold `model.safetensors` and a `config.json`; they differ in the
rest:

`qlibero`  ours: openpi's names, tokenizer.json, assets/<id>/norm_stats.json, and a config.json that says it all
`openpi`   openpi's PyTorch conversion: assets/<id>/norm_stats.json (often missing: openpi#810), sizes by shape
`lerobot`  LeRobot: names prefixed `model.`, policy_preprocessor.json with its normaliser safetensors

A missing, extra, misshapen or non-finite tensor is an error that lists them; there is no path on which a
network with random weights comes back (LeRobot's own loader has one, even with strict=True).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlibero.errors import UserError
from qlibero.policies.pi05.architecture import EMBEDDING, TIED, architecture, strip
from qlibero.policies.pi05.config import PI05_FULL, Pi05Config
from qlibero.policies.pi05.model import Pi05Model, is_float32_island
from qlibero.policies.pi05.normalize import Mode
from qlibero.policies.pi05.profiles import PROFILES, Profile

WEIGHTS = "model.safetensors"
FORMAT = "qlibero-pi05-1"
_UNUSED = (TIED, "paligemma_with_expert.gemma_expert.lm_head.weight")
_UNSUPPORTED_IN_LEROBOT = ("use_relative_actions", "use_visual_memory", "use_proprioceptive_memory")
_LISTED = 8
"""Tensors named in a message before "and n more"."""

Kind = Literal["qlibero", "openpi", "lerobot"]


@dataclass(frozen=True)
class TensorTable:
    """How the file's tensors map to the network's: `source[name]` is the file's name of a network tensor."""

    source: dict[str, str]
    missing: list[str]
    extra: list[str]
    misshapen: list[str]
    notes: list[str]

    @property
    def problems(self) -> list[str]:
        """Human-readable, empty when the file fits."""
        found = []
        for word, names in (
            ("missing", self.missing),
            ("extra", self.extra),
            ("of another shape", self.misshapen),
        ):
            if names:
                more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
                found.append(f"{len(names)} tensors {word}: {', '.join(names[:_LISTED])}{more}")
        return found


@dataclass(frozen=True)
class Checkpoint:
    """A directory, looked at but not loaded."""

    path: Path
    kind: Kind
    config: Pi05Config
    profile: Profile | None
    """What the files prove; None when they prove nothing and the user has to say."""
    guess: str
    """Name of the most likely profile."""
    profile_reason: str
    """Why it is proven or likely."""
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    raw: dict[str, Any] = field(repr=False)
    """config.json."""

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.path / WEIGHTS


def open_checkpoint(path: Path) -> Checkpoint:
    """Look at a directory. `UserError` when it is no checkpoint, or is one that cannot be read (truncated, JAX, …)."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"checkpoint {path} is not a directory; give the directory that holds {WEIGHTS}")
    weights = path / WEIGHTS
    if not weights.is_file():
        if (path / "params").is_dir():
            raise UserError(
                f"{path} is a JAX checkpoint (params/); convert it with openpi's "
                "examples/convert_jax_model_to_pytorch.py and copy its assets/ beside model.safetensors"
            )
        found = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise UserError(f"checkpoint {path} has no {WEIGHTS}; found: {found}")
    shapes, dtypes = _header(weights)
    raw = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if raw.get("format") == FORMAT:
        config, kind = Pi05Config.from_dict(raw.get("architecture", {})), "qlibero"
        profile = _named(raw.get("profile"), path / "config.json")
        return Checkpoint(path, kind, config, profile, profile.name, "config.json names it", shapes, dtypes, raw)
    if raw.get("type") == "pi05" or (path / "policy_preprocessor.json").is_file():
        return _open_lerobot(path, raw, shapes, dtypes)
    config = architecture(
        shapes, PI05_FULL.action_horizon if "action_horizon" not in raw else raw["action_horizon"], weights
    )
    return Checkpoint(
        path,
        "openpi",
        config,
        None,
        "openpi",
        "openpi's files do not say whether the state was in the prompt; the "
        "published pi05_libero was trained without it",
        shapes,
        dtypes,
        raw,
    )


def _open_lerobot(path: Path, raw: dict, shapes: dict, dtypes: dict) -> Checkpoint:
    config = architecture(shapes, raw.get("chunk_size", 50), path / WEIGHTS)
    for key in _UNSUPPORTED_IN_LEROBOT:
        if raw.get(key):
            raise UserError(f"{path}/config.json: {key} is {raw[key]!r}; policies of that kind are not supported")
    # Read off LeRobot's tags: 0.5.1 added `use_relative_actions` to the config, 0.5.0 stopped padding the
    # state to 32.
    new = "use_relative_actions" in raw
    reason = (
        "LeRobot's files do not record the version that trained the weights: 0.4.x wrote 32 state numbers into the "
        f"prompt, later versions 8. config.json {'has' if new else 'lacks'} use_relative_actions, so LeRobot "
        f"{'0.5.1 or later' if new else '0.5.0 or earlier'} saved it (weights may be older than the file: "
        "lerobot-0.4 or lerobot-0.6, try the other if this scores 0 %)"
    )
    return Checkpoint(
        path, "lerobot", config, None, "lerobot-0.6" if new else "lerobot-0.4", reason, shapes, dtypes, raw
    )


def tensor_table(checkpoint: Checkpoint) -> TensorTable:
    """Match the file's names and shapes with the network's, by loader rules (prefix, tied embedding, unused heads)."""
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in Pi05Model(checkpoint.config).state_dict().items()}
    notes = []
    renamed = {strip(name): name for name in checkpoint.shapes}
    if any(name.startswith("model.") for name in checkpoint.shapes):
        notes.append("prefix `model.` removed")
    if EMBEDDING not in renamed and TIED in renamed:
        renamed[EMBEDDING] = renamed[TIED]
        notes.append("token embedding taken from lm_head (tied weights)")
    for name in _UNUSED:
        if renamed.pop(name, None):
            notes.append(f"{name} dropped: never used for actions")
    missing = [name for name in wanted if name not in renamed]
    extra = [name for name in renamed if name not in wanted]
    misshapen = [
        f"{name} {checkpoint.shapes[renamed[name]]}, expected {shape}"
        for name, shape in wanted.items()
        if name in renamed and checkpoint.shapes[renamed[name]] != shape
    ]
    return TensorTable({name: renamed[name] for name in wanted if name in renamed}, missing, extra, misshapen, notes)


def tensors(
    checkpoint: Checkpoint, table: TensorTable, device: str = "cpu", skip: frozenset[str] = frozenset()
) -> Iterator[tuple[str, Tensor]]:
    """Network name and tensor, one at a time, in the file's dtype. Tensors in `skip` are not read."""
    with safe_open(checkpoint.weights, framework="pt", device=device) as file:
        for name, source in table.source.items():
            if name not in skip:
                yield name, file.get_tensor(source)


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, skip: frozenset[str] = frozenset()
) -> Pi05Model:
    """The network with the checkpoint's weights, strictly, in `dtype` (with float32 islands) on `device`.

    Read tensor by tensor: the host never holds a second copy. `skip` names linear weights that stay on the
    meta device because an artifact will bring their quantized replacement; they are neither read nor checked
    for finiteness.
    """
    table = tensor_table(checkpoint)
    if table.problems:
        raise UserError(f"{checkpoint.weights} does not fit its architecture: {'; '.join(table.problems)}")
    with torch.device("meta"):
        model = Pi05Model(checkpoint.config)
    bad = []
    for name, tensor in tensors(checkpoint, table, skip=skip):
        if not bool(torch.isfinite(tensor).all()):
            bad.append(name)
            continue
        _place(model, name, tensor.to(device, torch.float32 if is_float32_island(name) else dtype))
    for name in skip & table.source.keys():
        shape = model.get_parameter(name).shape
        _place(model, name, torch.empty(shape, dtype=dtype, device="meta"))
    if bad:
        raise UserError(f"{checkpoint.weights}: {len(bad)} tensors hold NaN or infinity: {', '.join(bad[:_LISTED])}")
    return model


def _place(model: Pi05Model, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(tensor, requires_grad=False))


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
) -> str:
    """Write our own kind of directory (openpi's plus config.json and tokenizer.json); returns the weights' sha256.

    statistics: {"state": {"mean": …, "std": …, "q01": …, "q99": …}, "actions": {…}}; tokenizer:
    tokenizer.json's content.
    """
    path = Path(path)
    assets = path / "assets" / asset_id
    assets.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().to("cpu", dtype).contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, path / WEIGHTS, metadata={"format": "pt"})
    content = {
        "format": FORMAT,
        "name": name,
        "profile": profile,
        "normalization": normalization,
        "asset_id": asset_id,
        "architecture": model.config.to_dict(),
    }
    (path / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    (path / "tokenizer.json").write_text(tokenizer)
    (assets / "norm_stats.json").write_text(json.dumps({"norm_stats": statistics}, indent=2) + "\n")
    return sha256(path / WEIGHTS)


# -- small parts -----------------------------------------------------------------------------------------------------
def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(path: Path) -> dict[str, str]:
    """{relative name: sha256} of the files of a checkpoint that give it its meaning."""
    keep = {".safetensors", ".json", ".model"}
    return {
        str(file.relative_to(path)): sha256(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.suffix in keep
    }


def _header(weights: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    try:
        with safe_open(weights, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return (
                {name: tuple(s.get_shape()) for name, s in slices.items()},
                {name: s.get_dtype() for name, s in slices.items()},
            )
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{weights} cannot be read as safetensors ({weights.stat().st_size} bytes): {error}; "
            "if it was downloaded, the download is incomplete"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def _named(name: Any, where: Path) -> Profile:
    if name not in PROFILES:
        raise UserError(f"{where}: profile {name!r} is not known; known: {', '.join(PROFILES)}")
    return PROFILES[name]
