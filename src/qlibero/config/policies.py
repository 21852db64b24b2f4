"""The `policy` section: what every family of policies has, and the family's own settings by its `type`.

A family declares its settings in its own room (`policies/<name>/`, or a package of somebody else's); here they are only
found by the registry and validated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, Field, GetJsonSchemaHandler, SerializeAsAny
from pydantic_core import CoreSchema, PydanticCustomError

from qlibero.config.fields import Int, StrictModel, one_of
from qlibero.documents import JsonObject
from qlibero.errors import UserError
from qlibero.plugin_source import BrokenPlugin
from qlibero.registry import PolicyPlugin, UnknownPlugin, every, get, names

GPU_BATCH = 8  # rows of a call on a GPU under batch_size: auto; part of the arithmetic, so the same on every machine
MAX_REPLAN = 1_000  # actions; no policy's chunk is longer


class PolicySettings(StrictModel):
    """What is said of any policy."""

    type: str = Field(description="the family; `qlibero ls policies` lists them")
    replan_steps: Int = Field(
        5, ge=1, le=MAX_REPLAN, description="actions executed of every chunk before the policy is asked again"
    )
    batch_size: Any = Field(1, description="rows of a policy call")

    @property
    def family(self) -> PolicyPlugin:
        """What the family says of itself."""
        return get(PolicyPlugin, self.type)


def settings_of(plugin: PolicyPlugin) -> type[PolicySettings]:
    """The family's settings. BrokenPlugin where they are none."""
    settings = plugin.load().Settings
    if not (isinstance(settings, type) and issubclass(settings, PolicySettings)):
        raise BrokenPlugin(
            f"policy {plugin.name} ({plugin.file}): Settings should be a class derived from "
            "qlibero.config.policies.PolicySettings"
        )
    return settings


def as_settings(value: Any) -> Any:
    """The section as its family's settings; their errors are reported as those of the section. Raises ValidationError
    or PydanticCustomError; what is no mapping is handed back."""
    if not isinstance(value, dict):
        return value
    known = names(PolicyPlugin)
    if "type" not in value:
        raise PydanticCustomError("plugin_type_missing", "{said}", {"said": f"say which type: {' or '.join(known)}"})
    try:
        family = settings_of(get(PolicyPlugin, str(value["type"])))
    except UnknownPlugin as error:
        facts = {"said": f"type {one_of(error.known)}", "known": error.known, "found": value["type"]}
        raise PydanticCustomError("plugin_type_unknown", "{said}", facts) from None
    except UserError as error:
        raise PydanticCustomError("plugin_broken", "{said}", {"said": str(error)}) from None
    return family.model_validate(value)


class _OneOfFamilies:
    """For editors: the settings of every family that is installed."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonObject:
        found = [handler(settings_of(plugin).__pydantic_core_schema__) for plugin in every(PolicyPlugin)]
        return {"anyOf": [*found, {"type": "object", "properties": {"type": {"type": "string", "pattern": r"\."}}}]}


Policy = Annotated[SerializeAsAny[PolicySettings], BeforeValidator(as_settings), _OneOfFamilies()]


def path_keys(policy_type: Any) -> set[str]:
    """Keys of a policy section of that type whose values are paths, at any depth."""
    try:
        return set(_paths(settings_of(get(PolicyPlugin, policy_type)))) if isinstance(policy_type, str) else set()
    except UserError:
        return set()  # said when the section is validated


def _paths(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if "Path" in str(field.annotation):
            yield name
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _paths(part)
