"""Risk: a success rate that two kinds of machine share reads as if it were one machine's. Each view must say so."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_ledger_survives import record
from test_wandb_mirror import offline_runs, start_mirror

from qlibero import cli
from qlibero.config.config_hash import config_hash
from qlibero.config.dump import dump_resolved
from qlibero.config.load import load_experiment
from qlibero.results.ledger import Ledger

MACHINES = {"a1": ("EPYC AVX2 [0a]", 3), "b2": ("Xeon AVX512 [0b]", 1)}
SAID = "3 episodes from EPYC AVX2 [0a], 1 episode from Xeon AVX512 [0b]"


@pytest.fixture(params=[True, False], ids=["mixed", "alike"])
def run(request, tmp_path, tiny_experiment) -> tuple[Path, bool]:
    """Four episodes of two arms from two machines; `fake` answers differently there, or as the first one does."""
    experiment = load_experiment(tiny_experiment, ["tasks=[0]", "episodes_per_task=4", "mixed_machines=true"])
    (tmp_path / "experiment.yaml").write_text(dump_resolved(experiment))
    for arm in experiment.arms():
        episodes = iter(range(4))
        for shard, (probe, (kind, count)) in enumerate(MACHINES.items()):
            probe = probe if request.param and arm.name == "fake" else "a1"
            about = {"probe": probe * 8, "probes": {probe * 8: {"kind": kind, "facts": {"processor": kind}}}}
            with Ledger(tmp_path, arm.name, shard, config_hash(experiment, arm)) as ledger:
                ledger.bind({"label": arm.name, "identity": {"policy": "a"}, **about}, experiment.mixed_machines)
                for _ in range(count):
                    ledger.append(replace(record(next(episodes)), arm=arm.name))
    return tmp_path, request.param


def test_status_says_it(run, capfd):
    directory, mixed = run
    assert cli.main(["status", str(directory), "--json"]) == 0
    said = capfd.readouterr()
    (cell,) = json.loads(said.out.splitlines()[-1])["cells"]
    assert cell["machines"] == ({"fake": dict(MACHINES.values())} if mixed else {})
    assert (f"arm fake: {SAID}" in said.err) == mixed and "arm baseline" not in said.err


def test_the_report_says_it(run, tmp_path):
    directory, mixed = run
    assert cli.main(["report", str(directory), "-o", str(tmp_path / "report.html")]) == 0
    page = re.sub(r"<[^>]+>", "", (tmp_path / "report.html").read_text())
    assert (f"fake: {SAID}, which answer differently." in page) == mixed
    assert "baseline: 3 episodes" not in page


def test_the_summary_in_wandb_says_it(run):
    directory, mixed = run
    ended = start_mirror(directory).finish(300)
    assert ended.complete, ended
    (fake,), (baseline,) = (offline_runs(directory, arm) for arm in ("fake", "baseline"))
    assert fake.summary.get("machines") == (SAID if mixed else None) and "machines" not in baseline.summary
