"""The small types that the schema is made of: what a number, a name, a word, a line or an address may be."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, Strict
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from qlibero.documents import JsonObject
from qlibero.plugin_source import BrokenPlugin
from qlibero.registry import Plugin, UnknownPlugin, get, names

MOST = 1_000_000  # of anything that is counted, where nothing else bounds it
MAX_SEED = 2**32 - 1
LONGEST_PATTERN = 2_000
SHOWN = 12  # names of plug-ins in an error


class FieldError(ValueError):
    """A cross-field error that knows which key is to blame; `path` is relative to the model that raises it."""

    def __init__(self, path: tuple[str | int, ...], message: str):
        super().__init__(message)
        self.path = path


class StrictModel(BaseModel):
    """Unknown keys are refused, values never change after validation, NaN and infinity are no numbers here."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )


def regex_of(pattern: str) -> re.Pattern[str]:
    """The compiled pattern. Raises ValueError with the reason."""
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"a regular expression of {len(pattern):,} characters; the most is {LONGEST_PATTERN:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            return re.compile(pattern)
    except FutureWarning as warning:
        text = str(warning)
        raise ValueError(
            f"not a regular expression for every Python: {text[0].lower()}{text[1:]}, which later ones may read "
            "otherwise; write a backslash before each [, -, &, | or ~ that stands for itself inside [...]"
        ) from None
    except RecursionError:
        raise ValueError("not a regular expression: nested too deeply") from None
    except (re.error, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from None


def _regex(pattern: str) -> str:
    regex_of(pattern)
    return pattern


def _one_line(text: str) -> str:
    if not text.isprintable() or not text.strip():
        raise ValueError("should be one line of printable characters")
    return text


def _word(text: str) -> str:
    if not text.isprintable() or not text or any(c.isspace() for c in text):
        raise ValueError("should be one word, without blanks or line ends")
    return text


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = 80 if parts.port is None else parts.port
    except ValueError:
        parts, port = None, 0
    if parts and (parts.username or parts.password):
        raise FieldError((), "holds a password, which every record would repeat; give it by api_key_env instead")
    printable = url.isprintable() and not any(c.isspace() for c in url)
    if not parts or not printable or parts.scheme not in ("ws", "wss") or not parts.hostname or not port:
        raise ValueError("does not look right; write e.g. ws://127.0.0.1:8000 or wss://host/path")
    return url


def one_of_pattern(pattern: str, *examples: str) -> Any:
    """A text of this pattern (Rust's syntax, ASCII); `examples` are what an error and an editor show."""
    return Field(pattern=pattern, examples=list(examples))


class PluginName:
    """Of a text: the name of a plug-in, or the module that is one. Editors are offered the names there are."""

    def __init__(self, kind: type[Plugin]):
        self.kind = kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._found, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonObject:
        return {"anyOf": [{"enum": list(names(self.kind))}, {"type": "string", "pattern": r"\."}]}

    def _found(self, name: str) -> str:
        try:
            get(self.kind, name)
        except UnknownPlugin as error:
            facts = {"said": one_of(error.known), "known": error.known, "found": name}
            raise PydanticCustomError("plugin_unknown", "{said}", facts) from None
        except BrokenPlugin as error:
            raise PydanticCustomError("plugin_broken", "{said}", {"said": str(error)}) from None
        return name


def one_of(known: Iterable[str]) -> str:
    """`should be 'a', 'b' or 'c'`, with what else a plug-in may be called; of many only the first."""
    said = [repr(name) for name in known]
    more = f", … {len(said) - SHOWN} more (`qlibero ls plugins`)" if len(said) > SHOWN + 1 else ""
    shown = said[:SHOWN] if more else said
    return f"should be {', '.join(shown)}{more} or the module of your own (package.module)"


Int = Annotated[int, Strict()]  # lax integers would take `true` for 1
Float = Annotated[float, Strict()]
Count = Annotated[Int, Field(ge=1, le=MOST)]
Seed = Annotated[Int, Field(ge=0, le=MAX_SEED)]
Slug = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=120, examples=["pi05_w4a8", "my-arm.2"])
]
Regex = Annotated[str, AfterValidator(_regex)]
Line = Annotated[str, Field(max_length=2_000), AfterValidator(_one_line)]
Word = Annotated[str, Field(max_length=200), AfterValidator(_word)]
Address = Annotated[str, Field(max_length=1_000), AfterValidator(_address)]
