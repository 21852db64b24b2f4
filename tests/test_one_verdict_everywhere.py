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

from qlibero.episode_key import EpisodeKey
from qlibero.reporting.html import write_report
from qlibero.reporting.terminal import print_comparison, print_run
from qlibero.reporting.wandb_workspace import COLUMNS
from qlibero.results.compare import compare_paths, compare_runs
from qlibero.results.export import export_episodes
from qlibero.results.ledger import Ledger
from qlibero.results.records import EpisodeRecord
from qlibero.results.stopping import declare, make_declaration
from qlibero.tracking.replay import versus_baseline


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr("qlibero.results.ledger.os.fsync", lambda descriptor: None)


def episode(arm: str, key: EpisodeKey, outcome: str, scene: str = "", **more) -> EpisodeRecord:
    return EpisodeRecord(
        suite=key.suite,
        task=key.task,
        init=key.init,
        seed=key.seed,
        arm=arm,
        outcome=outcome,
        steps=50 if outcome == "success" else 90,
        replans=2,
        success_step=50 if outcome == "success" else None,
        error="hung" if outcome == "error" else None,
        fingerprint=scene or f"{key.task:02x}{key.init:02x}{key.seed:02x}",
        action_digest="cd",
        policy_ms=[10.0, 12.0 + key.init % 3],
        batch_sizes=[1, 1],
        **more,
    )


@dataclass
class Kind:
    """How a run goes: so many of the arm's episodes are broken, end in errors, or are missing; and its verdict."""

    verdict: str
    broken: int = 0
    errors: int = 0
    missing: int = 0
    conflict: bool = False
    control: bool = False
    suites: tuple[str, ...] = ("libero_goal",)
    inits: int = 25
    seeds: tuple[int, ...] = (7,)
    stop: dict | None = None
    settings: dict = field(default_factory=dict)


KINDS = {
    "fixed": Kind("non-inferior"),
    "worse": Kind("worse", broken=6),
    "inferior": Kind("inferior", broken=20),
    "stop decided": Kind("non-inferior", inits=30, stop={}),
    "stop open": Kind("interim", inits=30, missing=100, stop={}),
    "stop at its cap": Kind("inconclusive", inits=10, stop={"max_pairs": 40}, missing=60),
    "errors": Kind("inconclusive (errors)", errors=8),
    "conflict": Kind("inconclusive (conflict)", conflict=True),
    "A/A": Kind("non-inferior", control=True),
    "two suites": Kind("non-inferior", suites=("libero_goal", "libero_object")),
    "several seeds": Kind("non-inferior", seeds=(7, 8)),
    "one initial state, many seeds": Kind("inconclusive", inits=1, seeds=tuple(range(7, 57)), broken=3),
    "unfinished": Kind("interim", missing=1),
    "new tasks": Kind("inconclusive", broken=2, settings={"estimand": "new_tasks"}),
    "too few": Kind("inconclusive (few pairs)", inits=1),
}


def make(directory: Path, kind: Kind, suite: str) -> Path:
    directory.mkdir(parents=True)
    keys = [EpisodeKey(suite, t, i, s) for t in range(10) for i in range(kind.inits) for s in kind.seeds]
    arms = ["baseline", *(["aa"] if kind.control else []), "w4a8"]
    said = {"name": "one", "suite": suite, "tasks": list(range(10)), "episodes_per_task": kind.inits}
    seeds = {"seed": kind.seeds[0]} if len(kind.seeds) == 1 else {"seeds": list(kind.seeds)}
    (directory / "experiment.yaml").write_text(yaml.safe_dump({**said, **seeds, "backends": arms, **kind.settings}))
    if kind.stop is not None:
        declaration = make_declaration(keys, margin=0.02, alpha=0.025, arms=["w4a8"], seed=7, **kind.stop)
        declare(directory, declaration)
        keys = list(declaration.order)
    ran = keys[: len(keys) - kind.missing]
    for arm in arms:
        outcomes = ["success"] * len(ran)
        if arm == "w4a8":
            outcomes[: kind.broken] = ["failure"] * kind.broken
            outcomes[: kind.errors] = ["error"] * kind.errors
        if arm == "aa":
            outcomes[0] = "failure"
        with Ledger(directory, arm, 0, f"hash of {arm}") as ledger:
            for key, outcome in zip(ran, outcomes, strict=True):
                ledger.append(episode(arm, key, outcome))
            if kind.conflict and arm == "w4a8":
                ledger.append(episode(arm, keys[3], "failure"))
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

    # trackers and the dashboard, which show the summary of one run
    for run in runs:
        alone = compare_runs([run])["arms"]["w4a8"]["verdict"]
        assert versus_baseline(run, "w4a8")["versus_baseline/verdict"] == alone
        assert len(kind.suites) > 1 or alone == kind.verdict
    assert "versus_baseline/verdict" in COLUMNS

    rows = export_episodes(runs, tmp_path / "all.csv")["rows"]
    with open(tmp_path / "all.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == rows > 0


def test_cells_of_a_sweep_each_keep_their_verdict(tmp_path):
    for method, broken in (("rtn", 20), ("duquant", 0)):
        make(tmp_path / method, Kind("", broken=broken, settings={"quant": {"method": method}}), "libero_goal")
    cells = compare_runs([tmp_path])["cells"]
    assert {label: cell["arms"]["w4a8"]["verdict"] for label, cell in cells.items()} == {
        "rtn": "inferior",
        "duquant": "non-inferior",
    }
    assert write_report([tmp_path], tmp_path / "r.html")["verdicts"] == {
        "duquant/w4a8": "non-inferior",
        "rtn/w4a8": "inferior",
    }


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"protocol": "openpi"}, "different protocols: pure and openpi"),
        ({"max_steps": 600}, "different step caps: 280 and 600"),
        ({"replan_steps": 10}, "different numbers of executed steps per call: 5 and 10"),
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
