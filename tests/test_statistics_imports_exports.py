"""Risk: results of other tools read as more than they are, or episodes exported with a hole. Files in the
formats those tools write, checked field by field against their sources."""

from __future__ import annotations

import csv
import json
import sys

import pytest
from pyarrow import parquet
from statsmodels.stats.proportion import confint_proportions_2indep
from synthetic_run import make_run

from qlibero.cli import main
from qlibero.errors import UserError
from qlibero.reporting.terminal import print_comparison
from qlibero.results.compare import compare_paths, compare_runs
from qlibero.results.export import export_episodes
from qlibero.results.external_results import compare_external
from qlibero.results.importers import read_external
from qlibero.results.paired_outcomes import plain_word
from qlibero.stats import proportions as st
from qlibero.stats.sampling import Sample


def read_one(path):
    (arm,) = read_external(path)
    return arm


def fork(path, failures=(), episodes=20, suite="libero_object", as_csv=False):
    rows = [
        {
            "task_id": t,
            "task_name": f"task {t}",
            "episode_idx": i,
            "success": (t, i) not in failures,
            "steps": 120,
            "max_steps": 290,
        }
        for t in range(10)
        for i in range(episodes)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    if as_csv:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        wins = sum(r["success"] for r in rows)
        path.write_text(
            json.dumps(
                {
                    "task_suite": suite,
                    "total_episodes": len(rows),
                    "total_successes": wins,
                    "success_rate": wins / len(rows),
                    "seed": 7,
                    "headless": True,
                    "results": rows,
                }
            )
        )
    return path


def lerobot(path, successes=95):
    metrics = [
        {
            "sum_rewards": [0.0] * 10,
            "max_rewards": [0.0] * 10,
            "successes": [10 * t + i < successes for i in range(10)],
            "video_paths": [],
        }
        for t in range(10)
    ]
    path.write_text(
        json.dumps(
            {
                "per_task": [
                    {"task_group": "libero_object", "task_id": t, "metrics": m} for t, m in enumerate(metrics)
                ],
                "per_group": {},
                "overall": {"pc_success": float(successes), "n_episodes": 100},
            }
        )
    )
    return path


def vla_eval(path, new=False):
    def episode(i):
        if new:
            return {
                "episode_id": i,
                "metrics": {"success": i != 3},
                "steps": 140,
                "failure_reason": "timeout" if i == 5 else None,
            }
        return {
            "success": i != 3,
            "steps": 140,
            "elapsed_sec": 17.9,
            "task": "pick up the soup",
            "episode_id": f"pick up the soup_ep{i}",
        }

    data = {
        "benchmark": "LIBEROBenchmark_libero_object",
        "mode": "sync",
        "harness_version": "0.4.0",
        "tasks": [{"task": "pick up the soup", "episodes": [episode(i) for i in range(50)]}],
    }
    path.write_text(json.dumps(data))
    return path


def test_openpi_fork_json_and_csv_are_the_same_arm_and_pair(tmp_path):
    base = fork(tmp_path / "bf16" / "libero_object_results.json")
    flipped = {(0, i) for i in range(9)}
    for as_csv in (False, True):
        name = f"libero_object_results.{'csv' if as_csv else 'json'}"
        arm = fork(tmp_path / f"w4a8-{as_csv}" / name, flipped, as_csv=as_csv)
        result = compare_runs([base, arm])["arms"][f"w4a8-{as_csv}/libero_object_results"]
        assert (result["paired"], result["pairs"], result["broken"], result["repaired"]) == (True, 200, 9, 0)
        assert result["tango95"] == pytest.approx(st.tango(9, 0, 200), abs=1e-6)
        assert result["mcnemar_p"] == pytest.approx(st.mcnemar_exact(9, 0), abs=1e-6)
        assert "With 200 pairs and 4.5 % flips" in result["detectable"]["line"]
        assert "taken on trust" in result["caveat"] and "taken on trust" in result["sentence"]


def test_lerobot_is_unpaired_and_says_so(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    result = compare_external(
        [lerobot(tmp_path / "a" / "eval_info.json", 97), lerobot(tmp_path / "b" / "eval_info.json", 90)]
    ).to_json()
    arm = result["arms"]["b/eval_info"]
    assert arm["paired"] is False and arm["counts"] == [90, 100] and arm["reference_counts"] == [97, 100]
    assert "unpaired: LeRobot's initial states" in arm["sentence"]
    assert arm["verdict"] == "inconclusive"


def test_lerobot_before_multi_task(tmp_path):
    path = tmp_path / "eval_info.json"
    path.write_text(
        json.dumps(
            {
                "per_episode": [
                    {"episode_ix": i, "sum_reward": 0, "max_reward": 0, "success": i > 1, "seed": 1000 + i}
                    for i in range(10)
                ],
                "aggregated": {},
            }
        )
    )
    assert read_one(path).counts == (8, 10, 0) and read_one(path).keyed() is None


def test_vla_eval_old_and_new_schema_and_its_errors(tmp_path):
    old, new = (
        read_one(vla_eval(tmp_path / "old.json")),
        read_one(vla_eval(tmp_path / "new.json", new=True)),
    )
    assert old.counts == (49, 50, 0) and new.counts == (48, 49, 1)
    assert old.keyed().keys() == new.keyed().keys() and ("libero_object", "pick up the soup", 3) in old.keyed()
    result = compare_external([tmp_path / "old.json", tmp_path / "new.json"]).to_json()
    (arm,) = result["arms"].values()
    assert arm["pairs"] == 49 and arm["broken"] == arm["repaired"] == 0
    assert arm["errors"]["removed_pairs"] == arm["errors"]["arm"] == 1 and "1 error in" in arm["sentence"]


def test_an_episode_that_does_not_say_how_it_ended_is_no_failure(tmp_path):
    path = vla_eval(tmp_path / "new.json", new=True)
    data = json.loads(path.read_text())
    del data["tasks"][0]["episodes"][7]["metrics"]
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"new.json: .*episode 7 of task 'pick up the soup' says neither success"):
        read_one(path)
    path.write_text(json.dumps({"per_episode": [{"episode_ix": 0, "success": None}]}))
    with pytest.raises(UserError, match="success is None"):
        read_one(path)


def test_errors_of_a_file_can_only_cost_certainty(tmp_path):
    """50 of 100 episodes of the second result ended in an error: what is left would look non-inferior at −10 pp."""
    for name, failed in (("a", ()), ("b", range(50))):
        episodes = [
            {"episode_id": i, "metrics": {"success": True}, "failure_reason": "timeout" if i in failed else None}
            for i in range(100)
        ]
        data = {"benchmark": "libero_goal", "tasks": [{"task": "0", "episodes": episodes}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    (arm,) = compare_external([tmp_path / "a.json", tmp_path / "b.json"], margin=0.1).to_json()["arms"].values()
    assert plain_word(Sample(50, 0, 0), 0.1) == "non-inferior" and arm["errors"]["worst_case_verdict"] == "inferior"
    assert arm["verdict"] == "inconclusive (errors)" and "50 errors in" in arm["sentence"]


def test_two_arms_of_ours_among_files_are_paired_by_scene_as_always(tmp_path):
    ours = []
    for name, scene in (("one", "aaaa"), ("two", "bbbb")):
        make_run(tmp_path / name, arms={"baseline": 0.0}, trajectories=False, name=name)
        for path in (tmp_path / name / "baseline").glob("episodes-*.jsonl"):
            rows = [{**json.loads(line), "fingerprint": scene} for line in path.read_text().splitlines()]
            unsealed = [json.dumps({k: v for k, v in row.items() if k != "checksum"}) for row in rows]
            path.write_text("\n".join(unsealed) + "\n")
        ours.append(tmp_path / name)
    other = fork(tmp_path / "fork" / "libero_object_results.json", episodes=10)
    result = compare_runs([*ours, other], reference="one/baseline")["arms"]
    arm = result["two/baseline"]
    assert arm["pairs"] == 0 and len(arm["unpaired"]) == 30 and "different scenes" in arm["unpaired"][0]["reason"]
    assert "no finished episodes" in arm["sentence"]
    assert result["fork/libero_object_results"]["pairs"] == 30  # a file has no scenes to differ in


def test_seeds_belong_to_the_key_where_both_files_say_them(tmp_path):
    one, two = (fork(tmp_path / name / "libero_object_results.json") for name in "ab")
    two.write_text(json.dumps({**json.loads(two.read_text()), "seed": 8}))
    (arm,) = compare_external([one, two]).to_json()["arms"].values()
    assert arm["paired"] is False and "share no episode key" in arm["caveat"]
    assert "smallest drop found with 80 % power" in arm["detectable"]["line"]
    rows = fork(tmp_path / "c" / "libero_object_results.csv", as_csv=True)
    (arm,) = compare_external([one, rows]).to_json()["arms"].values()
    assert arm["paired"] is True and "and so are the seeds" in arm["caveat"]  # the .csv does not say


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--margin", "2"], "write 0.02 for 2 pp"),
        (["--margin", "-0.5"], "write 0.02 for 2 pp"),
        (["--reference", "nosuch"], "no such result; here are a/libero_object_results, b/libero_object_results"),
        (["--reference", "libero_object_results"], "several are called so"),
    ],
)
def test_a_wrong_request_about_files_is_status_2(tmp_path, capfd, arguments, says):
    files = [fork(tmp_path / name / "libero_object_results.json") for name in "ab"]
    assert main(["compare", *map(str, files), *arguments]) == 2
    out, err = capfd.readouterr()
    assert says in err and json.loads(out.splitlines()[-1])["error"]["exit_status"] == 2


def test_a_run_of_ours_beside_a_file_of_the_fork(tmp_path, capsys):
    run = make_run(tmp_path / "run", arms={"baseline": 0.0, "w4a8": 0.1}, trajectories=False)
    other = fork(tmp_path / "fork" / "libero_object_results.json", episodes=10)
    result = compare_runs([run, other], reference="baseline")
    assert result["reference"] == "synthetic/baseline"
    assert result["arms"]["fork/libero_object_results"]["pairs"] == 30
    assert "left out, being in one file only: 70 episodes" in result["arms"]["fork/libero_object_results"]["caveat"]
    print_comparison(compare_paths([run, other], reference="baseline"))
    assert "openpi fork" in capsys.readouterr().err


@pytest.mark.parametrize("k1, n1, k2, n2", [(56, 70, 48, 80), (9, 10, 3, 10), (100, 100, 95, 100), (0, 20, 0, 20)])
def test_independent_interval_against_statsmodels(k1, n1, k2, n2):
    oracle = confint_proportions_2indep(k1, n1, k2, n2, method="newcomb", compare="diff")
    assert st.newcombe_independent(k1, n1, k2, n2) == pytest.approx(oracle, abs=1e-12)


def test_independent_interval_published_example():
    """Newcombe 1998 (II), 56/70 against 48/80: 0.0524 to 0.3339."""
    assert [round(x, 4) for x in st.newcombe_independent(56, 70, 48, 80)] == [0.0524, 0.3339]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "not a result file"),
        ("[1]", "not a result file"),
        ("{", "cannot be read"),
        ('{"task_suite": "x"}', "lacks 'results'"),
        (
            '{"task_suite": "x", "results": [{"task_id": 0, "episode_idx": 0, "success": "maybe"}]}',
            "expected True or False",
        ),
    ],
)
def test_foreign_files_that_are_something_else(tmp_path, content, message):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as refusal:
        read_one(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    "name, content, where",
    [
        ("libero_goal.csv", "task_id,episode_idx,success\n3,0,1\n\n3,1,\n", "line 4: success is ''"),
        ("libero_goal.csv", "task_id;episode_idx;success\n3;first;1\n", "line 2: episode_idx is 'first'"),
        ("libero_goal.jsonl", '{"task_id": 3, "episode_idx": 0, "success": 1}\n{"task_id"', "line 2: not JSON"),
        ("libero_goal.jsonl", '\n{"task_id": "x", "episode_idx": 0, "success": 1}', "line 2: task_id is 'x'"),
        (
            "fork.json",
            '{"task_suite": "libero_goal", "results": [{"task_id": 3, "episode_idx": 0, "success": 2}]}',
            "results[0]: success is 2",
        ),
        (
            "lerobot.json",
            '{"per_task": [{"task_group": "libero_goal", "task_id": 3, "metrics": {"successes": [true, null]}}]}',
            "per_task[0].metrics.successes[1] is None",
        ),
        ("old.json", '{"per_episode": [{"success": true}, {"success": "no"}]}', "per_episode[1].success is 'no'"),
        (
            "vla.json",
            '{"benchmark": "libero_goal", "tasks": [{"task": "open it", "episodes": '
            '[{"episode_id": "e_4", "success": 0.5}]}]}',
            "success of episode e_4 of task 'open it' is 0.5",
        ),
        (
            "oft.txt",
            "Task suite: libero_goal\nTask: open it\nStarting episode 6...\nSuccess: perhaps\n",
            "Success of episode 6 of 'open it' is 'perhaps'",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_place(tmp_path, name, content, where):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError) as refusal:
        read_one(path)
    assert where in str(refusal.value) and str(path) in str(refusal.value)


def test_csv_without_a_suite_in_its_name(tmp_path):
    with pytest.raises(UserError, match="file's name"):
        read_external(fork(tmp_path / "results.csv", as_csv=True))


def test_export_has_a_row_per_episode_and_arm(tmp_path):
    run = make_run(tmp_path / "run")
    answer = export_episodes([run], tmp_path / "episodes.csv")
    with open(tmp_path / "episodes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert answer["rows"] == len(rows) == 120
    assert {row["arm"] for row in rows} == {"baseline", "aa", "w4a8", "w4a4"}
    error = next(row for row in rows if row["outcome"] == "error")
    assert error["success"] == "" and error["error"] == "the simulator died"
    assert all(float(row["flow_ms_p50"]) > 0 and float(row["jerk"] or 1) > 0 for row in rows)
    with pytest.raises(UserError, match="neither .csv nor .jsonl nor .parquet"):
        export_episodes([run], tmp_path / "episodes.xlsx")


def test_parquet_holds_the_same_rows_and_says_its_cure_where_pyarrow_is_missing(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", arms={"baseline": 0.0})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'qlibero\[parquet\]'"):
        export_episodes([run], tmp_path / "episodes.parquet")
    monkeypatch.undo()
    export_episodes([run], tmp_path / "episodes.parquet")
    export_episodes([run], tmp_path / "episodes.csv")
    rows = parquet.read_table(tmp_path / "episodes.parquet").to_pylist()
    with open(tmp_path / "episodes.csv", newline="") as file:
        assert [str(row["steps"]) for row in rows] == [row["steps"] for row in csv.DictReader(file)]
    assert len(rows) == 30 and {type(row["jerk"]) for row in rows} == {float}


# ------------------------------------------------------------------------------------- one population, or none
def lerobot_tasks(path, tasks, suite="libero_object", episodes=10):
    found = [
        {"task_group": suite, "task_id": task, "metrics": {"successes": [True] * (episodes - 1) + [False]}}
        for task in tasks
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"per_task": found, "overall": {}}))
    return path


@pytest.mark.parametrize(
    "left, right, says",
    [
        (dict(tasks=range(10)), dict(tasks=range(10), suite="libero_goal"), "libero_object tasks 0, 1"),
        (dict(tasks=[0, 1]), dict(tasks=[2, 3]), "libero_object tasks 2, 3"),
        (dict(tasks=[1]), dict(tasks=[1], suite="libero_10"), "libero_10 task 1"),
    ],
    ids=["suites", "tasks", "one task of each"],
)
def test_other_suites_or_tasks_are_no_second_sample(tmp_path, left, right, says):
    files = [lerobot_tasks(tmp_path / name / "eval_info.json", **of) for name, of in (("a", left), ("b", right))]
    with pytest.raises(UserError, match=says) as refused:
        compare_external(files)
    assert "no task in common" in str(refused.value)


def test_only_the_common_tasks_are_compared_and_the_rest_is_named(tmp_path):
    one = lerobot_tasks(tmp_path / "a" / "eval_info.json", range(10))
    two = lerobot_tasks(tmp_path / "b" / "eval_info.json", [8, 9, 10, 11])
    (arm,) = compare_external([one, two]).to_json()["arms"].values()
    assert arm["counts"] == arm["reference_counts"] == [18, 20]
    assert "only what both have, libero_object tasks 8, 9; left out is libero_object tasks 0, 1" in arm["caveat"]
    more = lerobot_tasks(tmp_path / "c" / "eval_info.json", range(10))
    data = json.loads(more.read_text())
    data["per_task"][0]["metrics"]["successes"] = [False] * 30
    more.write_text(json.dumps(data))
    (arm,) = compare_external([one, more]).to_json()["arms"].values()
    assert "different shares of the episodes" in arm["caveat"]


def test_a_file_of_other_tasks_beside_our_run_is_refused(tmp_path):
    run = make_run(tmp_path / "run", arms={"baseline": 0.0}, trajectories=False)
    other = fork(tmp_path / "fork" / "libero_goal_results.json", suite="libero_goal")
    with pytest.raises(UserError, match="libero_goal tasks 0, 1"):
        compare_external([run, other])


ROWS = [("0", "0", "1"), ("0", "1", "0"), ("3", "0", "True"), ("3", "1", "false"), ("3", "2", "1.0")]


@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["unix", "windows"])
def test_tables_as_spreadsheets_write_them(tmp_path, bom, delimiter, newline):
    lines = [delimiter.join(row) for row in [("task_id", "episode_idx", "success"), *ROWS]]
    path = tmp_path / "libero_object_results.csv"
    path.write_bytes((bom + newline.join(lines) + newline * 2).encode())
    assert read_one(path).counts == (3, 5, 0)
    assert read_one(path).keyed()[("libero_object", "3", 2)] == "success"


