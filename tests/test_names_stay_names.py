"""Risk: a name from a config, a ledger or another tool's file turns the writing direction of a report or a terminal."""

from __future__ import annotations

import json
import re
import unicodedata

import pytest
from rich.text import Text

from qlibero import quoting
from qlibero.console import console, print_line, table
from qlibero.reporting.html.markup import el, join, script_json
from qlibero.reporting.rich_tables import titled_table

BIDI = ["\u202e", "\u2066", "\u2069", "\u200f", "\u061c"]


@pytest.mark.parametrize("control", BIDI, ids=ascii)
def test_direction_controls_are_shown_in_pages_and_terminals(control, capsys):
    name = f"evil{control}gpj"
    shown = f"evil\\u{ord(control):04x}gpj"
    assert shown in el("td", name, title=name) and control not in el("td", name, title=name)
    assert shown in join([name])
    print_line(name)
    table([{"arm": name}], title=name)
    console().print(name)
    said = capsys.readouterr().err
    assert said.count(shown) == 4 and control not in said


def test_other_scripts_and_emoji_are_left_alone(capsys):
    name = "Größe 模型 שלום 👩\u200d🔬"
    print_line(name)
    console().print(name, style="red")
    assert capsys.readouterr().err.count(name) == 2 and name in el("b", name)


ESCAPES = ["\x1b[31mred", "\x1b]0;title\x07", "\x1b[2J", "\x1b[8mhidden", "\x9b31m", "a\rb", "a\x08b"]


@pytest.mark.parametrize("name", ESCAPES, ids=ascii)
@pytest.mark.parametrize("coloured", [False, True])
def test_escape_sequences_do_not_reach_the_terminal(name, coloured, capsys, monkeypatch):
    """Colours of our own do, where a terminal has them: a name in red is red, and hides nothing."""
    if coloured:
        monkeypatch.setenv("FORCE_COLOR", "1")
    print_line(name)
    table([{"arm": name, "x": name}], title=name)
    console().print(Text(name, style="red"))
    found = titled_table(name, "arm")
    found.add_column("x")
    found.add_row(name, Text(name))
    console().print(found)
    said = capsys.readouterr().err
    assert coloured == ("\x1b[31m" in said) and "\x1b[8m" not in said and "\x1b[2J" not in said
    plain = re.sub(r"\x1b\[[013]?1?m", "", said)
    assert {c for c in plain if unicodedata.category(c) == "Cc"} == {"\n"}


def test_texts_of_the_pages_script_are_as_harmless_as_the_pages(capsys):
    page = script_json({"a\u202eb": ["\x1b[31m", "</script>\u2028", ("\u2066", 1.5, None)]}, "data")
    assert json.loads(page.partition(">")[2].removesuffix("</script>")) == {
        "a\\u202eb": ["\\u001b[31m", "</script>\\u2028", ["\\u2066", 1.5, None]]
    }


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("w4a8_llm+exp", "w4a8_llm+exp"),
        ("_x_ *y* `z` ~s~", r"\_x\_ \*y\* \`z\` \~s\~"),
        ("a|b\nc\\d", r"a\|b c\\d"),
        ("<img src=x> &amp;", r"\<img src=x> \&amp;"),
        ("[here](x) [x][y] [x]: y", r"[here\](x) [x\][y] [x\]: y"),
        ("https://evil.example", r"https:\//evil.example"),
        ("[−7.0, 2.0]", "[−7.0, 2.0]"),
        ("a\u202eb", r"a\\u202eb"),
    ],
)
def test_a_name_is_no_markdown(text, quoted):
    assert quoting.markdown(text) == quoted


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("a_b & 100 % #1 $x$ ^~", r"a\_b \& 100 \% \#1 \$x\$ \textasciicircum{}\textasciitilde{}"),
        ("<a|b>", r"\textless{}a\textbar{}b\textgreater{}"),
        ("Δ −7 × µ", r"$\Delta$ $-$7 $\times$ $\mu$"),
    ],
)
def test_a_name_is_no_latex(text, quoted):
    assert quoting.latex(text) == quoted
