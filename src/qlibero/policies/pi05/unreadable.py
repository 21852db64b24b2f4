"""What a directory is when it is no checkpoint that can be read, and in one line what to do about it.

People give the folder above, the adapter without its base, the file before conversion or another policy altogether;
each of these has a shape of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from qlibero.documents import JsonObject
from qlibero.errors import QliberoError, UserError
from qlibero.policies.structured import read_json, short

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_LFS = b"version https://git-lfs.github.com/spec/"
_SERVER = "evaluate it through a server of its own code (policy: {type: remote, url: ws://…})"
_BELOW = 3
"""Levels of folders searched for the weights that are not where they were said to be."""
_ENTRIES = 1000
OTHER_TYPES = {
    "pi05": ("pi0.5", "write policy: {type: pi05, checkpoint: …}"),
    "pi0": ("pi0", "write policy: {type: pi0, checkpoint: …}"),
    "pi0_fast": ("pi0-FAST", _SERVER),
    "pi0fast": ("pi0-FAST", _SERVER),
    "smolvla": ("SmolVLA", _SERVER),
    "groot": ("GR00T", _SERVER),
    "gr00t": ("GR00T", _SERVER),
    "openvla": ("OpenVLA", _SERVER),
}
"""How other policies call themselves in `type` or `model_type` of config.json (by its beginning): (name, hint)."""
_OTHER_TENSORS = (
    ("action_time_mlp_in.weight", *OTHER_TYPES["pi0"]),
    ("time_mlp_in.weight", *OTHER_TYPES["pi05"]),
    ("vlm_with_expert.", "SmolVLA", _SERVER),
    ("action_head.", "GR00T", _SERVER),
    ("vision_backbone.", "OpenVLA", _SERVER),
)


def why_no_weights(path: Path, weights: str, index: str) -> str | None:
    """The sentence for a directory whose weights cannot be read; None where `weights` or `index` can be."""
    adapter = _adapter(path)
    for name in (weights, index):
        file = path / name
        if file.is_symlink() and not file.exists():
            return (
                f"{file} is a link to {short(os.readlink(file))}, which is not there: the link was copied without its "
                "target: copy with `cp -L` or `rsync -L`, or download it again"
            )
        if file.exists() and not file.is_file():
            return f"{file} is not a regular file; give the directory that holds it"
        if file.is_file():
            if _begins(file, _LFS):
                return f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` where it was cloned"
            return adapter and f"{adapter}. If {name} is the merged result, move the adapter files away"
    if adapter:
        return adapter
    for kind in (_orbax, _elsewhere, _pickle, _other_name):
        if said := kind(path):
            return said
    found = ", ".join(_names(path)) or "nothing"
    return f"checkpoint {path} has no {weights}; found: {short(found)}"


def require_type(raw: JsonObject, where: Path, family: str, title: str) -> None:
    """UserError when config.json says that this is another policy than the `family`, which people call `title`."""
    for key in ("type", "model_type"):
        said = raw.get(key)
        if said is None or said == family:
            continue
        text = said.lower() if isinstance(said, str) else ""
        name, hint = next((OTHER_TYPES[t] for t in sorted(OTHER_TYPES, reverse=True) if text.startswith(t)), (None, ""))
        this = f"this is a {name} policy" if name else "this is a policy that qlibero does not know"
        raise UserError(
            f"{where}: {key} is {short(said)!r}: {this}, and policy.type says {family} ({title}); {hint or _SERVER}"
        )


def declared_type(path: Path) -> str | None:
    """The family that a checkpoint directory's config.json names, in whichever of the ways there are; None where it
    says nothing, or cannot be read (whoever opens the directory says why)."""
    try:
        raw = read_json(path / "config.json")
    except QliberoError:
        return None
    if isinstance(raw.get("format"), str):
        return str(raw["format"]).removeprefix("qlibero-").rpartition("-")[0]
    if isinstance(raw.get("pi05"), bool):
        return "pi05" if raw["pi05"] else "pi0"
    return raw["type"] if isinstance(raw.get("type"), str) else None


def other_network(names: Iterable[str], family: str) -> str | None:
    """What network tensors of these (stripped) names make, if it is known and not the `family`'s; with its hint."""
    names = list(names)
    if any("lora_" in name or ".base_layer." in name for name in names):
        return (
            "there are LoRA adapters among its tensors: merge them into the weights they belong to "
            "(peft: merge_and_unload()) and save the result"
        )
    if any(name.startswith("paligemma_with_expert.paligemma.language_model.") for name in names):
        return (
            "its names are those of LeRobot 0.3 and older; convert it with LeRobot's "
            "migrate_policy_normalization.py and a newer save_pretrained()"
        )
    own = OTHER_TYPES[family][0]
    for stem, name, hint in _OTHER_TENSORS:
        if name != own and any(found.startswith(stem) for found in names):
            return f"its tensors ({stem}…) are those of a {name} policy: {hint}"
    return None


