"""Risk: a report that is too big, says other numbers than the comparison, or fails on a run that lacks something."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from synthetic_run import episode, film, make_run

from qlibero.cli import main
from qlibero.config.load import load_experiment
from qlibero.errors import UserError, WorkFailed
from qlibero.places import REPOSITORY
from qlibero.reporting.html import charts
from qlibero.reporting.html.document import write_report
from qlibero.reporting.html.markup import Markup, el, join, script_json
from qlibero.reporting.html.sections.flips import _heat, line_of
from qlibero.reporting.html.sections.standing import standing
from qlibero.reporting.tables import Row, latex, markdown
from qlibero.reporting.terminal import console, print_comparison, print_run
from qlibero.results.arm_equality import same_arithmetic
from qlibero.results.cells import cells_of
from qlibero.results.compare import compare, compare_paths, compare_runs
from qlibero.results.declaration import declare, make_declaration
from qlibero.results.ledger import Ledger
from qlibero.results.runs import read_run
from qlibero.results.speed import Speed
from qlibero.results.wording import interval_text, points, speed_text
from qlibero.run.experiment import _instructions

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr("qlibero.results.ledger.os.fsync", lambda descriptor: None)


def text_of(report) -> str:
    return Path(report).read_text().replace("\u00a0", " ")


def test_says_what_the_comparison_says(tmp_path):
    run = make_run(tmp_path / "run")
    answer = write_report([run])
    assert answer["report"] == str(run / "report.html")
    page = (run / "report.html").read_text().replace("\u00a0", " ")
    for name, result in compare_runs([run])["arms"].items():
        assert answer["verdicts"][name] == result["verdict"]
        assert result["control"] or result["sentence"] in page
        open_question = result["verdict"].startswith("inconclusive")
        assert result["control"] or (result["detectable"]["line"] in page) == open_question
    assert "lost to errors" in page and "fall back to fake" in page


@pytest.mark.parametrize(("few", "said"), [(8, "tasks have 8 to 24 pairs and weigh accordingly"), (20, "")])
def test_tasks_of_unequal_weight_are_said_in_terminal_json_and_report(tmp_path, few, said):
    run = make_run(tmp_path / "run", {"baseline": 0.0, "fake": 0.1}, tasks=1, inits=24, trajectories=False)
    for arm in ("baseline", "fake"):
        with Ledger(run, arm, 1, f"hash of {arm}") as ledger:
            for init in range(few):
                ledger.append(episode("libero_object", 1, init, arm, False, False, 0)[0])
    with (tmp_path / "terminal.txt").open("w") as file:
        print_comparison(compare_paths([run]), Console(file=file, width=400))
    write_report([run])
    views = {
        "terminal": (tmp_path / "terminal.txt").read_text(),
        "JSON": json.dumps(compare_runs([run])),
        "report": text_of(run / "report.html"),
    }
    assert {name for name, text in views.items() if "weigh accordingly" in text} == (set(views) if said else set())
    assert all(said in text for text in views.values())


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ([("official", 7, i) for i in range(50)], 50),
        ([("official", s, i) for s in (7, 8, 9) for i in range(50)], 50),
        ([("official", s, i) for s in (7, 8) for i in range(200)], 100),
        ([("official", 7, i) for i in range(50)] + [("fresh-20", 7, i) for i in range(20)], 70),
        ([("fresh-5000", 7, i) for i in range(5000)], 100),
    ],
    ids=["one seed", "seeds", "long seeds", "official and fresh", "five thousand"],
)
def test_a_map_of_many_episodes_is_folded_instead_of_drawn_as_a_bar_code(columns, line):
    assert line_of(columns) == line
    rows = ["s" * len(columns), "b" + "s" * (len(columns) - 1)]
    width, height = re.search(r'viewBox="0 0 (\d+) (\d+)"', str(_heat(rows, line, "", "arm"))).groups()
    assert (int(width), int(height)) == (10 * line, 20 * -(-len(columns) // line))


@pytest.mark.parametrize(
    ("interval", "text"),
    [((-0.0123, 0.0151), "[−1.2, +1.5]"), ((-0.0198, 0.0151), "[−1.98, +1.51]"), ((-0.025, -0.0004), "[−2.50, −0.04]")],
    ids=["apart", "at the margin", "at zero"],
)
def test_digits_never_hide_on_which_side_an_interval_ends(interval, text):
    assert interval_text(interval, 0.02) == text


def test_two_thousand_pairs_stay_far_below_two_megabytes(tmp_path):
    run = make_run(tmp_path / "run", arms={"baseline": 0.0, "fake": 0.1}, tasks=40, inits=50, trajectories=False)
    assert write_report([run])["bytes"] < 400_000


def test_videos_are_counted_and_bounded(tmp_path):
    run = make_run(tmp_path / "run")
    made = film(run, limit=4)
    everything = write_report([run])
    assert made == 4 and everything["video_bytes"] > 0
    none = write_report([run], megabytes=0)
    assert none["video_bytes"] == 0 and none["videos_left_out"] == 4
    allowed = none["bytes"] + 0.75 * (everything["bytes"] - none["bytes"])
    fewer = write_report([run], megabytes=allowed / 1e6)
    assert 0 < fewer["video_bytes"] < everything["video_bytes"]
    assert (run / "report.html").stat().st_size == fewer["bytes"] <= allowed
    assert "left out to keep this file small" in (run / "report.html").read_text()


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
    assert answer["arms"] == ["baseline", "w4a8", "w4a4", "aa"]
    page = (tmp_path / "both.html").read_text()
    assert "libero_goal 2" in page and "libero_object + libero_goal" in page


def test_a_sweeps_directory_stands_for_its_cells(tmp_path):
    """As docs/clusters.md has it, and as a shell's `*/` spells it, with what the sweep keeps for itself in between."""
    for suite in ("libero_object", "libero_spatial"):
        make_run(tmp_path / suite, suite=suite, name=suite)
    (tmp_path / "sweep/experiments").mkdir(parents=True)
    (tmp_path / "sweep/submission-001").mkdir()
    for given in ([tmp_path], sorted(path for path in tmp_path.iterdir() if path.is_dir())):
        assert set(write_report(given, tmp_path / "all.html")["arms"]) == {"baseline", "aa", "w4a8", "w4a4"}
    assert "libero_object + libero_spatial" in (tmp_path / "all.html").read_text()
    with pytest.raises(UserError, match="no run here"):
        write_report([tmp_path / "sweep"])


