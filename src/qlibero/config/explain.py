"""pydantic's errors, told to the person who wrote the YAML: place, key, what was found, what to write."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import accumulate
from typing import Any

from pydantic import ValidationError

from qlibero.config.fields import FieldError
from qlibero.config.schema import Experiment
from qlibero.config.vocabulary import did_you_mean, suite_hint
from qlibero.config.yaml_text import Location, Mark, Problem, Source, short, shown
from qlibero.console import count_text
from qlibero.documents import JsonObject

MAX_TOLD = 30  # nobody reads more; each costs a search for the nearest key
MAX_TEXT = 6_000  # characters of all of them together
PLAIN_WORDS = {
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "string_type": "should be a text",
    "tuple_type": "should be a list",
    "dict_type": "should be `key: value` lines",
    "model_type": "should be `key: value` lines",
    "model_attributes_type": "should be `key: value` lines",
    "dataclass_type": "should be `key: value` lines",
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "path_type": "should be a path",
    "string_pattern_mismatch": "does not look right",
    "finite_number": "should be a finite number",
}


def explain(error: ValidationError, source: Source) -> list[Problem]:
    """pydantic's errors as `file:line:col: key: what (got …); did you mean …?`, the branches of a union in one line."""
    told: dict[Location, list[str]] = {}
    tails: dict[Location, str] = {}
    items = error.errors()
    for item in items[:MAX_TOLD]:
        location, what, got, hint = _told(item, source)
        told.setdefault(location, []).append(what)
        tails[location] = got + (hint or tails.get(location, "").partition(")")[2])
    problems = []
    for at, words in told.items():
        first, *others = dict.fromkeys(words)
        text = " or ".join([first, *(other.removeprefix("should be ") for other in others)])
        problems.append(Problem(mark_of(source, at), f"{dotted(at) + ': ' if at else ''}{text}{tails[at]}"))
    lengths = accumulate(len(problem.message) for problem in problems)
    kept = problems[: max(1, sum(length <= MAX_TEXT for length in lengths))]
    left = max(0, len(items) - MAX_TOLD) + len(problems) - len(kept)
    if left:
        kept.append(Problem(mark_of(source, ()), f"and {count_text(left, 'more mistake')}"))
    return kept


def _told(item: Any, source: Source) -> tuple[Location, str, str, str]:
    """(place, what is wrong, what was found, what may be meant) of one of pydantic's errors."""
    location, beyond = walk(source.data, item["loc"])
    kind, context = item["type"], item.get("ctx", {})
    blame = context.get("error")
    location = (*location, *getattr(blame, "path", ()))
    got = "" if isinstance(blame, FieldError) else f" (got {shown(item['input'])})"
    if kind == "missing":
        location = (*location, *beyond[-1:])
        about = _property(location).get("description")
        return location, "is missing" + (f": {about}" if about else ""), "", ""
    if kind == "extra_forbidden":
        return location, "unknown key", "", _section_of(location) or did_you_mean(location[-1], _keys_at(location[:-1]))
    if kind in ("plugin_type_missing", "plugin_broken"):
        return location, context["said"], "", ""
    if kind in ("plugin_unknown", "plugin_type_unknown"):
        found = context["found"]
        hint = (
            suite_hint(found, context["known"]) if location[:1] == ("suite",) else did_you_mean(found, context["known"])
        )
        return location, context["said"], f" (got {shown(found)})", hint
    what = PLAIN_WORDS.get(kind, item["msg"].removeprefix("Value error, "))
    what = what.removeprefix("Input ").removeprefix("String ")
    if kind == "string_pattern_mismatch" and (examples := _property(location).get("examples")):
        return location, what, got, f"; write e.g. {' or '.join(examples)}"
    if kind == "literal_error":
        return (
            location,
            what,
            got,
            did_you_mean(item["input"], context["expected"].replace("'", "").replace(" or ", ", ").split(", ")),
        )
    return location, what, got, ""


def mark_of(source: Source, location: Location) -> Mark:
    """Where a value was written; what has no place of its own stands where the mapping around it does."""
    while location not in source.marks and location:
        location = location[:-1]
    return source.marks.get(location, Mark("?"))


def walk(data: Any, loc: Iterable[str | int]) -> tuple[Location, Location]:
    """(the part of `loc` that exists in `data`, the rest): pydantic puts union branches between real keys."""
    here: list[str | int] = []
    rest: list[str | int] = []
    for step in loc:
        index = int(step) if isinstance(data, list) and str(step).isdecimal() else step
        if isinstance(data, dict) and index in data:
            data = data[index]
            here.append(index)
            rest.clear()
        elif isinstance(data, list) and isinstance(index, int) and index < len(data):
            data = data[index]
            here.append(index)
            rest.clear()
        else:
            rest.append(step)
    return tuple(here), tuple(rest)


@cache
def _schema() -> JsonObject:
    return Experiment.model_json_schema()


def _schemas_at(location: Location) -> list[JsonObject]:
    """Every JSON Schema that may describe the value at `location`, unions opened."""

    def opened(node: JsonObject) -> list[JsonObject]:
        if "$ref" in node:
            return opened(_schema()["$defs"][node["$ref"].rpartition("/")[2]])
        return [
            node,
            *(inner for key in ("anyOf", "oneOf") for option in node.get(key, ()) for inner in opened(option)),
        ]

    nodes = opened(_schema())
    for step in location:
        inner = [
            n["items"] if isinstance(step, int) else n["properties"][step]
            for n in nodes
            if (isinstance(step, int) and "items" in n) or step in n.get("properties", {})
        ]
        nodes = [found for node in inner for found in opened(node)]
    return nodes


def _section_of(location: Location) -> str:
    """Where in an arm a key belongs that was written into the arm itself."""
    if location[:1] != ("arms",) or len(location) != 3:
        return ""
    found = [
        section for section in ("policy", "quant", "execution") if location[-1] in _keys_at((*location[:2], section))
    ]
    return f"; write {found[0]}: {{{location[-1]}: …}}" if found else ""


def _keys_at(location: Location) -> list[str]:
    keys = [key for node in _schemas_at(location) for key in node.get("properties", {})]
    return keys if location else [*keys, "extends"]


def _property(location: Location) -> JsonObject:
    found = (n["properties"] for n in _schemas_at(location[:-1]) if "properties" in n)
    return next((keys[location[-1]] for keys in found if location[-1] in keys), {})


def dotted(location: Location) -> str:
    """`quant.per_layer_bits.down` for a message; never long."""
    return ".".join(short(step) for step in location)
