"""Risk: an A/A test that finds what is not there, or not what is. Numbers of docs/statistics.md, from their data."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest

from qlibero.places import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks/aa_exchangeability.py"
DATA = REPOSITORY / "examples/analysis_data"


def ask(*arguments) -> str:
    command = [sys.executable, SCRIPT, *map(str, arguments), "--draws", "4000"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def p_of(said: str, measure: str) -> float:
    return float(next(line for line in said.splitlines() if line.strip().startswith(measure)).rpartition("=")[2])


@pytest.mark.parametrize(
    ("name", "scenes", "shift", "p"),  # as an independent script found them (4,000 draws, equal trajectories joined)
    [
        ("official", "192 complete scenes, 4 begun", "+2.8802", 0.07),
        ("fresh", "187 complete scenes, 5 begun", "+2.0134", 0.39),
    ],
)
def test_the_committed_data_say_what_the_documentation_says(name, scenes, shift, p):
    said = ask(DATA / f"aa_{name}.csv")
    assert scenes in said and shift in said and p_of(said, "steps") == pytest.approx(p, abs=0.03)


@pytest.mark.slow
def test_a_baseline_that_is_favoured_is_found_and_copies_do_not_help(tmp_path):
    """Two steps less in every scene; and a copied arm changes nothing, for it is no further draw."""
    with (DATA / "aa_fresh.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    def written(name, rows):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return tmp_path / name

    same = [
        r | {"steps": "100", "action_digest": f"{r['arm']}{r['action_digest']}"}
        for r in rows
        if r["arm"] < "aa-3" or r["arm"] == "baseline"
    ]
    quick = [r | {"steps": "98"} if r["arm"] == "baseline" else r for r in same]
    assert p_of(ask(written("same.csv", same)), "steps") == 1.0
    assert p_of(ask(written("quick.csv", quick)), "steps") < 0.001
    copied = rows + [r | {"arm": "aa-6"} for r in rows if r["arm"] == "aa-3"]
    assert ask(written("a.csv", rows)).splitlines()[1:] == ask(written("a.csv", copied)).splitlines()[1:]


def test_a_file_without_the_columns_is_named(tmp_path):
    (tmp_path / "x.csv").write_text("arm,task\nbaseline,0\n")
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "x.csv"], capture_output=True, text=True)
    assert done.returncode == 2 and "x.csv: no column action_digest" in done.stderr
