"""Risk: a tracker's mirror dies during a run and nobody hears of it until the dashboard is missing a night."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace

import pytest

from qlibero import cli
from qlibero.config.schema import Tracking
from qlibero.tracking import mirror
from qlibero.tracking.mirror import MirrorEnd

WELL = MirrorEnd("wandb", complete=True, mode="offline", rows={}, problem=None, again="python -m x DIR")


def test_a_run_whose_mirror_fails_says_so_with_the_command_that_mends_it_and_succeeds(
    tiny_experiment, tmp_path, monkeypatch, capfd
):
    real = subprocess.Popen
    # the mirror process ends at once, as with a broken wandb
    monkeypatch.setattr(
        mirror.subprocess,
        "Popen",
        lambda command, **k: real(["false"] if "qlibero.tracking.wandb_mirror" in command else command, **k),
    )
    sets = (
        "tasks=[0]",
        "episodes_per_task=1",
        "max_steps=5",
        "backends=[baseline]",
        "quant=null",
        "workers=1",
        "tracking={mode: offline, entity: my-team}",
    )
    assert (
        cli.main(
            ["run", str(tiny_experiment), "--out", str(tmp_path), *(text for each in sets for text in ("--set", each))]
        )
        == 0
    )
    out, err = capfd.readouterr()
    (said,) = json.loads(out)["mirrors"]
    assert said["tracker"] == "wandb" and not said["complete"] and "ended with status 1" in said["problem"]
    command = shlex.split(said["again"])
    assert command[1:4] == ["-m", "qlibero.tracking.wandb_mirror", str(tmp_path)]
    assert command[-3:] == ["--entity", "my-team", "--job-type=eval"]
    said_plainly = "".join(err.split())
    assert "".join(said["again"].split()) in said_plainly and "theledgerhaseverything" in said_plainly


@pytest.mark.parametrize(
    ("said", "mode", "words"),
    [
        (WELL, "offline", None),
        (WELL, "online", "went on offline"),
        (
            replace(WELL, complete=False, problem="did not end within 60 s and was stopped"),
            "offline",
            "python -m x DIR",
        ),
    ],
)
def test_what_is_said_of_a_mirror(said, mode, words):
    found = said.told(Tracking(mode=mode))
    assert found is None if words is None else words in found
