"""The tables of docs/configuration.md, written from the schema so that they cannot disagree with it.

python -m qlibero.config.reference        # renews the part of docs/configuration.md between its two markers
"""

from __future__ import annotations

import json
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qlibero.config.arms import ArmEntry
from qlibero.config.execution import Execution
from qlibero.config.fields import PluginName
from qlibero.config.inits import FreshInits
from qlibero.config.launch import Launch, Ray, Slurm, SlurmMerge
from qlibero.config.policies import settings_of
from qlibero.config.quantization import Calibration, Quant
from qlibero.config.schema import Experiment, Stop, Tracking
from qlibero.config.suites import OwnSuite
from qlibero.places import REPOSITORY
from qlibero.registry import PolicyPlugin, built_in, get

PAGE = REPOSITORY / "docs" / "configuration.md"
BEGIN, END = "<!-- from the schema: python -m qlibero.config.reference -->", "<!-- end -->"


def _families() -> dict[str, type[BaseModel]]:
    """Settings of every family of policies that is built in, and what lies in them."""
    found: dict[str, type[BaseModel]] = {}
    inside: dict[str, type[BaseModel]] = {}
    for name in built_in(PolicyPlugin):
        settings = settings_of(get(PolicyPlugin, name))
        found[f"`policy` of type `{name}`"] = settings
        for key, field in settings.model_fields.items():
            for part in get_args(field.annotation):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    inside[f"`policy.{key}`"] = part
    return found | inside


SECTIONS: dict[str, type[BaseModel]] = {
    "The experiment": Experiment,
    "`suite`, when it is your own": OwnSuite,
    "`inits`, when they are not official": FreshInits,
    **_families(),
    "`execution`": Execution,
    "`quant`": Quant,
    "`quant.calibration`": Calibration,
    "An entry of `arms`": ArmEntry,
    "`stop`": Stop,
    "`tracking`": Tracking,
    "`launch`": Launch,
    "`launch.slurm`": Slurm,
    "`launch.slurm.merge`": SlurmMerge,
    "`launch.ray`": Ray,
}


def tables() -> str:
    """All sections as Markdown."""
    return "\n".join(
        f"### {title}\n\n{' '.join((model.__doc__ or '').split())}\n\n{table(model)}"
        for title, model in SECTIONS.items()
    )


def table(model: type[BaseModel]) -> str:
    """One line per key: name, what it may be, its default, what it means."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        cells = (
            f"`{field.alias or name}`",
            kind(field.annotation, field.metadata),
            default(field),
            field.description or "",
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


_WORDS = {Any: "anything", int: "whole number", float: "number", bool: "true, false", str: "text", Path: "path"}


def kind(annotation: Any, metadata: Any = ()) -> str:
    """A type as a person would say it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(inner[0], [*inner[1:], *metadata])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(kind(part, metadata) for part in inner if part is not type(None)))
    if origin is tuple:
        return f"list: {kind(inner[0])}"
    if origin is dict:
        return f"{kind(inner[0])} → {kind(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "see below"
    for plugin in metadata:
        if isinstance(plugin, PluginName):
            return ", ".join(f"`{name}`" for name in built_in(plugin.kind)) + " or a module"
    word = {Any: "anything", int: "whole number", float: "number", bool: "true, false", str: "text", Path: "path"}[
        annotation
    ]
    return word + _bounds(metadata)


def _bounds(metadata: Any) -> str:
    signs = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
    parts = list(metadata) + [part for item in metadata for part in getattr(item, "metadata", ())]
    return "".join(
        f" {sign} {getattr(part, name):,}"
        for name, sign in signs
        for part in parts
        if getattr(part, name, None) is not None
    )


def default(field: FieldInfo) -> str:
    """The default as YAML, or that there is none."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(value, default=list)}`" if not isinstance(value, str) else f"`{value}`"


def renewed(page: str) -> str:
    """The page with its generated part written anew."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
