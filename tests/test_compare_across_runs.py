"""Risk: arms of several directories are compared under each other's names, against another reference, or joined."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_run import make_run

from qlibero import cli
from qlibero.results.compare import compare_runs


@pytest.fixture(scope="module")
def weeks(tmp_path_factory) -> tuple[Path, Path]:
    """One experiment run in two weeks; in the second, w4a8 flips more of the same scenes."""
    root = tmp_path_factory.mktemp("weeks")
    first = make_run(root / "monday/run", {"baseline": 0.0, "w4a8": 0.05}, name="study")
    return first, make_run(root / "friday/run", {"baseline": 0.0, "w4a8": 0.3, "w4a4": 0.3}, name="study")


def document(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert cli.main([*words]) == 0, words
    found: dict = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def outcomes(run: Path, arm: str) -> dict[str, str]:
    lines = [json.loads(line) for path in (run / arm).glob("*.jsonl") for line in path.read_text().splitlines()]
    return {f"{line['task']}/{line['init']}": line["outcome"] for line in lines}


def test_one_arm_of_two_weeks_is_paired_with_itself(weeks, capsys):
    old, new = weeks
    found = document(capsys, "compare", f"{old}/w4a8", f"{new}/w4a8")
    assert found["reference"] == "monday/run/w4a8" and list(found["arms"]) == ["friday/run/w4a8"]
    assert found["grouped"] == {"monday/run/w4a8": [str(old)], "friday/run/w4a8": [str(new)]}
    before, after = outcomes(old, "w4a8"), outcomes(new, "w4a8")
    finished = [key for key in before if "error" not in (before[key], after[key])]
    broken = sum(before[key] == "success" and after[key] == "failure" for key in finished)
    repaired = sum(before[key] == "failure" and after[key] == "success" for key in finished)
    arm = found["arms"]["friday/run/w4a8"]
    assert (arm["pairs"], arm["broken"], arm["repaired"]) == (len(finished), broken, repaired) and broken + repaired
    assert arm["label"] == "friday/run/w4a8"


def test_labels_name_arms_by_their_path_or_their_name(weeks, capsys):
    old, new = weeks
    labels = ("--label", f"{old}/w4a8/=last week", "--label", "friday/run/w4a8=this week")
    found = document(capsys, "compare", f"{old}/w4a8", f"{new}/w4a8", *labels)
    assert found["reference_label"] == "last week" and found["arms"]["friday/run/w4a8"]["label"] == "this week"
    assert found["arms"]["friday/run/w4a8"]["sentence"].startswith("this week ")
    whole = document(capsys, "compare", str(new), "--label", "w4a4=four bits")
    assert whole["arms"]["w4a4"]["label"] == "four bits" and whole["reference"] == "baseline"
    for words, told in (
        ((f"{old}/w4a8", f"{new}/w4a8", "--label", "w9=x"), "--label w9=x: no such arm; here are monday/run/w4a8"),
        ((f"{old}/w4a8", "--label", "w4a8"), "should look like ARM=TEXT"),
        ((f"{old}/w4", f"{new}/w4a8"), "has the arms baseline, w4a8"),
        ((f"{old}/w4a8",), "only one arm here"),
    ):
        assert cli.main(["compare", *words]) == 2
        assert told in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["message"]


def test_any_arms_of_any_directories_with_the_reference_that_is_named(weeks, capsys, tmp_path):
    old, new = weeks
    given = (f"{new}/w4a4", f"{old}/baseline", f"{new}/w4a8", f"{old}/w4a8")
    found = document(capsys, "compare", *given, "--reference", "baseline")
    assert set(found["arms"]) == {"w4a4", "friday/run/w4a8", "monday/run/w4a8"}
    assert all(arm["pairs"] >= 28 for arm in found["arms"].values())
    # a whole run beside a single arm of another: the run's own reference
    beside = document(capsys, "compare", str(old), f"{new}/w4a4")
    assert beside["reference"] == "baseline" and set(beside["arms"]) == {"w4a8", "w4a4"}
    # exported tables and the report take the same words
    for run, name in ((old, "a"), (new, "b")):
        assert cli.main(["export", str(run), "-o", str(tmp_path / f"{name}.jsonl")]) == 0
    capsys.readouterr()
    tables = document(capsys, "compare", f"{tmp_path}/a.jsonl/w4a8", f"{tmp_path}/b.jsonl/w4a8")
    (arm,) = tables["arms"].values()
    assert (arm["broken"], arm["repaired"]) == flips(compare_runs([f"{old}/w4a8", f"{new}/w4a8"]))
    page = tmp_path / "r.html"
    document(capsys, "report", f"{old}/w4a8", f"{new}/w4a8", "-o", str(page), "--label", "friday/run/w4a8=this week")
    assert "this week" in page.read_text() and "no verdicts" not in page.read_text()


def test_a_single_arm_beside_a_file_of_another_tool_and_alone_in_a_table(weeks, capsys, tmp_path):
    old, new = weeks
    other = tmp_path / "EVAL.txt"
    lines = ["Task suite: libero_object"]
    for task in range(3):
        lines += [f"Task: put object {task} away"]
        lines += [line for i in range(10) for line in (f"Starting episode {i + 1}...", "Success: True")]
    other.write_text("\n".join(lines))
    found = document(capsys, "compare", f"{new}/w4a8", str(other), f"{old}/w4a8")
    assert found["reference"] == "friday/run/w4a8"
    assert list(found["arms"])[1:] == ["monday/run/w4a8"] and len(found["arms"]) == 2  # no other arm of either run
    external, before = found["arms"].values()
    won = list(outcomes(new, "w4a8").values())
    assert external["repaired"] == won.count("failure") and external["broken"] == 0
    assert (before["repaired"], before["broken"]) == flips(compare_runs([f"{old}/w4a8", f"{new}/w4a8"]))
    assert cli.main(["compare", f"{new}/w9", str(other)]) == 2
    assert "has the arms baseline, w4a4, w4a8" in capsys.readouterr().out
    assert cli.main(["compare", f"{new}/w4a8", f"{other}.gone", str(other)]) == 2
    assert "EVAL.txt.gone: no such file" in capsys.readouterr().out
    table = tmp_path / "one.jsonl"
    assert document(capsys, "export", f"{new}/w4a8", f"{new}/w4a4", "-o", str(table))["rows"] == 2 * len(won)
    again = document(capsys, "compare", f"{table}/w4a8", f"{table}/w4a4")
    straight = document(capsys, "compare", f"{new}/w4a8", f"{new}/w4a4")
    assert flips(again) == flips(straight) and "baseline" not in table.read_text().partition("\n")[2]


def flips(found: dict) -> tuple[int, int]:
    (arm,) = found["arms"].values()
    return arm["broken"], arm["repaired"]


def test_a_dashboard_shows_the_arms_that_are_named(weeks, capsys):
    old, new = weeks
    spec = json.dumps(document(capsys, "dashboard", f"{old}/w4a8", "--offline"))
    assert "study/w4a8" in spec and "study/baseline" not in spec
    assert "study/w4a8" not in json.dumps(document(capsys, "dashboard", str(old), "--offline"))
