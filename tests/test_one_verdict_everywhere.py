"""Risk: a kind of run that some reader crashes on, or about which two readers say two things.

Every kind of run, through the real ledger, before everything that reads one.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from wandb_offline import read_offline_run

from qlibero.config.config_hash import config_hash
from qlibero.config.load import load_experiment
from qlibero.config.schema import Tracking
from qlibero.episode_key import EpisodeKey
from qlibero.launch.cells import dump_resolved
from qlibero.launch.status import status
from qlibero.reporting.html.document import write_report
from qlibero.reporting.terminal import print_comparison, print_run
from qlibero.reporting.wandb_workspace import COLUMNS, workspace
from qlibero.reporting.wandb_workspace import spec as as_sent
from qlibero.results.compare import compare_paths, compare_runs
from qlibero.results.declaration import declare
from qlibero.results.export import export_episodes
from qlibero.results.ledger import Ledger, write_meta
from qlibero.results.records import EpisodeRecord
from qlibero.run.planned import planned_keys, stopping_rule
from qlibero.tracking.mirror import start_mirrors
from qlibero.tracking.rows import versus_baseline

pytestmark = pytest.mark.slow

POLICY = Path(__file__).parents[1] / "configs/policies/untrained.yaml"


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr("qlibero.results.ledger.os.fsync", lambda descriptor: None)


def episode(arm: str, key: EpisodeKey, outcome: str, scene: str = "", **more) -> EpisodeRecord:
    return EpisodeRecord(
        suite=key.suite,
        task=key.task,
        init=key.init,
        seed=key.seed,
        inits=key.inits,
        arm=arm,
        outcome=outcome,
        steps=50 if outcome == "success" else 90,
        replans=2,
        success_step=50 if outcome == "success" else None,
        error="hung" if outcome == "error" else None,
        fingerprint=scene or f"{key.task:02x}{key.init:02x}{key.seed:02x}",
        action_digest=arm.encode().hex(),
        policy_ms=[10.0, 12.0 + key.init % 3],
        batch_sizes=[1, 1],
        **more,
    )


@dataclass
class Kind:
    """How a run goes: so many of the arm's episodes are broken, end in errors, or are missing (pairs after which the
    run stands, in declared order); and its verdict."""

    verdict: str
    broken: int = 0
    errors: int = 0
    ran: int | None = None
    conflict: bool = False
    controls: int = 0
    suites: tuple[str, ...] = ("libero_goal",)
    inits: int = 25
    seeds: tuple[int, ...] = (7,)
    said: dict = field(default_factory=dict)
    """what the experiment says besides"""


LOOKS, E_VALUES = {"method": "group_sequential"}, {"method": "evalues"}
KINDS = {
    "fixed": Kind("non-inferior"),
    "worse": Kind("worse", broken=6),
    "inferior": Kind("inferior", broken=20),
    "looks: decided": Kind("non-inferior", inits=50, ran=360, said={"stop": LOOKS}),
    "looks: inferior": Kind("inferior", inits=50, ran=80, broken=40, said={"stop": LOOKS}),
    "looks: futile": Kind("inconclusive (futile)", inits=50, ran=360, broken=8, said={"stop": LOOKS}),
    "looks: open": Kind("interim", inits=50, ran=60, said={"stop": LOOKS}),
    "looks: none yet": Kind("interim", inits=50, ran=10, said={"stop": LOOKS}),
    "looks: undecided": Kind("inconclusive", inits=6, broken=2, said={"stop": {**LOOKS, "futility": 0}}),
    "looks: errors": Kind("inconclusive (errors)", inits=50, errors=30, said={"stop": LOOKS}),
    "e-values: decided": Kind("non-inferior", inits=30, said={"stop": E_VALUES}),
    "e-values: inferior": Kind("inferior", inits=30, ran=100, broken=60, said={"stop": E_VALUES}),
    "e-values: open": Kind("interim", inits=30, ran=200, said={"stop": E_VALUES}),
    "e-values: at the cap": Kind("inconclusive", inits=10, ran=40, said={"stop": {**E_VALUES, "max_episodes": 40}}),
    "errors": Kind("inconclusive (errors)", errors=8),
    "conflict": Kind("inconclusive (conflict)", conflict=True),
    "A/A": Kind("non-inferior", controls=1),
    "A/A five times, and pooled": Kind("non-inferior", controls=5, said={"compare_with": "pooled"}),
    "looks: beside A/A": Kind("non-inferior", inits=50, ran=360, controls=1, said={"stop": LOOKS}),
    "two suites": Kind("non-inferior", suites=("libero_goal", "libero_object")),
    "two suites, each under looks": Kind(
        "inconclusive", inits=50, ran=360, suites=("libero_goal", "libero_object"), said={"stop": LOOKS}
    ),
    "several seeds": Kind("non-inferior", seeds=(7, 8)),
    "one initial state, many seeds": Kind("inconclusive", inits=1, seeds=tuple(range(7, 57)), broken=3),
    "fresh initial states": Kind("non-inferior", said={"inits": "fresh(25)"}),
    "fresh initial states, unfinished": Kind("interim", ran=249, said={"inits": "fresh(25)"}),
    "several seeds, unfinished": Kind("interim", seeds=(7, 8), ran=499),
    "unfinished": Kind("interim", ran=249),
    "new tasks": Kind("inconclusive", broken=2, said={"estimand": "new_tasks"}),
    "too few": Kind("inconclusive (few pairs)", inits=1),
}


def make(directory: Path, kind: Kind, suite: str, **more) -> Path:
    directory.mkdir(parents=True)
    quantized = {"name": "w4a8", "backend": "fake"}
    controls = [{"backend": "aa", "replicates": kind.controls}] if kind.controls > 1 else ["aa"] * kind.controls
    each = {} if "inits" in kind.said else {"episodes_per_task": kind.inits}
    seeds = {"seed": kind.seeds[0]} if len(kind.seeds) == 1 else {"seeds": list(kind.seeds)}
    said = {
        "extends": str(POLICY),
        "name": "one",
        "suite": suite,
        "backends": ["baseline", *controls, quantized],
        "quant": {"method": "rtn", "layout": "llm"},
        **each,
        **seeds,
        **kind.said,
        **more,
    }
    (directory / "said.yaml").write_text(yaml.safe_dump(said))
    experiment = load_experiment(directory / "said.yaml", environ={})
    (directory / "said.yaml").unlink()
    (directory / "experiment.yaml").write_text(dump_resolved(experiment))
    (directory / "environment.json").write_text(
        json.dumps({"instructions": {suite: {str(task): "open the drawer" for task in range(10)}}})
    )
    keys = list(planned_keys(experiment))
    if experiment.stop:
        declare(directory, stopping_rule(experiment))
    ran = keys[: kind.ran]
    for arm in experiment.arms():
        outcomes = ["success"] * len(ran)
        if arm.name == "w4a8":
            outcomes[: kind.broken] = ["failure"] * kind.broken
            outcomes[: kind.errors] = ["error"] * kind.errors
        if arm.name.startswith("aa"):
            outcomes[0] = "failure"
        with Ledger(directory, arm.name, 0, config_hash(experiment, arm)) as ledger:
            for key, outcome in zip(ran, outcomes, strict=True):
                ledger.append(episode(arm.name, key, outcome))
            if kind.conflict and arm.name == "w4a8":
                ledger.append(episode(arm.name, keys[3], "failure"))
        if arm.name.startswith("aa"):
            write_meta(directory, arm.name, {"backend": "aa", "control": True})
    return directory


@pytest.mark.parametrize("name", KINDS)
def test_every_reader_of_every_kind_of_run_says_one_verdict(name, tmp_path, capsys):
    kind = KINDS[name]
    runs = [make(tmp_path / "sweep" / suite, kind, suite) for suite in kind.suites]
    found = compare_runs(runs)
    arm = found["arms"]["w4a8"]
    assert arm["verdict"] == kind.verdict
    assert json.loads(json.dumps(found)) == found

    # the terminal at every width, whole
    for width in (80, 100, 120):
        shown = Console(width=width, file=StringIO())
        print_comparison(compare_paths(runs), shown)
        for run in runs:
            print_run(run, shown)
        text = shown.file.getvalue()
        assert "…" not in text and max(map(len, text.splitlines())) <= width
        lines = [line for line in text.splitlines() if re.match(r"w4a8 +" + re.escape(kind.verdict), line)]
        assert lines, text

    # the report: card, table and answer
    answer = write_report(runs, tmp_path / "report.html")
    assert answer["verdicts"]["w4a8"] == kind.verdict
    page = (tmp_path / "report.html").read_text().replace("\u00a0", " ")
    assert kind.verdict in page and (arm["sentence"] in page or arm["sentence"].replace("'", "&#x27;") in page)

    # a suite of its own never contradicts the arm, and Holm never passes what the verdict does not
    if len(kind.suites) == 1:
        (suite,) = arm["suites"].values()
        assert suite["verdict"] == arm["verdict"]
    for row in (arm, *arm["suites"].values()):
        assert row["verdict"] == "non-inferior" or not row.get("noninferior_after_holm")

    # the interval beside a sequential verdict is the test's own and lies where the verdict says
    if arm["sequential"]:
        low, high = arm["interval95"]
        assert [low, high] == pytest.approx(arm["sequential"]["interval"] or [-1, 1], abs=1e-5)
        assert (low > -0.02) == (kind.verdict == "non-inferior") and (high < -0.02) == (kind.verdict == "inferior")
    if kind.verdict in ("interim", "inconclusive (futile)"):
        assert arm["because"] and arm["because"] in arm["sentence"]

    # trackers and the dashboard, which show the summary of one run
    for run in runs:
        alone = compare_runs([run])["arms"]["w4a8"]["verdict"]
        assert versus_baseline(run, "w4a8")["versus_baseline/verdict"] == alone
        assert len(kind.suites) > 1 or alone == kind.verdict
        spec = as_sent(workspace("p", "", {"one": None}, list(map(str, range(10)))))
        assert COLUMNS[7] == "versus_baseline/verdict" and '"summary:versus_baseline/verdict"' in json.dumps(spec)

        # what is counted as missing is what has no verdict yet
        seen = status(run).to_json()
        assert seen["complete"] == (seen["done"] == seen["episodes"])
        waiting = alone in ("interim", "inconclusive (errors)")
        assert seen["complete"] != waiting, seen

    rows = export_episodes(runs, tmp_path / "all.csv")["rows"]
    with open(tmp_path / "all.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == rows > 0


def test_the_mirror_through_the_real_client_says_what_compare_says(tmp_path):
    """An offline run of wandb's own client, under a stopping rule that has given up."""
    pytest.importorskip("wandb")
    run = make(tmp_path / "run", KINDS["looks: futile"], "libero_goal")
    (mirror,) = start_mirrors(run, Tracking(mode="offline")).mirrors
    said = mirror.finish(300)
    assert said.complete, said
    (file,) = (run / "w4a8" / "wandb").glob("*run-*/*.wandb")
    arm, seen = compare_runs([run])["arms"]["w4a8"], read_offline_run(file).summary
    assert seen["versus_baseline/verdict"] == arm["verdict"] == "inconclusive (futile)"
    assert seen["versus_baseline/sentence"] == arm["sentence"]
    assert [seen["versus_baseline/low95"], seen["versus_baseline/high95"]] == pytest.approx(arm["interval95"], abs=1e-5)


