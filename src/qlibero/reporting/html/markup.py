"""HTML from Python calls, escaped by construction: whatever is not `Markup` already is text.

Names of experiments, arms, layers and error messages come from configs and from other people's libraries;
with one function that writes every tag there is one place where they could break out of it, and they cannot.
"""

from __future__ import annotations

import json
import re
from html import escape
from typing import Any

from qlibero.quoting import visible

VOID = {"br", "hr", "img", "input", "meta", "link", "wbr"}
DRAWN = {"path", "rect"}  # SVG elements close themselves with a slash, or they would swallow what follows


class Markup(str):
    """A string that is HTML already. Only `el`, `join` and constants of this package make one."""


def el(tag: str, *children: Any, **attributes: Any) -> Markup:
    """An element.

    `class_` and `data_x` become class and data-x; True is a bare attribute, None and False leave it out.
    """
    pieces = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        pieces.append(name if value is True else f'{name}="{escape(_text(value), quote=True)}"')
    opening = f"<{' '.join(pieces)}{'/' if tag in DRAWN else ''}>"
    return Markup(opening if tag in VOID | DRAWN else f"{opening}{join(*children)}</{tag}>")


def join(*children: Any) -> Markup:
    """Children one after another; lists and generators are opened, None and False skipped, text is escaped."""
    out: list[str] = []
    for child in children:
        if child is None or child is False:
            continue
        if isinstance(child, Markup):
            out.append(child)
        elif isinstance(child, str | int | float):
            out.append(escape(_text(child), quote=False))
        else:
            out.append(join(*child))
    return Markup("".join(out))


def breakable(text: str) -> Markup:
    """A name that may break after its separators, and not in the middle of a word."""
    return join([el("wbr") if i else None, piece] for i, piece in enumerate(re.split(r"(?<=[._/+-])(?![._/+-])", text)))


def script_json(data: Any, id_: str) -> Markup:
    """Data for the page's script, texts as the page shows them. `<`, `>` and `&` are escaped inside the JSON, so no
    `</script>` can end it early."""
    text = json.dumps(_visible_in(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(character, code)
    return Markup(f'<script type="application/json" id="{escape(id_, quote=True)}">{text}</script>')


def _visible_in(data: Any) -> Any:
    if isinstance(data, dict):
        return {_visible_in(key): _visible_in(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_visible_in(value) for value in data]
    return visible(data) if isinstance(data, str) else data


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else visible(str(value))
