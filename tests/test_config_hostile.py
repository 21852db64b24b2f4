"""Risk: a configuration that nobody sanitised hangs the loader, ends in a traceback or fills the screen."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from qlibero.config.load import ConfigError, load_experiment
from qlibero.config.sweep import load_sweep

pytestmark = pytest.mark.slow

GOOD = """\
suite: libero_object
policy: {type: pi05, checkpoint: weights}
quant: {method: rtn, layout: llm}
backends: [baseline, fake]
"""
LIMIT_S = 10.0  # of processor time; the worst takes about one second on an idle core
LONGEST = 8_000  # characters of a whole message


def refused(path: Path, *sets: str, environ: dict[str, str] | None = None, sweep: bool = False) -> str:
    """The message of an error that came soon enough, with exit status 2 and of bearable length."""
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        (load_sweep if sweep else load_experiment)(path, sets, environ or {}, check_files=False)
    assert time.process_time() - began < LIMIT_S
    message = str(caught.value)
    assert caught.value.exit_status == 2 and 0 < len(message) < LONGEST
    assert all(len(line) < 900 for line in message.splitlines())
    return message


def write(directory: Path, text: str | bytes, name: str = "x.yaml") -> Path:
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


def bomb(leaf: str, link: str) -> str:
    """Nine levels of ten references each: 10^9 values from 1 kB."""
    levels = [f"a{i}: &a{i} {link % ', '.join([f'*a{i - 1}'] * 10)}\n" for i in range(1, 10)]
    return f"a0: &a0 {leaf}\n" + "".join(levels)


NUMBERS = {"hexadecimal": "0x" + "f" * 6_000, "decimal": "9" * 6_000, "fraction": "1" + "0" * 5_000 + ".5"}
HUGE = {"1 MB of text": "'" + "a" * 400_000 + "'", "a list": "[" + "1, " * 9_000 + "1]"} | NUMBERS
KEYS = ("name", "seed", "tasks", "max_steps", "suite", "policy", "quant", "backends", "tracking", "launch", "unknown")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", HUGE, ids=str)
def test_no_value_is_too_large_for_a_short_answer(tmp_path: Path, key: str, value: str) -> None:
    lines = [line for line in GOOD.splitlines() if not line.startswith(f"{key}:")]
    path = write(tmp_path, "\n".join([*lines, f"{key}: {HUGE[value]}"]))
    assert key in refused(path) or "characters" in refused(path)
    assert "x.yaml" in refused(path)
    assert refused(write(tmp_path, GOOD, "good.yaml"), f"{key}={HUGE[value]}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (bomb("{}", "{<<: [%s]}"), "20,000"),
        (bomb("{k: 1}", "{<<: [%s]}"), "20,000"),
        (bomb("[]", "[%s]"), "20,000"),
        (bomb("x", "[%s]"), "20,000"),
        ("b: {" + ", ".join(f"k{i}: 1" for i in range(15_000)) + "}", "20,000"),
        ("a: &a {" + ", ".join(f"k{i}: 1" for i in range(4_000)) + "}\nb: {<<: *a}\n" + GOOD, "unknown key"),
        ("".join(f"k{i}: 4\n" for i in range(9_000)) + GOOD, "more mistakes"),
        ("? " + "a" * 400_000 + "\n: 1\n" + GOOD, "unknown key"),
        ("x: " + "[" * 60 + "]" * 60, "24 levels"),
        ("x: " + "{a: " * 200 + "}" * 200, "24 levels"),
        ("x: " + "[" * 50_000, "deep"),
        ("x: *" + "a" * 100_000, "undefined alias"),
        ("a: &a [*a]\n" + GOOD, "an alias contains itself"),
        ('x: "\\UFFFFFFFF"', "x.yaml:1:"),
        ('name: "\\uD800"\n' + GOOD, "half a character"),
        ("%YAML " + "9" * 6_000 + ".1\n---\nx: 1", "x.yaml:1:"),
        ("x" * 600_000, "600,000 bytes"),
        (GOOD + "extends: 'a\\0b'", "cannot read"),
        (GOOD + 'extends: "a\\0b"', "NUL"),
        (GOOD + "extends: ~nosuchuser/x.yaml", "no user ~nosuchuser"),
        (GOOD.replace("checkpoint: weights", "checkpoint: '~nosuchuser/x'"), "no user ~nosuchuser"),
        (GOOD.replace("checkpoint: weights", 'checkpoint: "a\\0b"'), "NUL"),
        (GOOD + "extends: " + "a" * 5_000, "cannot read"),
        (GOOD + "extends: [.]", "it is a directory"),
        (GOOD + "extends: /dev/zero", "it is a device"),
    ],
)
def test_a_text_made_to_break_the_reader_is_refused_soon_and_in_few_words(tmp_path: Path, text: str, says: str) -> None:
    assert says in refused(write(tmp_path, text))


@pytest.mark.parametrize("tag", ["!!python/object:os.system", "!evil", "!!set", "!!omap", "!!binary", "!!timestamp"])
@pytest.mark.parametrize("value", ["{engine: local}", "[0]", "x"])
def test_unknown_tags_are_refused_wherever_they_stand(tmp_path: Path, tag: str, value: str) -> None:
    assert f"tag {tag} is not understood here" in refused(write(tmp_path, f"{GOOD}launch: {tag} {value}\n"))


@pytest.mark.parametrize(
    "value", ["!!bool maybe", "!!null yes_please", "!!int 1_000", "!!int x", "!!float one", "!!map x", "!!seq 1"]
)
def test_a_tag_that_its_value_does_not_fit_is_refused(tmp_path: Path, value: str) -> None:
    assert "x.yaml:5:" in refused(write(tmp_path, f"{GOOD}stop: {value}\n"))


@pytest.mark.parametrize(
    "pattern",
    ["a{99999999999999999999}", "(" * 600 + "a" + ")" * 600, "(" * 3_000, "(?P<x>a)(?P<x>b)", "[a-", "\\", "a" * 3_000],
)
@pytest.mark.parametrize(
    "place",
    ["quant={include: ['%s'], method: rtn}", "quant.exclude=['%s']", "quant.per_layer_bits={? '%s' : 4}", "INCLUDE"],
)
def test_every_regular_expression_is_accepted_or_named(tmp_path: Path, place: str, pattern: str) -> None:
    path = write(tmp_path, GOOD)
    if place == "INCLUDE":
        message = refused(path, environ={"OPENPI_DUQUANT_INCLUDE": pattern})
    else:
        message = refused(path, place % pattern)
    assert "regular expression" in message


def test_what_files_extend_costs_one_reading_each(tmp_path: Path) -> None:
    write(tmp_path, GOOD + "sed: 1\n", "f0.yaml")
    for i in range(1, 24):
        write(tmp_path, f"extends: [f{i - 1}.yaml, f{i - 1}.yaml]\nseed: {i}\n", f"f{i}.yaml")
    assert refused(tmp_path / "f23.yaml").count("sed: unknown key; did you mean seed?") == 1
    write(tmp_path, GOOD, "f0.yaml")
    loaded = load_experiment(tmp_path / "f23.yaml", environ={}, check_files=False)
    assert loaded.seed == 23
    for i in range(24, 80):
        write(tmp_path, f"extends: f{i - 1}.yaml\n", f"f{i}.yaml")
    assert "24 files" in refused(tmp_path / "f79.yaml")


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "directory.yaml").mkdir()
    (tmp_path / "a.yaml").symlink_to("b.yaml")
    (tmp_path / "b.yaml").symlink_to("a.yaml")
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    for name, says in {
        "pipe": "it is a pipe",
        "directory": "it is a directory",
        "a": "cannot read",
        "device": "it is a device",
        "absent": "No such file",
    }.items():
        assert says in refused(tmp_path / f"{name}.yaml")
        assert says in refused(write(tmp_path, f"extends: {name}.yaml\n"))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32", "cp1252", "shift_jis"])
def test_another_encoding_is_named_and_never_taken_for_another_file(tmp_path: Path, encoding: str) -> None:
    text = GOOD + ("name: 名前\n" if encoding == "shift_jis" else "name: café\n")
    message = refused(write(tmp_path, text.encode(encoding)))
    assert "did you mean" not in message and "x.yaml:" in message
    if encoding == "latin-1":
        assert "x.yaml:5:10: byte 0xe9 is not UTF-8; if the file is Latin-1: iconv -f LATIN1 -t UTF-8" in message
    if encoding in ("utf-16", "utf-32"):
        assert f"is written in {encoding.upper()}; save it as UTF-8" in message


@pytest.mark.parametrize(
    "text",
    ["grid: {extends: [%s]}", "grid: {extends: [[%s]]}", "cells: {a: {extends: %s}}", "cells: {a: {extends: [%s]}}"],
)
@pytest.mark.parametrize(
    "value", ["5", "null", "{a: b}", "[[]]", "true", '"a\\0b"', "~nosuchuser/x", "/dev/null", "''"]
)
def test_an_axis_of_files_takes_nothing_but_files(tmp_path: Path, text: str, value: str) -> None:
    message = refused(write(tmp_path, GOOD + text % value + "\n"), sweep=True)
    assert "x.yaml:5:" in message or "/dev/null" in message


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ("a." * 20_000 + "b=1", "no key lies more than"),
        ("quant." * 30 + "b=1", "no key lies more than"),
        ("x=" + "[" * 340 + "]" * 340, "deep"),
        ("k" * 100_000 + "=1", "unknown key"),
        ("tasks." + "9" * 5_000 + "=1", "tasks"),
        ("backends.٠=fake", "list of 2"),
    ],
)
def test_a_setting_made_to_break_the_parser_is_refused_in_few_words(tmp_path: Path, sets: str, says: str) -> None:
    assert says in refused(write(tmp_path, GOOD + "tasks: [0]\n"), sets)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("WBITS_DEFAULT", "9" * 6_000),
        ("WBITS_DEFAULT", "٤"),
        ("WBITS_DEFAULT", "4_0"),
        ("WBITS_DEFAULT", "-4"),
        ("BLOCK", "9" * 30),
        ("WBITS", "a:٤"),
        ("WBITS", "a:" + "9" * 5_000),
        ("WBITS", ":4"),
        ("LAYERS", "a,\udcff"),
        ("EXCLUDE", "\udcff"),
        ("ROW_ROT", "\n"),
        ("INCLUDE", "("),
    ],
)
def test_an_environment_nobody_sanitised_is_named(tmp_path: Path, variable: str, value: str) -> None:
    name = f"OPENPI_DUQUANT_{variable}"
    assert name in refused(write(tmp_path, GOOD), environ={name: value})


def test_ten_thousand_cells_load_or_fail_in_seconds(tmp_path: Path) -> None:
    seeds = f"grid: {{seed: {list(range(100))}, margin: {[round(0.01 + i / 1000, 3) for i in range(100)]}}}\n"
    began = time.process_time()
    assert len(load_sweep(write(tmp_path, GOOD + seeds), environ={}, check_files=False).cells) == 10_000
    assert time.process_time() - began < 30
    wrong = f"grid: {{sede: {list(range(9_000))}}}\n"
    assert "did you mean seed?" in refused(write(tmp_path, GOOD + wrong), sweep=True)
