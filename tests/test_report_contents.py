"""Risk: a report that is too big, says other numbers than the comparison, or fails on a run that lacks
something.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_run import film, make_run

from qlibero.errors import UserError, WorkFailed
from qlibero.reporting.html import write_report
from qlibero.reporting.markup import Markup, el, join, script_json
from qlibero.reporting.tables import LATEX, Row, latex, markdown
from qlibero.reporting.terminal import console, print_comparison, print_run
from qlibero.results.compare import compare_runs
from qlibero.results.phrases import points, speed_text


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr("qlibero.results.ledger.os.fsync", lambda descriptor: None)


def test_says_what_the_comparison_says(tmp_path):
    run = make_run(tmp_path / "run")
    answer = write_report([run])
    assert answer["report"] == str(run / "report.html")
    page = (run / "report.html").read_text().replace("\u00a0", " ")
    for name, result in compare_runs([run])["arms"].items():
        assert result["sentence"] in page and result["detectable"]["line"] in page
        assert answer["verdicts"][name] == result["verdict"]
    assert "lost to errors" in page and "fall back to fake" in page


def test_two_thousand_pairs_stay_far_below_two_megabytes(tmp_path):
    run = make_run(
        tmp_path / "run", arms={"baseline": 0.0, "fake": 0.1}, tasks=40, inits=50, trajectories=False
    )
    assert write_report([run])["bytes"] < 400_000


def test_videos_are_counted_and_bounded(tmp_path):
    run = make_run(tmp_path / "run")
    made = film(run, limit=4)
    everything = write_report([run])
    assert made == 4 and everything["video_bytes"] > 0
    budget = 0.75 * everything["video_bytes"] * 4 / 3 / 1e6
    fewer = write_report([run], video_megabytes=budget)
    assert 0 < fewer["video_bytes"] < everything["video_bytes"]
    assert "left out to keep this file small" in (run / "report.html").read_text()
    assert write_report([run], video_megabytes=0)["video_bytes"] == 0


@pytest.mark.parametrize(
    "arms, absent",
    [
        ({"baseline": 0.0}, "Paired differences"),
        ({"w4a8": 0.1, "w4a4": 0.2}, "Paired differences"),
        ({"baseline": 0.0, "fake": 0.1}, "Kernel verdicts"),
    ],
)
def test_works_with_what_there_is(tmp_path, arms, absent):
    run = make_run(tmp_path / "run", arms=arms, meta=False, trajectories=False)
    (run / "environment.json").unlink()
    (run / "experiment.yaml").unlink()
    write_report([run])
    page = (run / "report.html").read_text()
    assert absent not in page and "Success by task and arm" in page
    print_run(run)


def test_several_runs_in_one_report(tmp_path):
    runs = [make_run(tmp_path / suite, suite=suite, name=suite) for suite in ("libero_object", "libero_goal")]
    answer = write_report(runs, tmp_path / "both.html")
    assert answer["arms"] == ["baseline", "aa", "w4a8", "w4a4"]
    page = (tmp_path / "both.html").read_text()
    assert "libero_goal 2" in page and "libero_object + libero_goal" in page


def test_a_sweeps_directory_stands_for_its_cells(tmp_path):
    """As docs/clusters.md has it, and as a shell's `*/` spells it, with what the sweep keeps for itself in between."""
    for suite in ("libero_object", "libero_spatial"):
        make_run(tmp_path / suite, suite=suite, name=suite)
    (tmp_path / "sweep/experiments").mkdir(parents=True)
    (tmp_path / "sweep/submission-001").mkdir()
    for given in ([tmp_path], sorted(path for path in tmp_path.iterdir() if path.is_dir())):
        assert write_report(given, tmp_path / "all.html")["arms"] == ["baseline", "aa", "w4a8", "w4a4"]
    assert "libero_object + libero_spatial" in (tmp_path / "all.html").read_text()
    with pytest.raises(UserError, match="no run here"):
        write_report([tmp_path / "sweep"])


def test_bad_requests(tmp_path):
    with pytest.raises(UserError, match="at least one"):
        write_report([])
    with pytest.raises(UserError, match="no such run"):
        write_report([tmp_path / "nowhere"])
    run = make_run(tmp_path / "run", arms={"baseline": 0.0})
    with pytest.raises(UserError, match="--reference nosuch: no such arm; here are baseline"):
        write_report([run], reference="nosuch")
    with pytest.raises(UserError, match="write 0.02 for 2 pp"):
        write_report([run], margin=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkFailed, match="another -o"):
        write_report([run], tmp_path / "file" / "report.html")


def test_markup_escapes_everything_that_is_not_markup():
    assert (
        el("p", "<b>", Markup("<i>x</i>"), title='"><') == '<p title="&quot;&gt;&lt;">&lt;b&gt;<i>x</i></p>'
    )
    assert el("path", d="M0 0") == '<path d="M0 0"/>' and el("br") == "<br>"
    assert join(["a", None, False, 0, [1.5]]) == "a01.5"
    assert "</script>" not in script_json({"a": "</script><!--"}, "x")[8:-9]


def test_tables_to_copy_hold_the_counts_and_survive_odd_names(tmp_path):
    run = make_run(tmp_path / "run")
    result = compare_runs([run])
    rows = [Row("a|b_c & 100 %", result["arms"]["w4a8"]["summary"], result["arms"]["w4a8"], 25_500_000)]
    text = markdown(rows)
    assert len({line.count("|") - line.count("\\|") for line in text.split("\n")}) == 1
    arm = result["arms"]["w4a8"]
    assert f"{arm['broken']} / {arm['repaired']} of {arm['pairs']}" in text
    body = latex(rows, "50 % of_x")
    assert r"a|b\_c \& 100 \%" in body and r"\caption{50 \% of\_x}" in body
    assert not re.search(r"(?<!\\)[%#_]", body)
    assert set("&%$#_{}~^\\") <= set(LATEX)


def test_terminal_shows_the_same_and_survives_a_log_file(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    print_run(run)
    text = capsys.readouterr().err
    result = compare_runs([run])
    for arm in result["arms"].values():
        assert arm["sentence"] in " ".join(text.split())
    assert "/30 [" in text
    assert "6.05  24.00   0.25             0.28  fake carries unpacked integers" in text  # MB, ratios, and why not less
    assert "p95" in text and "simulator" in text and "ledger" in text and "\x1b" not in text
    print_comparison(result)
    assert "Holm" in capsys.readouterr().err
    assert console().width == 160


@pytest.mark.parametrize(
    "speedup, text", [(None, ""), (1.0, "as fast"), (1.31, "1.31× faster"), (0.5, "2.00× slower")]
)
def test_speed_in_words(speedup, text):
    assert speed_text(speedup) == text


def test_points_always_carry_a_real_sign():
    assert [points(x) for x in (0.004, -0.004, 0.0, -0.0001)] == ["+0.4", "−0.4", "+0.0", "−0.0"]


def test_the_example_analysis_runs(tmp_path):
    run = make_run(tmp_path / "run")
    script = Path(__file__).parents[1] / "examples" / "analysis.py"
    done = subprocess.run([sys.executable, script, run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "w4a8 against baseline" in done.stdout and "flipped: largest distance" in done.stdout
    assert compare_runs([run])["arms"]["w4a4"]["sentence"] in done.stdout
