"""Risk: a result of another tool is read as another result, is paired where nothing makes it a pair, or is left
unpaired though its file says enough. Each file here is written field by field as the tool's own source writes it."""

from __future__ import annotations

import json
import sqlite3

import pytest
from synthetic_run import make_run

from qlibero.errors import UserError
from qlibero.results.external_results import compare_external
from qlibero.results.importers import read_external
from qlibero.results.importers.columns import parse_columns

SPATIAL = (
    "pick_up_the_black_bowl_between_the_plate_and_the_ramekin_and_place_it_on_the_plate",
    "pick_up_the_black_bowl_next_to_the_ramekin_and_place_it_on_the_plate",
)
WORDS = [name.replace("_", " ") for name in SPATIAL]


def one(path):
    (arm,) = read_external(path)
    return arm


# ------------------------------------------------------------------------------------------------- VLAQuantBench
def quantbench(path, preset="BASELINE", failures=(), suite="libero_spatial", seed=0, states=20, benchmark="libero"):
    header = {
        "kind": "header",
        "model": "pi05",
        "checkpoint": "lerobot/pi05_libero_finetuned_v044",
        "benchmark": benchmark,
        "suite": suite,
        "preset": preset,
        "scope": "e2e",
        "method": "rtn",
        "baseline_dtype": "bfloat16",
        "episodes_per_task": states,
        "seed": seed,
        "quant_report": {"llm": {"layers": 126, "params": 1, "mean_rel_mse": None}},
        "extra": {"adapter_options": {}, "runner_options": {}, "exclude": None, "only": None},
        "created": "2026-08-24T10:45:36",
        "vqb_commit": "dcd3cd1",
    }
    rows = [
        {
            "kind": "episode",
            "suite": suite,
            "task_id": t,
            "task_name": SPATIAL[t],
            "episode": i,
            "seed": seed + 1009 * t + i,
            "success": (t, i) not in failures,
            "steps": 77,
            "wall_time_s": 12.04,
            "subtasks_completed": None,
            "progress_score": None,
            "policy_latency_mean_s": 0.05,
            "n_inferences": 8,
            "extra": {"max_steps": 280, "camera_size": 360, "action_mode": "delta", "init_state_id": i},
        }
        for t in range(2)
        for i in range(states)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
    return path


def test_cells_of_vlaquantbench_pair_by_task_state_and_seed(tmp_path):
    folder = tmp_path / "libero_spatial" / "pi05"
    base = quantbench(folder / "rtn-BASELINE-e2e.jsonl", failures={(0, 3)})
    arm = quantbench(folder / "rtn-W4A8-e2e.jsonl", "W4A8", failures={(1, 2), (1, 5)})
    found = compare_external([base, arm]).to_json()
    assert found["reference"] == "libero_spatial/pi05/rtn-BASELINE-e2e"
    result = found["arms"]["libero_spatial/pi05/rtn-W4A8-e2e"]
    assert (result["pairs"], result["broken"], result["repaired"], result["delta"]) == (40, 2, 1, -0.025)
    assert "paired by task, initial state and seed" in result["caveat"] and result["tool"] == "VLAQuantBench"
    assert one(base).constants == {"max_steps": {"libero_spatial": 280}, "resolution": 360}


def test_another_seed_of_vlaquantbench_is_no_pair(tmp_path):
    files = [quantbench(tmp_path / "a" / "x.jsonl"), quantbench(tmp_path / "b" / "seed1-x.jsonl", seed=100_000)]
    (result,) = compare_external(files).to_json()["arms"].values()
    assert result["paired"] is False and "share no episode key" in result["caveat"]


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda lines: lines[:3] + [lines[2]], "task 0, episode 1 stands there more than once"),
        (lambda lines: lines[:3] + [lines[3][:40]], "line 4: not JSON"),
        (lambda lines: lines[:3] + [lines[3].replace("true", '"maybe"')], "line 4: success is 'maybe'"),
        (lambda lines: lines[:3] + [lines[3].replace('"task_id": 0', '"task_id": "x"')], "line 4: task_id is 'x'"),
        (lambda lines: lines[:3] + ['{"kind": "episode", "suite": "libero_spatial"}'], "lacks 'task_id'"),
        (lambda lines: lines[:1], "without a single episode"),
    ],
    ids=["twice", "cut", "success", "task", "missing", "header alone"],
)
def test_a_wrong_line_of_vlaquantbench_is_named(tmp_path, change, says):
    path = quantbench(tmp_path / "x.jsonl")
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(UserError) as refused:
        read_external(path)
    assert says in str(refused.value) and str(path) in str(refused.value)


