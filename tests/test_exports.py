"""Risk: a published table does not say what its run said: another verdict, a lost episode, a column that means another
thing than the page about it says, or a path of the machine it was written on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pyarrow import parquet
from synthetic_run import make_run

from qlibero.errors import UserError
from qlibero.results.compare import compare_runs
from qlibero.results.episode_table import COLUMNS, VERSION
from qlibero.results.export import _files, export_episodes
from qlibero.results.external_results import compare_external
from qlibero.results.ledger import write_meta
from qlibero.results.runs import RunResults, read_runs

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("published") / "run", inits=6, trajectories=False)
    write_meta(run, "w4a8", {"artifact": {"path": "/home/somebody/artifacts/x.safetensors", "sha256": "ab" * 32}})
    return run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLIBERO_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_a_table_holds_the_records_of_its_run(run, tmp_path, name):
    assert export_episodes([run], tmp_path / name)["rows"] == 72
    (ours,), (read,) = read_runs([run]), read_runs([tmp_path / name])
    assert list(read.arms) == list(ours.arms) and read.planned == ours.planned and read.environment == ours.environment
    for arm in ours.arms:
        assert [r.to_json() for r in ours.arms[arm].records] == [r.to_json() for r in read.arms[arm].records]


def test_a_table_gives_the_verdicts_of_its_run(run, tmp_path):
    export_episodes([run], tmp_path / "x.jsonl")
    there, here = compare_runs([run]), compare_runs([tmp_path / "x.jsonl"])
    for side in (there, here):
        del side["runs"], side["grouped"]
    assert here["arms"]["w4a8"]["pairs"] == 17  # one of 18 ended in an error
    assert json.dumps(here, sort_keys=True) == json.dumps(there, sort_keys=True)


def test_a_table_stands_beside_results_of_other_tools(run, tmp_path):
    export_episodes([run], tmp_path / "x.jsonl", arms=["baseline"])
    other = tmp_path / "libero_object.csv"
    other.write_text("task_id,episode_idx,success\n" + "".join(f"{t},{i},1\n" for t in range(3) for i in range(6)))
    found = compare_external([tmp_path / "x.jsonl", other]).to_json()
    (result,) = found["arms"].values()
    assert found["reference"] == "synthetic/baseline" and result["pairs"] == 18


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_a_part_of_a_run_was_planned_in_part(run, tmp_path, name):
    export_episodes([run], tmp_path / name, arms=["baseline", "w4a4"], tasks=[2])
    found = compare_runs([tmp_path / name])
    assert list(found["arms"]) == ["w4a4"] and found["arms"]["w4a4"]["pairs"] == 6
    (read,) = read_runs([tmp_path / name])
    assert len(read.planned) == 6


def test_no_path_of_this_machine_leaves_it(run, tmp_path):
    export_episodes([run], tmp_path / "x.jsonl", card=tmp_path / "README.md")
    text = (tmp_path / "x.jsonl").read_text() + (tmp_path / "README.md").read_text()
    assert "/home/somebody" not in text and "…/x.safetensors" in text and str(tmp_path) not in text


def test_every_column_is_documented_once_with_its_type(run, tmp_path):
    rows = re.findall(r"^\| `(\w+)` \| ([\w ]+) \| (.+) \|$", (DOCS / "export.md").read_text(), re.MULTILINE)
    assert {name: (kind.replace(" of ", "_"), about) for name, kind, about in rows} == COLUMNS
    export_episodes([run], tmp_path / "x.parquet")
    export_episodes([run], tmp_path / "x.jsonl")
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert parquet.read_schema(tmp_path / "x.parquet").names == list(json.loads(lines[1])) == list(COLUMNS)
    assert json.loads(lines[0])["version"] == VERSION == 2


def test_a_part_of_several_suites_plans_no_episode_that_the_run_did_not(tmp_path):
    """Else a finished run, exported in part, is interim for ever."""
    said = {
        "suite": ["libero_object", {"bddl": "/somewhere/mine"}, "libero_goal"],
        "tasks": {"libero_object": [0, 1], "mine": [1], "libero_goal": [0, 2]},
        "episodes_per_task": 2,
        "seed": 7,
    }
    for tasks in ([0], [1], [0, 1], [2], [9]):
        whole = RunResults(tmp_path, {}, said, {})
        part = RunResults(tmp_path, {}, _files(whole, None, tasks)["experiment.yaml"], {})
        assert (part.planned or set()) == {key for key in whole.planned if key.task in tasks}


def test_the_card_counts_what_the_table_holds(run, tmp_path):
    export_episodes([run], tmp_path / "x.parquet", card=tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\npretty_name:") and "path: x.parquet" in card and "72 evaluation episodes" in card
    wins = sum(r.succeeded for r in read_runs([run])[0].arms["baseline"].records)
    assert f"{wins}/18 | 0 |" in card and "17 | 1 |" in card  # w4a8 has one error


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda lines: [lines[0].replace('"version": 2', '"version": 9'), *lines[1:]], "reads up to 2; update qlibero"),
        (lambda lines: [lines[0], lines[1].replace('"run": "synthetic"', '"run": "other"')], ":2: a row of no run"),
        (lambda lines: [lines[0], lines[1].replace('"steps": ', '"steps": -')], ":2: steps"),
        (lambda lines: [lines[0], lines[1][:50]], ":2: not JSON"),
        (
            lambda lines: [lines[0].replace('"synthetic": {', '"../x": {'), *lines[1:]],
            "a row of no run|can name no directory",
        ),
        (
            lambda lines: [lines[0].replace('"experiment.yaml"', '"../../experiment.yaml"'), *lines[1:]],
            "no file of a run",
        ),
    ],
    ids=["newer", "other run", "value", "cut", "run outside", "file outside"],
)
def test_a_table_that_was_changed_is_refused_with_its_line(run, tmp_path, change, says):
    table = tmp_path / "x.jsonl"
    export_episodes([run], table)
    table.write_text("\n".join(change(table.read_text().splitlines())))
    with pytest.raises(UserError, match=says) as refused:
        compare_runs([table])
    assert str(table) in str(refused.value) and not (tmp_path / "experiment.yaml").exists()


def test_wrong_requests(run, tmp_path):
    with pytest.raises(UserError, match="--card describes a .jsonl or .parquet"):
        export_episodes([run], tmp_path / "x.csv", card=tmp_path / "README.md")
    with pytest.raises(UserError, match="two runs are called synthetic"):
        export_episodes([run, run], tmp_path / "x.jsonl")
