"""Risk: what takes minutes is not seen, or start-up and company make every ETA a lie."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from qlibero.activity import doing, heard_by
from qlibero.cli import progress as module
from qlibero.cli.progress import PhaseProgress, RunProgress

SHOW = """
import time
from qlibero.activity import doing
from qlibero.cli.progress import PhaseProgress
with PhaseProgress() as progress:
    doing("loading the policy"); time.sleep(0.3)
    for i in range(3):
        doing("calibrating: input groups [cu13]", i, 3); time.sleep(0.3)
    progress.say("artifact found")
    progress.stop()
    print("THE VERDICT")
    doing("recording videos", 0, 2); time.sleep(0.3)
"""


def in_a_terminal(code: str) -> str:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"}
    )
    os.close(theirs)
    text = b""
    try:
        while piece := os.read(ours, 65536):
            text += piece
    except OSError:
        pass
    assert process.wait(60) == 0, text
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())


def test_every_phase_has_a_live_line_with_its_count_and_eta():
    text = in_a_terminal(SHOW)
    calibrating = "1/3 calibrating: input groups [cu13]"
    said = ("loading the policy", calibrating, "artifact found", "THE VERDICT", "0/2 recording videos")
    order = list(map(text.index, said))
    assert order == sorted(order)
    assert "about 0:00:0" in text


def test_a_log_file_gets_a_line_for_each_phase_and_no_more(capsys, monkeypatch):
    with PhaseProgress():
        doing("loading the policy")
        for index in range(200):
            doing("trying cpu_int4", index, 200)
        doing("physics check")
    assert capsys.readouterr().err.splitlines() == ["loading the policy", "0/200 trying cpu_int4", "physics check"]
    doing("nobody listens")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("workers", "done", "elapsed", "left"),
    [(1, 1, 10, 90), (1, 5, 50, 50), (4, 1, 10, 36), (4, 4, 40, 44), (4, 9, 90, 9)],
)
def test_what_is_left_counts_from_the_first_episode_and_those_in_flight_half(workers, done, elapsed, left, monkeypatch):
    class Run(RunProgress):
        def __init__(self):
            PhaseProgress.__init__(self)
            self.missing, self.in_flight, self.done = 10, 0, 0

    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    run = Run()
    with heard_by(run.doing):
        doing("loading the policy")
        clock[0] += 500  # start-up, which does not come again
        doing("episodes", workers)
        clock[0] += elapsed
    hours, minutes, seconds = map(int, re.search(r"about (\d+):(\d+):(\d+) left", run._eta(done, 10)).groups())
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(left, abs=1)
