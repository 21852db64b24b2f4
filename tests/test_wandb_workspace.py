"""Risk: the dashboard shows metrics nobody logs, cannot be saved by the real client, or needs a network to be seen."""

from __future__ import annotations

import json
import re

import pytest
import wandb_endpoint
from test_wandb_mirror import write

from qlibero.cli import main
from qlibero.results.ledger import arms_of, read_arm
from qlibero.tracking.rows import arm_summary, episode_row, versus_baseline


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    for arm in ("baseline", "fake"):
        write(run, arm, range(12))
    return run


def dashboard(capfd, *arguments) -> dict:
    assert main(["dashboard", *map(str, arguments)]) == 0
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def test_every_metric_on_the_dashboard_is_logged(run, capfd):
    spec = dashboard(capfd, run, "--offline")["spec"]
    shown = set(
        re.findall(
            r'"((?:summary:)?(?:success|latency_ms|versus_baseline|task/|quality/)[a-z0-9_/]*)"', json.dumps(spec)
        )
    )
    logged: set[str] = set()
    for arm in arms_of(run):
        ledger = read_arm(run, arm)
        logged |= {*arm_summary(ledger), *versus_baseline(run, arm)}
        logged |= {name for record in ledger.records for name in episode_row(record, 1, 1, 1)}
    assert len(shown) > 20
    assert {name.removeprefix("summary:") for name in shown} <= logged
    sections = [section["name"] for section in spec["section"]["panelBankConfig"]["sections"]]
    assert (
        sections[:3] == ["Verdict", "Flips against the baseline", "Latency of a policy call"] and "Videos" in sections
    )


def test_offline_spec_is_the_same_each_time_and_is_what_the_real_client_saves(run, capfd, tmp_path, monkeypatch):
    offline = dashboard(capfd, run, "--offline")
    assert offline == dashboard(capfd, run, "--offline") and not offline["saved"]
    with wandb_endpoint.running() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", wandb_endpoint.KEY)
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
        assert dashboard(capfd, run, "--entity", "lab", "--project", "p")["saved"]
        (view,) = server.views
    from qlibero.reporting.wandb_workspace import _without_ids

    saved = _without_ids(json.loads(view["spec"]))
    names = [section["name"] for section in saved["section"]["panelBankConfig"]["sections"]]
    assert names == [section["name"] for section in offline["spec"]["section"]["panelBankConfig"]["sections"]]
    assert "drill" in view.get("displayName", "") + json.dumps(saved)
