"""Names made of settings: a sweep's cells, and an experiment that `--set` turned into another one.

`--set suite=libero_spatial` asks for other episodes than the file does, so they get a run directory of their own, the
same one each time: `llm_w4a8_fake.suite-libero_spatial`. Keys that leave an episode's result alone change no name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from qlibero.config.vocabulary import SUITE_ALIASES
from qlibero.config.yaml_text import parse

LONGEST = 80
# What `schema.config_hash` leaves out, by the first word of the key.
FREE = (
    "name",
    "tasks",
    "episodes_per_task",
    "arms",
    "backends",
    "workers",
    "retries",
    "videos",
    "margin",
    "estimand",
    "primary",
    "compare_with",
    "mixed_machines",
    "stop",
    "tracking",
    "launch",
)


def suffix_of_sets(sets: Iterable[str], overrides: Iterable[tuple[str, Any]] = ()) -> str:
    """`.suite-libero_spatial` for ["suite=libero_spatial", "workers=2"]; "" if nothing that counts, or a name, is set.

    `overrides`: (key, value) of the fork's variables, which count like `--set`.
    """
    axes = [(key, setting_label(key, value)) for key, value in overrides]
    for text in sets:
        key, _, value = text.partition("=")
        if key.strip() == "name":
            return ""
        if key.split(".")[0].strip() not in FREE:
            try:
                axes.append((key.strip(), setting_label(key.strip(), parse(value), stem="/" in value)))
            except ValueError:
                continue  # told as an error when it is applied
    return f".{axes_id(axes)}" if axes else ""


def axes_id(axes: Sequence[tuple[str, str]]) -> str:
    """`suite-libero_object.seed-7` from (key, label) pairs; a key's last word, all of it where two would be equal."""
    leaves = [key.rpartition(".")[2] for key, _ in axes]
    keys = [key if leaves.count(leaf) > 1 else leaf for (key, _), leaf in zip(axes, leaves, strict=True)]
    text = ".".join(f"{key}-{label}" for key, (_, label) in zip(keys, axes, strict=True))
    if len(text) <= LONGEST:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text[: LONGEST - 9]}-{digest}"


def setting_label(key: str, value: Any, stem: bool = False) -> str:
    """The label of `value` under `key`: one suite has one label, whatever it is called."""
    if key == "suite" and isinstance(value, list):
        return value_label([SUITE_ALIASES.get(one, one) if isinstance(one, str) else one for one in value], stem)
    return value_label(SUITE_ALIASES.get(value, value) if key == "suite" and isinstance(value, str) else value, stem)


def value_label(value: Any, stem: bool = False) -> str:
    """A value as part of a file name; with `stem`, a path's last part without its ending."""
    if isinstance(value, list):
        return "+".join(value_label(item, stem) for item in value)
    if isinstance(value, dict):
        named = value.get("name") or value.get("backend") or PurePath(str(value.get("bddl") or "")).name
        return (
            value_label(named) if named else hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
        )
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", PurePath(text).stem if stem else text).strip("-") or "none"
