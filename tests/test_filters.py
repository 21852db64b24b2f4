"""Risk: --arm, --task or --init shows, counts or records other episodes than were asked for, or none without a word."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from synthetic_run import make_run

from qlibero.cli.app import main
from qlibero.config.load import load_experiment
from qlibero.errors import UserError
from qlibero.launch.status import status
from qlibero.results.export import export_episodes
from qlibero.results.ledger import read_ledger
from qlibero.run.record_videos import wanted_episodes

FILTERS = [
    (dict(), 4, {(0, 0), (0, 1), (0, 2), (0, 3)}, {"baseline", "w4a8"}),
    (dict(tasks=[2]), 20, {(2, init) for init in range(10)}, {"baseline", "w4a8"}),
    (dict(inits=[3]), 20, {(task, 3) for task in range(3)}, {"baseline", "w4a8"}),
    (dict(tasks=[0, 2], inits=[3, 7], arms=["w4a8"]), 20, {(t, i) for t in (0, 2) for i in (3, 7)}, {"w4a8"}),
    (dict(tasks=[1], inits=[1]), 20, {(1, 1)}, {"baseline"}),  # the other arm's ended in an error
]


def loadable(directory: Path, arms: dict[str, float], **how: bool) -> Path:
    """A synthetic run whose experiment.yaml is an experiment, as that of a real one."""
    other = next(arm for arm in arms if arm != "baseline")
    settings = {
        "backends": ["baseline", {"name": other, "backend": "fake"}],
        "policy": {"type": "pi05", "untrained": {"config": "config.json", "seed": 0}},
        "quant": {"layout": "llm", "method": "rtn"},
    }
    return make_run(directory, arms, settings=settings, **how)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> Path:
    return loadable(tmp_path_factory.mktemp("run"), {"baseline": 0.0, "w4a8": 0.0})


@pytest.mark.parametrize(("filters", "count", "episodes", "arms"), FILTERS)
def test_videos_are_of_the_episodes_that_are_asked_for(synthetic, filters, count, episodes, arms):
    experiment = load_experiment(synthetic / "experiment.yaml", environ={}, check_files=False)
    found = wanted_episodes(experiment, synthetic, count, **filters)
    assert {(one.task, one.init) for one in found} == episodes and {one.arm for one in found} == arms


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (dict(arms=["w4a16"]), "--arm w4a16: .* has the arms baseline, w4a8"),
        (dict(tasks=[9]), "no finished episode fits --task 9"),
        (dict(tasks=[1], inits=[1], arms=["w4a8"]), "fits --task 1 --init 1 --arm w4a8"),
    ],
)
def test_videos_say_what_is_not_there(synthetic, filters, message):
    experiment = load_experiment(synthetic / "experiment.yaml", environ={}, check_files=False)
    with pytest.raises(UserError, match=message):
        wanted_episodes(experiment, synthetic, 4, **filters)


@pytest.mark.parametrize("made", [0, 1, 4])
def test_no_video_is_missed_in_silence(tmp_path, capsys, made):
    """Four are asked for; `made` of them lie there, and of the others no actions were kept to replay."""
    run = loadable(tmp_path / "run", {"baseline": 0.0, "w4a8": 0.0}, trajectories=False)
    for init in range(made):
        path = run / "w4a8" / "videos" / f"libero_object-0-{init}-7.mp4"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"a video")
    status = main(["videos", str(run), "--task", "0", "--arm", "w4a8", "--json"])
    out, said = capsys.readouterr()
    document = json.loads(out.splitlines()[-1])
    there, missing = document["there"], document["missing"]
    assert not document["videos"] and (len(there), len(missing)) == (made, 4 - made) and status == (made < 4)
    assert ("there already: " in said) == (made > 0) and ("not made, " in said) == (made < 4)
    assert all(path in said for path in there + missing)


def test_flips_come_first(tmp_path):
    run = loadable(tmp_path, {"baseline": 0.0, "w4a4": 0.3})
    experiment = load_experiment(run / "experiment.yaml", environ={}, check_files=False)
    outcome = {(arm, r.key): r.outcome for arm in ("baseline", "w4a4") for r in read_ledger(run, arm)}
    flips = sorted(key for arm, key in outcome if arm == "w4a4" and outcome["baseline", key] != outcome["w4a4", key])
    assert 2 < len(flips) < 25
    found = wanted_episodes(experiment, run, len(flips))
    assert sorted({one.key for one in found}) == flips and len(found) == 2 * len(flips)


COUNTS = [  # 3 tasks × 10 initial states × 2 arms, of which w4a8's 1/1 ended in an error
    (None, None, 59, 60),
    ([1], None, 19, 20),
    (None, ["w4a8"], 29, 30),
    ([1], ["w4a8"], 9, 10),
    ([0, 2], ["baseline"], 20, 20),
]


@pytest.mark.parametrize(("tasks", "arms", "done", "episodes"), COUNTS)
def test_status_counts_what_is_asked_for(synthetic, tasks, arms, done, episodes):
    found = status(synthetic, tasks, arms).to_json()
    assert (found["done"], found["episodes"], found["complete"]) == (done, episodes, done == episodes)
    assert found["errors"] == episodes - done


@pytest.mark.parametrize(("tasks", "arms"), [([9], None), (None, ["w4a16"]), ([0, 9], ["w4a8"])])
def test_status_names_what_the_run_does_not_have(synthetic, tasks, arms):
    with pytest.raises(UserError, match="--(task 9|arm w4a16): .* has the (tasks 0, 1, 2|arms baseline, w4a8)"):
        status(synthetic, tasks, arms)


@pytest.mark.parametrize(("tasks", "arms", "done", "episodes"), COUNTS)
def test_export_writes_what_is_asked_for(synthetic, tmp_path, tasks, arms, done, episodes):
    export_episodes([synthetic], tmp_path / "episodes.csv", arms, tasks)
    rows = list(csv.DictReader((tmp_path / "episodes.csv").open()))
    assert len(rows) == episodes
    assert {row["arm"] for row in rows} == set(arms or ("baseline", "w4a8"))
    assert {int(row["task"]) for row in rows} == set(tasks or range(3))