def cells(directory):
    """Two cells of a sweep over methods, as `qlibero sweep` leaves them, beside its own directory."""
    for method in ("duquant", "rtn"):
        make_run(
            directory / f"method-{method}",
            arms={"baseline": 0.0, "aa": 0.0, "fake": 0.1},
            name=f"overnight.method-{method}",
            settings={"quant": {"method": method}, "workers": len(method)},
        )
    (directory / "sweep" / "experiments").mkdir(parents=True)
    (directory / "sweep" / "submission-001").mkdir()
    return sorted(path for path in directory.iterdir() if path.is_dir())


def test_a_sweeps_cells_are_compared_each_with_its_own_reference(tmp_path):
    paths = cells(tmp_path)
    answer = write_report(paths, tmp_path / "sweep.html")
    assert answer["arms"] == [f"{m}/{arm}" for m in ("duquant", "rtn") for arm in ("baseline", "fake", "aa")]
    assert list(answer["verdicts"]) == [f"{m}/{arm}" for m in ("duquant", "rtn") for arm in ("fake", "aa")]
    page = text_of(tmp_path / "sweep.html")
    assert not re.search(r"\d+ unpaired: ", page)
    assert "baseline · rtn against" not in page and "fake · rtn against baseline · rtn" in page
    assert "Of 2 tested arms" in page and "<h1>overnight</h1>" in page