# ------------------------------------------------------------------------------------------------------ vla-eval
def recording(path, failures=(), errors=(), seed=7, suites=("libero_spatial",), states=5, extra=()):
    """The tables of vla-eval 0.8, as its RecordingStore makes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    connection.executescript(
        "PRAGMA journal_mode=WAL;"
        "CREATE TABLE eval_metadata (eval_id TEXT PRIMARY KEY, safe_name TEXT NOT NULL, metadata TEXT NOT NULL);"
        "CREATE TABLE episode_results (sid TEXT NOT NULL, eid TEXT NOT NULL, eval_id TEXT NOT NULL, task_name TEXT, "
        "episode_id INTEGER, status TEXT, metrics TEXT, steps INTEGER, elapsed_sec REAL, context TEXT, "
        "jsonl_path TEXT, failure_reason TEXT, failure_detail TEXT, PRIMARY KEY (sid, eid));"
        "CREATE TABLE step_rows (sid TEXT, eid TEXT, step_id INTEGER, fields TEXT);"
    )
    for suite in suites:
        name = f"LIBEROBenchmark_{suite}"
        metadata = {
            "benchmark": name,
            "mode": "sync",
            "config": {"benchmark": "vla_eval.benchmarks.libero", "params": {"suite": suite, "seed": seed}},
            "metric_keys": {"success": "mean"},
            "harness_version": "0.8.0",
        }
        connection.execute("INSERT INTO eval_metadata VALUES (?, ?, ?)", (suite, name, json.dumps(metadata)))
        for t in range(2):
            for i in range(states):
                status = "error" if (t, i) in errors else "fail" if (t, i) in failures else "success"
                row = (
                    "s",
                    f"{suite}{t}-{i}",
                    suite,
                    WORDS[t],
                    i,
                    status,
                    json.dumps({"success": status == "success"}),
                    90,
                    8.5,
                    json.dumps({"name": WORDS[t], "suite": suite, "task_id": t, "episode_idx": i}),
                    "x.jsonl",
                    "timeout" if status == "error" else None,
                    None,
                )
                connection.execute(f"INSERT INTO episode_results VALUES ({','.join('?' * 13)})", row)
    connection.commit()
    connection.close()
    return path


def aggregate(path, failures=(), errors=(), seed=7, states=5):
    """What `vla-eval merge` makes of it."""
    episodes = {
        t: [
            {
                "sid": "s",
                "eid": f"{t}-{i}",
                "episode_id": i,
                "metrics": {"success": (t, i) not in {*failures, *errors}},
                "steps": 90,
                "name": WORDS[t],
                "suite": "libero_spatial",
                "task_id": t,
                "episode_idx": i,
                **({"failure_reason": "timeout"} if (t, i) in errors else {}),
            }
            for i in range(states)
        ]
        for t in range(2)
    }
    body = {
        "benchmark": "LIBEROBenchmark_libero_spatial",
        "mode": "sync",
        "harness_version": "0.8.0",
        "tasks": [{"task": WORDS[t], "episodes": of, "num_episodes": states} for t, of in episodes.items()],
        "config": {"params": {"suite": "libero_spatial", "seed": seed}},
        "seed": seed,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body))
    return path


def test_a_recording_and_its_aggregate_are_the_same_episodes(tmp_path):
    said = dict(failures={(0, 1)}, errors={(1, 4)})
    database = one(recording(tmp_path / "recording-a.sqlite", **said))
    document = one(aggregate(tmp_path / "a_aggregate.json", **said))
    assert sorted(database.episodes) == sorted(document.episodes)
    assert database.counts == (8, 9, 1) and database.has_seeds
    assert dict(database.episodes)["libero_spatial", "0", 1, 7] == "failure"


def test_two_recordings_of_several_suites_pair(tmp_path):
    both = ("libero_spatial", "libero_goal")
    files = [
        recording(tmp_path / "a" / "recording-1.sqlite", suites=both),
        recording(tmp_path / "b" / "recording-2.sqlite", suites=both, failures={(0, 0)}),
    ]
    (result,) = compare_external(files).to_json()["arms"].values()
    assert (result["pairs"], result["broken"]) == (20, 2)


def test_a_recording_where_nothing_may_be_written(tmp_path):
    path = recording(tmp_path / "box" / "recording-1.sqlite")
    path.parent.chmod(0o555)
    try:
        assert one(path).counts == (10, 10, 0)
    finally:
        path.parent.chmod(0o755)


def test_another_database_and_a_broken_one(tmp_path):
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (text TEXT)")
    with pytest.raises(UserError, match="not a result file"):
        read_external(path)
    path.write_bytes(path.read_bytes()[:100] + b"\xff" * 900)
    with pytest.raises(UserError, match="SQLite file that cannot be read"):
        read_external(path)


# --------------------------------------------------------------------------------------- logs of OpenVLA and openpi
def log(path, ended=("True", "False", "error"), prefix="", own_states=False):
    error = {"": "Episode error: EGL is gone", "INFO:root:": "ERROR:root:Caught exception: connection lost"}
    lines = [f"{prefix}Task suite: libero_spatial"]
    lines += ["Using initial states from /data/states.json"] if own_states else ["Using default initial states"]
    for words in WORDS:
        for i, end in enumerate(ended):
            lines += [f"{prefix}", f"Task: {words}", f"{prefix}Starting episode {i + 1}..."]
            lines += (
                [error.get(prefix, "2026-11-01 10:00:00,123 [INFO] Episode error: out of memory")]
                if end == "error"
                else []
            )
            lines += [f"{prefix}Success: {end == 'True'}", f"{prefix}# episodes completed so far: {i + 1}"]
    lines += [f"{prefix}Current total success rate: 0.5", "Final results:", "Total episodes: 6"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    "prefix", ["", "INFO:root:", "2026-11-01 10:00:00,123 [INFO] "], ids=["file", "openpi", "terminal"]
)
def test_a_log_with_an_exception_counts_it_as_an_error(tmp_path, prefix):
    arm = one(log(tmp_path / "EVAL.txt", prefix=prefix))
    assert arm.counts == (2, 4, 2)
    assert dict(arm.episodes)["libero_spatial", WORDS[1], 1, None] == "failure"


def test_own_initial_states_of_openvla_oft_cannot_be_paired(tmp_path):
    files = [log(tmp_path / "a" / "x.txt"), log(tmp_path / "b" / "x.txt", own_states=True)]
    (result,) = compare_external(files).to_json()["arms"].values()
    assert result["paired"] is False and "not LIBERO's own" in result["caveat"]


def test_tasks_by_their_words_pair_with_tasks_by_number_where_a_file_says_both(tmp_path):
    text = log(tmp_path / "oft" / "EVAL.txt", ended=("True",) * 5)
    number = recording(tmp_path / "v" / "recording-1.sqlite", failures={(1, 2)})
    (result,) = compare_external([text, number]).to_json()["arms"].values()
    assert (result["pairs"], result["broken"]) == (10, 1) and "and so are the seeds" in result["caveat"]


def test_tasks_by_their_words_pair_with_a_run_of_ours(tmp_path):
    run = make_run(tmp_path / "run", arms={"baseline": 0.0}, trajectories=False, inits=3)
    lines = ["Task suite: libero_object"]
    for task in range(3):
        for i in range(3):
            lines += [f"Task: put object {task} away", f"Starting episode {i + 1}...", "Success: True"]
    path = tmp_path / "EVAL.txt"
    path.write_text("\n".join(lines))
    (result,) = compare_external([run, path]).to_json()["arms"].values()
    assert result["pairs"] == 9 and result["broken"] == 0


# --------------------------------------------------------------------------------------------------------- RLinf
CONFIG = {"env": {"eval": {"task_suite_name": "libero_spatial", "max_episode_steps": 240}}}


def rlinf(path, rate="0.9740", count=500, before=CONFIG):
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics = (
        f"{{'eval/return': array(0.9, dtype=float32), 'eval/success_once': array({rate}, dtype=float32), "
        f"'eval/num_trajectories': {count}}}"
    )
    table = f"│ success_once=0.974 │ num_trajectories={count} │"
    path.write_text(f"{json.dumps(before, indent=2)}\n[INFO 10:00:00] {metrics}\n{table}\n")
    return path


def test_rlinf_gives_counts_of_one_suite(tmp_path):
    files = [rlinf(tmp_path / "a" / "eval_embodiment.log"), rlinf(tmp_path / "b" / "eval_embodiment.log", "0.9300")]
    (result,) = compare_external(files).to_json()["arms"].values()
    assert result["counts"] == [465, 500] and result["reference_counts"] == [487, 500] and result["paired"] is False
    assert "RLinf logs totals only" in result["caveat"]
    assert one(files[0]).constants == {"max_steps": {"libero_spatial": 240}}
    other = quantbench(tmp_path / "c" / "x.jsonl", suite="libero_goal")
    with pytest.raises(UserError, match="libero_spatial, .* has libero_goal: no suite in common"):
        compare_external([files[0], other])


@pytest.mark.parametrize(
    "rate, count, says",
    [
        ("0.97", 500, "too coarse"),
        ("0.9731", 500, "no rate of 500 trajectories"),
        ("1.2000", 500, "no rate"),
        ("0.5", 0, "no rate|coarse|single episode"),
    ],
)
def test_a_rate_that_is_no_count_is_refused(tmp_path, rate, count, says):
    path = rlinf(tmp_path / "eval.log", rate, count)
    path.write_text(path.read_text().replace("success_once=0.974", ""))
    with pytest.raises(UserError, match=says):
        read_external(path)


# ------------------------------------------------------------------------------------------------- anybody's table
TABLE = ("method", "bench", "t", "k", "ok")
ROWS = [
    (m, "libero_goal", t, k, int(k != 1 or m == "bf16")) for m in ("bf16", "w4") for t in range(3) for k in range(4)
]


def table(path, delimiter=","):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(dict(zip(TABLE, row, strict=True))) for row in ROWS))
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(dict(zip(TABLE, map(list, zip(*ROWS, strict=True)), strict=True))), path)
    else:
        path.write_text("\n".join(delimiter.join(map(str, row)) for row in (TABLE, *ROWS)))
    return path


@pytest.mark.parametrize("name, delimiter", [("x.csv", ";"), ("x.tsv", "\t"), ("x.jsonl", ""), ("x.parquet", "")])
def test_a_table_of_two_methods_is_two_results(tmp_path, name, delimiter):
    path = table(tmp_path / name, delimiter)
    first, second = read_external(path, parse_columns("task=t,init=k,success=ok,suite=bench,arm=method"))
    assert first.name.endswith("x/bf16") and first.counts == (12, 12, 0) and second.counts == (9, 12, 0)
    assert {key for key, of in second.keyed().items() if of == "failure"} == {("libero_goal", t, 1) for t in "012"}


def test_a_table_without_initial_states_is_counts_and_a_fixed_value_stands_for_a_column(tmp_path):
    path = table(tmp_path / "x.csv")
    (arm, _) = read_external(path, parse_columns("task=t,success=ok,suite=@libero_10,arm=method"))
    assert arm.keyed() is None and arm.counts == (12, 12, 0) and arm.places[0] == ("libero_10", "0")


@pytest.mark.parametrize(
    "text, says",
    [
        ("task=t", "say which column is the success"),
        ("task=t,success=ok,trial=k", "the fields are suite, task, init, seed, success, arm"),
        ("task=t,task=u,success=ok", "task is there twice"),
        ("task,success=ok", "'task' is not FIELD=COLUMN"),
    ],
)
def test_wrong_columns_are_refused(text, says):
    with pytest.raises(UserError, match=says):
        parse_columns(text)


def test_a_column_that_is_not_there_is_named_beside_those_that_are(tmp_path):
    path = table(tmp_path / "libero_goal.csv")
    with pytest.raises(
        UserError, match=r"libero_goal.csv: line 2: no column 'okay'; there are method, bench, .* mean ok\?"
    ):
        read_external(path, parse_columns("task=t,success=okay"))
    path.write_text("t,ok\n1,\n")
    with pytest.raises(UserError, match="line 2: ok is empty"):
        read_external(path, parse_columns("task=t,success=ok"))
    with pytest.raises(UserError, match="--columns task=…"):
        read_external(path)