def test_lines_of_json_are_read(tmp_path):
    rows = [{"task_id": int(t), "episode_idx": int(i), "success": s} for t, i, s in ROWS]
    path = tmp_path / "libero_spatial.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_one(path).keyed()[("libero_spatial", "0", 1)] == "failure"


OPENVLA = """Task suite: libero_object

Task: pick up the milk
Starting episode 1...
Success: True
# episodes completed so far: 1
# successes: 1 (100.0%)

Task: pick up the milk
Starting episode 2...
Success: False
# episodes completed so far: 2

Task: pick up the soup
Starting episode 1...
Success: True
Current task success rate: 1.0
"""


def test_openvlas_log_is_read(tmp_path):
    path = tmp_path / "EVAL-libero_object.txt"
    path.write_text(OPENVLA)
    found = read_one(path)
    assert found.tool == "OpenVLA" and found.keyed() == {
        ("libero_object", "pick up the milk", 0): "success",
        ("libero_object", "pick up the milk", 1): "failure",
        ("libero_object", "pick up the soup", 0): "success",
    }


def csv_of(*rows):
    return "task_id,episode_idx,success\n" + "".join(f"{row}\n" for row in rows)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("libero_object.csv", csv_of("0,0,1", "0,0,0"), "libero_object task 0, episode 0 stands there more than once"),
        ("libero_object.csv", csv_of("0,0,1", "1,0,0", "0,0,0", "1,0,1"), "and 1 more; which one counts"),
        ("libero_object.csv", csv_of(), "without a single episode"),
        ("libero_object.csv", "", "without a single episode"),
        ("libero_object.csv", "task,episode\n0,0\n", "say what its columns are with --columns"),
        ("libero_object.jsonl", "", "without a single episode"),
        ("libero_object.jsonl", "[1]\n", "is no JSON object"),
        ("a.json", json.dumps({"per_task": [], "overall": {}}), "without a single episode"),
        ("a.json", json.dumps({"per_task": [{"task_id": 1, "metrics": {"successes": [True]}}]}), "lacks 'task_group'"),
        ("a.json", json.dumps({"per_episode": []}), "without a single episode"),
        ("a.json", json.dumps({"task_suite": "libero_goal", "results": []}), "without a single episode"),
        ("a.json", json.dumps({"benchmark": "libero_goal", "tasks": []}), "without a single episode"),
        ("a.json", json.dumps({"libero_object": {"success_rate": 0.98}}), "totals alone are for --counts"),
        ("a.json", "[" * 100_000, "cannot be read"),
        ("log.txt", "Task suite: libero_object\nnothing began\n", "without a single episode"),
        ("log.txt", "Hello\n", "not a result file"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says) as refused:
        read_external(tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)