def test_compare_gives_each_cell_its_own_reference_too(tmp_path, capfd):
    cells(tmp_path)
    assert main(["compare", str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out.splitlines()[-1])["cells"]
    assert list(found) == ["duquant", "rtn"] and all(list(cell["arms"]) == ["aa", "fake"] for cell in found.values())
    assert "\nrtn\n" in err and "baseline · rtn against baseline" not in err


def test_the_command_of_the_clusters_guide_works(tmp_path, capfd):
    paths = cells(tmp_path)
    assert main(["report", *map(str, paths), "-o", str(tmp_path / "x.html"), "--max-mb", "3"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out.splitlines()[-1])["videos"] == 0 and "report: " in err


def test_a_run_keeps_what_its_policy_is_told():
    experiment = load_experiment(REPOSITORY / "configs" / "experiments" / "compare_backends.yaml", ["tasks=[3]"])
    told = _instructions(experiment)
    assert list(told) == [experiment.suite] and list(told[experiment.suite]) == ["3"]
    assert told[experiment.suite]["3"].startswith("pick up the")


def test_other_episodes_of_the_same_arms_are_no_other_cell(tmp_path):
    runs = [
        make_run(tmp_path / suite, suite=suite, settings={"suite": suite}) for suite in ("libero_object", "libero_goal")
    ]
    assert [cell.label for cell in cells_of(map(read_run, runs), "baseline")] == [""]


def test_arms_in_a_directory_of_their_own_are_paired_with_the_reference_beside(tmp_path):
    apart = [make_run(tmp_path / name, arms={name: 0.1}, name=name) for name in ("baseline", "w4a8")]
    assert write_report(apart)["verdicts"].keys() == {"w4a8"}


def test_cells_that_no_setting_tells_apart_have_the_names_of_their_directories(tmp_path):
    runs = [make_run(tmp_path / name / "run", name="same") for name in "ab"]
    labels = [cell.label for cell in cells_of(map(read_run, runs), "baseline")]
    assert labels == ["run 1", "run 2"]


def test_only_directories_that_are_no_run_are_refused(tmp_path):
    (tmp_path / "sweep").mkdir()
    with pytest.raises(UserError, match="no episodes here"):
        write_report([tmp_path / "sweep"])


def test_a_pass_that_does_not_survive_all_tests_is_not_a_headline(tmp_path):
    arms = {"baseline": 0.0, "one": 0.0, "two": 0.0}
    run = make_run(tmp_path / "run", arms=arms, tasks=10, inits=20, trajectories=False)
    result = compare([read_run(run)]).arms["one"]
    assert result.verdict.word == "non-inferior" and not result.suites["libero_object"].adjusted.passed
    assert standing(result).tone == "open"
    page = text_of(write_report([run])["report"])
    assert "Non-inferior after Holm's adjustment for all 2 claims: none." in page
    assert "non-inferior, but not after Holm" in page and "no, p = 0.0" in page


@pytest.mark.parametrize("primary", ["pooled", "per-suite"])
def test_a_pass_over_all_suites_is_the_claim_unless_each_suite_is_one(tmp_path, primary):
    arms, said = {"baseline": 0.0, "one": 0.0}, {"primary": primary}
    runs = [
        make_run(tmp_path / s, arms=arms, suite=s, tasks=5, inits=20, trajectories=False, settings=said)
        for s in ("libero_object", "libero_goal")
    ]
    page = text_of(write_report(runs, tmp_path / "x.html")["report"])
    assert "one is non-inferior to baseline at −2 pp" in page
    per_suite = "but after Holm over 2 arms × suites in 0 of 2 suites" in page
    assert per_suite == ("non-inferior, but not after Holm" in page) == (primary == "per-suite")


def test_the_control_is_shown_as_the_noise_floor_and_as_nothing_else(tmp_path):
    run = make_run(tmp_path / "run", arms={"baseline": 0.0, "aa": 0.05, "w4a8": 0.05}, tasks=5)
    page = text_of(write_report([run])["report"])
    assert "aa against baseline" not in page and "Of 2 tested" not in page
    tables = page[page.index('id="as-markdown"') : page.index('id="as-latex"')]
    line = next(row for row in tables.split("\n") if row.startswith("| aa"))
    assert "noise floor (A/A)" in line and "(A/A) |  |  |" in line
    chart = page[page.index('id="pareto"') : page.index('id="memory"')]
    assert "noise floor" in chart and '<span class="tag right" style' in chart and ">aa<" not in chart


def test_the_memory_of_fake_is_not_taken_for_a_kernels(tmp_path):
    run = make_run(tmp_path / "run", arms={"baseline": 0.0, "w4a8": 0.0})
    page = text_of(write_report([run])["report"])
    assert "| unpacked (fake) |" in page and "1 of 6 layers on fake: not a kernel" in page
    assert "holds them unpacked" in page
    meta = json.loads((run / "w4a8" / "meta.json").read_text())
    for verdict in meta["kernels"].values():
        verdict["kernel"] = "cpu_int4"
    (run / "w4a8" / "meta.json").write_text(json.dumps(meta))
    page = text_of(write_report([run])["report"])
    assert "| 6.8 |" in page and "6.8 MB, 0.28× of 24.0 MB" in page and "unpacked (fake)" not in page


def test_says_what_was_planned_what_was_told_and_on_what_it_ran(tmp_path):
    run = make_run(tmp_path / "run")
    page = text_of(write_report([run])["report"])
    assert "119 of 120 planned episodes" in page and "put object 2 away" in page
    assert re.search(r"git commit</th><td>abc with uncommitted changes", page) and "torch</th><td>2.13.0" in page
    (run / "environment.json").write_text("{}")
    page = text_of(write_report([run])["report"])
    assert "torch</th><td>not recorded by this run" in page


def test_a_slow_call_in_a_thousand_does_not_squeeze_the_others():
    scale = charts.duration_scale([np.array([50.0] * 500 + [120.0] * 495 + [2900.0] * 5)], 99)
    assert scale(120) - scale(50) > 60 and scale.high < 200
    wide = charts.duration_scale([np.array([0.07] * 50 + [60.0] * 50)], 99)
    assert wide.ticks() == pytest.approx([0.1, 0.3, 1, 3, 10, 30]) and 0 <= wide(0.07) < 5 and wide(1e9) == 100
    assert charts.LogScale(15, 36).ticks(5) == [15, 20, 25, 30, 35]


def test_parts_that_are_said_of_tasks_like_these(tmp_path):
    page = text_of(write_report([make_run(tmp_path / "run")])["report"])
    assert "Wider" not in page and "ten tasks are ten values" in page


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
    assert el("p", "<b>", Markup("<i>x</i>"), title='"><') == '<p title="&quot;&gt;&lt;">&lt;b&gt;<i>x</i></p>'
    assert el("path", d="M0 0") == '<path d="M0 0"/>' and el("br") == "<br>"
    assert join(["a", None, False, 0, [1.5]]) == "a01.5"
    assert "</script>" not in script_json({"a": "</script><!--"}, "x")[8:-9]


def test_tables_to_copy_hold_the_counts_and_survive_odd_names(tmp_path):
    run = make_run(tmp_path / "run")
    result, found = compare_runs([run]), compare([read_run(run)]).arms["w4a8"]
    rows = [Row("a|b_c & 100 %", found.summary, found, "25.5")]
    text = markdown(rows)
    assert len({line.count("|") - line.count("\\|") for line in text.split("\n")}) == 1
    arm = result["arms"]["w4a8"]
    assert f"{arm['broken']} / {arm['repaired']} of {arm['pairs']}" in text
    body = latex(rows, "50 % of_x")
    assert r"a\textbar{}b\_c \& 100 \%" in body and r"\caption{50 \% of\_x}" in body
    assert not re.search(r"(?<!\\)[%#_]", body)


def test_terminal_shows_the_same_and_survives_a_log_file(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    print_run(run)
    text = capsys.readouterr().err
    result = compare_runs([run])
    for arm in result["arms"].values():
        assert arm["sentence"] in " ".join(text.split())
    assert "/30 [" in text
    assert "6.05  24.00   0.25             0.28  fake carries unpacked integers" in text  # MB, ratios, and why
    assert "p95" in text and "simulator" in text and "ledger" in text and "\x1b" not in text
    print_comparison(compare_paths([run]))
    assert "Holm" in capsys.readouterr().err
    assert console().width == 160


@pytest.mark.parametrize(
    "ratio, interval, text",
    [
        (None, None, ""),
        (1.0, (0.99, 1.01), "as fast [0.99, 1.01]"),
        (1.01, (0.97, 1.05), "speed unclear [0.97, 1.05]"),
        (1.31, (1.25, 1.38), "1.31× faster [1.25, 1.38]"),
        (0.5, (0.4, 0.625), "2.00× slower [1.60, 2.50]"),
        (1.31, None, "speed unclear (3 scenes)"),
    ],
)
def test_speed_in_words(ratio, interval, text):
    assert speed_text(Speed(ratio, interval, 3, simulation=False)) == text
    assert speed_text(Speed(ratio, interval, 3, simulation=True)) == "simulation: no speed claim"


def test_points_always_carry_a_real_sign():
    assert [points(x) for x in (0.004, -0.004, 0.0, -0.0001)] == ["+0.4", "−0.4", "+0.0", "−0.0"]


def test_the_example_analysis_runs(tmp_path):
    run = make_run(tmp_path / "run")
    script = Path(__file__).parents[1] / "examples" / "analysis.py"
    done = subprocess.run([sys.executable, script, run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "w4a8 against baseline" in done.stdout and "flipped: largest distance" in done.stdout
    assert compare_runs([run])["arms"]["w4a4"]["sentence"] in done.stdout


def test_arms_of_one_artifact_that_act_differently_are_shown(tmp_path):
    """Contract 3: the same integers must give the same actions, whichever kernel multiplied them."""
    run = make_run(tmp_path / "run", arms={"baseline": 0.0, "w4a8": 0.0, "w4a4": 0.1}, inits=5)
    for arm in ("w4a8", "w4a4"):
        meta = json.loads((run / arm / "meta.json").read_text())
        (run / arm / "meta.json").write_text(json.dumps({**meta, "artifact": {"sha256": "1" * 64}}))
    (same,) = same_arithmetic(read_run(run))
    assert (same.arm, same.other) == ("w4a8", "w4a4") and same.equal < same.episodes
    assert "NOT THE SAME ARITHMETIC" in str(same)
    found = read_run(run)
    same = same_arithmetic(replace(found, arms={**found.arms, "twin": found.arms["w4a8"]}))[-1]
    assert same.other == "twin" and same.equal == same.episodes > 0 and "the same actions" in str(same)


@pytest.mark.parametrize("inits", [5, 60])
def test_a_run_under_a_stopping_rule_has_a_report(tmp_path, inits):
    """Undecided and decided: the rule leaves Holm nothing to adjust, and every reader must live with that."""
    run = make_run(tmp_path / "run", arms={"baseline": 0.0, "fake": 0.0}, inits=inits, tasks=5, trajectories=False)
    keys = [record.key for record in read_run(run).arms["baseline"].records]
    declare(run, make_declaration(keys, margin=0.02, alpha=0.025, arms=["fake"], seed=7))
    verdict = write_report([run])["verdicts"]["fake"]
    assert verdict == ("non-inferior" if inits == 60 else "inconclusive")
    assert "Sequential test: " in text_of(run / "report.html")
