"""Risk: a WANDB_* variable that somebody relies on is ignored without a word, or sends data that the file does not."""

from __future__ import annotations

import subprocess
import sys

import pytest
from test_wandb_mirror import write

from qlibero.config.schema import Tracking
from qlibero.tracking.mirror import start_mirrors
from qlibero.tracking.wandb_environment import TAKEN, apply


@pytest.mark.parametrize("variable", TAKEN)
def test_every_variable_is_honoured_or_named(variable: str) -> None:
    tracking, notes = apply(Tracking(), {variable: "true" if variable == "WANDB_DISABLED" else "online"})
    assert tracking != Tracking() or any(note.startswith(f"{variable} is not used: ") for note in notes)
    assert notes


def test_variables_fill_what_the_file_leaves_open() -> None:
    environ = {"WANDB_TAGS": "nightly, w4", "WANDB_RUN_GROUP": "paper", "WANDB_NOTES": "a\nb", "WANDB_ENTITY": "lab"}
    found, _ = apply(Tracking(), environ)
    assert (found.tags, found.group, found.notes, found.entity) == (("nightly", "w4"), "paper", "a\nb", "lab")
    kept, notes = apply(Tracking(group="mine", tags=("x",)), environ)
    assert (kept.group, kept.tags) == ("mine", ("x",))
    assert "WANDB_RUN_GROUP is not used: the experiment sets tracking.group" in notes


@pytest.mark.parametrize(
    ("mode", "variable", "mirrors", "then"),
    [
        ("offline", "online", 1, "offline"),
        ("online", "offline", 1, "offline"),
        ("online", "dryrun", 1, "offline"),
        ("online", "disabled", 0, "online"),
        ("offline", "disabled", 0, "offline"),
        ("offline", "nonsense", 1, "offline"),
    ],
)
def test_a_variable_only_makes_a_run_more_careful(mode: str, variable: str, mirrors: int, then: str) -> None:
    found, notes = apply(Tracking(mode=mode), {"WANDB_MODE": variable})
    assert (len(found.trackers), found.mode) == (mirrors, then) and "WANDB_MODE" in notes[0]


def test_a_variable_that_its_key_refuses_stops_no_run(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "a/b")
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: seen.extend(command))
    seen: list[str] = []
    start_mirrors(tmp_path, Tracking(tags=("x y",), notes="two\nlines"))
    assert "the WANDB_* variables are not used" in caplog.text
    assert seen[0] == sys.executable and "--tag=x y" in seen and "--notes=two\nlines" in seen
    assert seen[seen.index("--project") + 1] == "qlibero"


def test_what_was_asked_for_stands_in_the_run(tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    write(run, "baseline", range(2))
    monkeypatch.setenv("WANDB_RUN_GROUP", "paper-2026")
    monkeypatch.setenv("WANDB_NAME", "not-this-name")
    (mirror,) = start_mirrors(
        run, Tracking(tags=("nightly-tag",), notes="what is new", job_type="ablation-job")
    ).mirrors
    assert mirror.finish(120.0).complete
    (stored,) = (run / "baseline" / "wandb").glob("offline-run-*/*.wandb")
    content = stored.read_bytes()
    for text in ("nightly-tag", "paper-2026", "what is new", "ablation-job"):
        assert text.encode() in content, text
    assert b"not-this-name" not in content
