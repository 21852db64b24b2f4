"""An experiment back to YAML, and its JSON Schema for editors."""

from __future__ import annotations

from typing import Any

import yaml

from qlibero.config.load import known_backends
from qlibero.config.schema import Experiment
from qlibero.config.yaml_source import OLDER_WORDS
from qlibero.config.yaml_text import CoreLoader
from qlibero.documents import JsonObject


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    plain = yaml.SafeLoader.resolve(CoreLoader(""), yaml.ScalarNode, value, (True, False)) == "tag:yaml.org,2002:str"
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else "'")


_Dumper.add_representer(str, _text)


def dump_resolved(experiment: Experiment) -> str:
    """The experiment as one YAML text that loads to an equal Experiment. Paths are absolute."""
    data = experiment.model_dump(mode="json")
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def editor_schema() -> JsonObject:
    """JSON Schema (draft 2020-12) of an experiment file, for completion and tooltips in editors."""
    schema = Experiment.model_json_schema()
    files = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    schema["properties"]["extends"] = {**files, "description": "files this one is laid over, relative to this file"}
    entry = schema["$defs"]["ArmEntry"]["properties"]
    entry["backend"]["enum"] = list(known_backends())
    entry["grid"] = {"type": "object", "description": "key → values: an arm of every combination (config.arm_grid)"}
    for older, now in OLDER_WORDS.items():
        schema["properties"][older] = {**schema["properties"][now], "deprecated": True}
    for part in (schema, *schema["$defs"].values()):  # any key may come from a file this one extends, or an arm's base
        part.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