def test_cells_of_a_sweep_each_keep_their_verdict(tmp_path):
    for method, broken in (("rtn", 20), ("hadamard", 0)):
        make(tmp_path / method, Kind("", broken=broken), "libero_goal", quant={"method": method, "layout": "llm"})
    cells = compare_runs([tmp_path])["cells"]
    assert {label: cell["arms"]["w4a8"]["verdict"] for label, cell in cells.items()} == {
        "rtn": "inferior",
        "hadamard": "non-inferior",
    }
    assert write_report([tmp_path], tmp_path / "r.html")["verdicts"] == {
        "hadamard/w4a8": "non-inferior",
        "rtn/w4a8": "inferior",
    }


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"protocol": "openpi"}, "different protocols: pure and openpi"),
        ({"max_steps": 600}, "different step caps: 280 and 600"),
    ],
)
def test_episodes_that_were_run_unlike_are_no_pair(tmp_path, more, reason):
    for run, arm, said in (("a", "baseline", {}), ("b", "w4a8", more)):
        with Ledger(tmp_path / run, arm, 0, "h") as ledger:
            for i in range(30):
                settings = {"protocol": "pure", "max_steps": 280, "replan_steps": 5, **said}
                ledger.append(episode(arm, EpisodeKey("libero_goal", 0, i, 7), "success", **settings))
    arm = compare_runs([tmp_path / "a", tmp_path / "b"])["arms"]["w4a8"]
    assert arm["pairs"] == 0 and {entry["reason"] for entry in arm["unpaired"]} == {reason}


def test_arms_that_replan_otherwise_are_pairs_and_it_is_said(tmp_path):
    for run, arm, replan in (("a", "baseline", 5), ("b", "w4a8", 10)):
        with Ledger(tmp_path / run, arm, 0, "h") as ledger:
            for i in range(30):
                settings = {"protocol": "pure", "max_steps": 280, "replan_steps": replan}
                ledger.append(episode(arm, EpisodeKey("libero_goal", 0, i, 7), "success", **settings))
    arm = compare_runs([tmp_path / "a", tmp_path / "b"])["arms"]["w4a8"]
    assert arm["pairs"] == 30 and arm["unlike"] == {"replan_steps": [5, 10]}
    assert "replan_steps 10 instead of 5 (another protocol of the policy)" in arm["sentence"]
