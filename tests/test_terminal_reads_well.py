"""Risk: a narrow terminal breaks the names that people must copy, and counts read "all 1 shards"."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from synthetic_run import make_run

import qlibero.console as terminal
from qlibero.cli import catalogue
from qlibero.launch import status
from qlibero.reporting.html.document import write_report
from qlibero.reporting.terminal import print_run

LABELS = {"baseline": 0.0, "aa": 0.02, "w4a8-smooth_hadamard-llm+expert": 0.1, "w4a4.duquant_llm_expert": 0.2}
CELL = st.none() | st.integers(0, 10**6) | st.text("abc -_/[]é,", max_size=60) | st.lists(st.text("xyz-", max_size=30))


def shown(rows: list, width: int) -> str:
    stream = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal, "console", lambda: Console(width=width, file=stream))
        terminal.table(rows, "title")
    return stream.getvalue()


def words(text: str) -> set[str]:
    return set(re.split(r"[\s\-_+/.]+", text)) - {""}


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_listed_names_are_whole_at_every_width(width: int) -> None:
    rows = catalogue.experiments()
    text = shown(rows, width)
    assert max(map(len, text.splitlines())) <= width
    for row in rows:
        assert all(re.search(rf"(?m)(^|\s){re.escape(arm)}(,|\s)", text) for arm in row["arms"]), row["experiment"]


@given(rows=st.lists(st.fixed_dictionaries({"name": CELL}, optional={"file": CELL, "a": CELL, "b": CELL}), max_size=5))
@example(rows=[{"name": [""] * 11 + ["xxxxxx"], "a": None}])
@settings(max_examples=30, deadline=None)
def test_no_table_is_wider_than_its_terminal_or_loses_a_letter(rows: list) -> None:
    def letters(text: str) -> list[str]:
        return sorted(re.findall(r"[abcxyzé\[\]]", text))

    told = [terminal._cell(value) for row in rows for value in row.values()]
    heads = "".join({key for row in rows for key in row})
    for width in (30, 80, 2_000):
        text = shown(rows, width)
        assert max(map(len, text.splitlines())) <= width
        if "\nname" in text:  # the headings once: a table
            assert letters(text) == sorted(letters("".join(told)) + letters(heads + "title"))
        else:
            assert set(letters("".join(told))) <= set(letters(text))


@pytest.mark.parametrize("width", [80, 90, 100])
def test_a_narrow_terminal_breaks_names_between_their_parts_only(tmp_path: Path, width: int) -> None:
    run = make_run(tmp_path / "run", LABELS)

    def printed(width: int) -> str:
        to = Console(width=width, file=StringIO())
        print_run(run, to)
        return to.file.getvalue().partition("\nledger ")[0]

    assert words(printed(width)) - words(printed(400)) == set()


def test_one_of_a_thing_is_not_told_in_the_plural(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [terminal.count_text(n, "shard") for n in (0, 1, 2, 2_000)] == [
        "0 shards",
        "1 shard",
        "2 shards",
        "2,000 shards",
    ]
    assert terminal.count_text(3, "trajectory") == "3 trajectories" and terminal.count_text(1, "A/A arm") == "1 A/A arm"
    run = make_run(tmp_path / "run", {"baseline": 0.0, "w4a8": 1.0}, tasks=1, inits=1)
    print_run(run)
    write_report([run], tmp_path / "report.html")
    page = re.sub(r"(?s)<(style|script).*?</\1>|<[^>]+>", " ", (tmp_path / "report.html").read_text())
    cell = status.CellStatus("run", done=1, episodes=1, errors=1, last_error="", successes=1, machines={})
    line = status.headline(status.Status(run, 1, 1, 0, {}, None, None, None, (cell,)))
    for text in (capsys.readouterr().err, page.replace("\u00a0", " "), line):
        assert not re.findall(
            r"(?<![\d.,/−+-])1 (?:[a-z]+ ){0,2}(?:episodes|arms|tasks|shards|pairs|errors|lines|scenes|calls|suites)\b",
            text,
        )
    assert line == "1 of 1 episode, 1 of 1 shard, 1 error"