def _adapter(path: Path) -> str | None:
    found = [name for name in ("adapter_config.json", "adapter_model.safetensors") if (path / name).exists()]
    if not found:
        return None
    return (
        f"{path} holds LoRA adapters ({', '.join(found)}), which alone are no policy: merge them into their base "
        "(base_model_name_or_path in adapter_config.json; peft: merge_and_unload(), then save_pretrained()) and give "
        "the merged directory"
    )


def _orbax(path: Path) -> str | None:
    inside = any((path / name).exists() for name in ("_METADATA", "manifest.ocdbt", "ocdbt.process_0"))
    if not inside and not (path / "params").is_dir():
        return None
    what = "params/ of a JAX checkpoint (orbax)" if inside else "a JAX checkpoint (params/)"
    return (
        f"{path} is {what}; convert it with openpi's examples/convert_jax_model_to_pytorch.py and copy its assets/ "
        "beside model.safetensors"
    )


def _elsewhere(path: Path) -> str | None:
    below = _below(path)
    if not below:
        return None
    what = (
        "a cache folder of the Hugging Face hub" if (path / "snapshots").is_dir() else "the folder above a checkpoint"
    )
    listed = ", ".join(str(found) for found in below[:4]) + (f" and {len(below) - 4} more" if len(below) > 4 else "")
    return f"{path} is {what}: write the folder with the weights itself, {listed}"


def _below(path: Path) -> list[Path]:
    """Folders below `path` with weights in them, or that hubs and trainers keep weights in."""
    found: list[Path] = []
    level, looked = [path], 0
    for _ in range(_BELOW):
        folders = []
        for folder in level:
            try:
                children = sorted(child for child in folder.iterdir() if child.is_dir() and not child.is_symlink())
            except OSError:
                continue
            looked += len(children)
            if looked > _ENTRIES:
                return found
            for child in children:
                kept_here = child.name == "pretrained_model" or folder.name == "snapshots"
                if kept_here or any(child.glob("model*.safetensors")):
                    found.append(child)
                else:
                    folders.append(child)
        level = folders
    return found


def _pickle(path: Path) -> str | None:
    found = [name for name in _names(path) if name.endswith(_PICKLES)]
    return (
        f"{path} holds pickled torch files ({', '.join(found[:4])}), which are not read, because reading one can run "
        'anything: python -c "import sys, torch; from safetensors.torch import save_file; save_file(torch.load('
        "sys.argv[1], weights_only=True, map_location='cpu'), 'model.safetensors')\" "
        f"{found[0]}"
        if found
        else None
    )


def _other_name(path: Path) -> str | None:
    found = [name for name in _names(path) if name.endswith(".safetensors") and not name.startswith("policy_")]
    if not found:
        return None
    shards = [name for name in found if "-of-" in name]
    if shards:
        return (
            f"{path} holds shards ({', '.join(shards[:3])}) without their model.safetensors.index.json: download it too"
        )
    return f"{path} has no model.safetensors but {', '.join(found[:4])}; if that is the policy, rename it"


def _names(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be listed: {error.strerror}") from None


def _begins(file: Path, start: bytes) -> bool:
    try:
        with open(file, "rb") as opened:
            return opened.read(len(start)) == start
    except OSError:
        return False
