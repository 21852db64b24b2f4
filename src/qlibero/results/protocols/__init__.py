"""Published evaluation protocols of LIBERO: a file each, with every constant that decides a number and where it stands.

A constant that a protocol leaves to the policy, or that was not found in its sources, is not in its file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from qlibero.errors import UserError

OF_TOOL = {
    "LeRobot": "lerobot",
    "VLAQuantBench": "vlaquantbench",
    "OpenVLA": "openvla-oft",
    "openpi fork": "openpi",
    "vla-eval": "vla-eval",
    "RLinf": "rlinf",
}
"""Which protocol a result file's tool follows where the file itself does not say otherwise."""


@dataclass(frozen=True)
class Constant:
    value: Any  # of `max_steps` by suite
    source: str


@dataclass(frozen=True)
class Protocol:
    name: str
    about: str
    constants: Mapping[str, Constant]


@dataclass(frozen=True)
class Effect:
    """`points` of success that the constant was seen to cost, lowest and highest; None where nobody measured it."""

    said: str
    points: tuple[float, float] | None = None


@cache
def protocols() -> dict[str, Protocol]:
    """All published protocols by name."""
    found = {}
    for file in sorted(files(__name__).iterdir(), key=lambda file: file.name):
        name, dot, ending = file.name.rpartition(".")
        if ending == "yaml" and name != "effects":
            data = yaml.safe_load(file.read_text(encoding="utf-8"))
            found[name] = Protocol(name, data["about"], {k: Constant(**c) for k, c in data["constants"].items()})
    return found


@cache
def effects() -> dict[str, Effect]:
    """What is known of each constant, most likely cause of a gap first."""
    data = yaml.safe_load((files(__name__) / "effects.yaml").read_text(encoding="utf-8"))
    return {k: Effect(e["said"], tuple(e["points"]) if "points" in e else None) for k, e in data.items()}


def protocol(name: str) -> Protocol:
    """Raises UserError naming those there are."""
    if name not in protocols():
        raise UserError(f"no published protocol is called {name!r}; there are {', '.join(protocols())}")
    return protocols()[name]
