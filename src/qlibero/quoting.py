"""Values in the syntax of another program: one function for each, so that a name stays a name.

The shell has `shlex`, HTML has `reporting.html.markup`, JSON has `json`. Here are those that the standard library
lacks.
"""

from __future__ import annotations

import re
import unicodedata

from qlibero.errors import UserError

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "Δ": r"$\Delta$",
    "−": "$-$",
    "×": r"$\times$",
    "µ": r"$\mu$",
}


def sbatch_option(name: str, value: str) -> str:
    """`--name="value"` for an #SBATCH line, which Slurm splits at blanks, with quotes, and without any expansion.

    Raises UserError for what no quoting carries: line breaks and other control characters.
    """
    if any(unicodedata.category(character) == "Cc" for character in value):
        raise UserError(f"{value!r} holds a control character, which no #SBATCH line can carry: choose another name")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'--{name}="{escaped}"' if escaped != value or not _plain(value) else f"--{name}={value}"


def slurm_file(path: str) -> str:
    """A path as part of a Slurm file name pattern, in which `%` begins a variable and is written twice.

    Raises UserError for a backslash: Slurm takes a pattern that holds one without any variables, so not even %a works.
    """
    if "\\" in path:
        raise UserError(f"{path}: Slurm cannot write logs below a path with a backslash; choose another --out")
    return path.replace("%", "%%")


def latex(text: str) -> str:
    """Text in a LaTeX document: nothing in it is a command."""
    return "".join(LATEX.get(character, character) for character in visible(text))


def markdown(text: str) -> str:
    """Text in a Markdown table's cell: one line, and nothing in it is markup, HTML or a link.

    An underscore within a word is none to Markdown either, so names like `w4a8_llm` stay as they are.
    """
    text = re.sub(r"[\\`*|<&~]", r"\\\g<0>", " ".join(visible(text).split()))
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", text)
    return re.sub(r"\](?=[(\[:])", r"\]", text).replace("://", ":\\//")


def visible(text: str) -> str:
    """Text for a terminal or a page: controls of the terminal and of the writing direction are shown, not obeyed."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t" or not _acts(c) else f"\\u{ord(c):04x}" for c in text)


def _plain(value: str) -> bool:
    return bool(value) and not any(character.isspace() or character in "\"'#" for character in value)


def _acts(character: str) -> bool:
    # Cf: bidi controls, zero-width characters; Cc: escape sequences; Cs: halves that no output can encode
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character != "\u200d"
