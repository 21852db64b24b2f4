"""Risk: a video costs the night, keeps the verdict waiting, shows another episode than the record's, or is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from synthetic_run import episode

from qlibero.errors import UserError
from qlibero.results.ledger import read_ledger
from qlibero.results.runs import video_path
from qlibero.run.videos import Videos, scratch_path

ARMS = ("baseline", "w4a8")


def record(task: int, init: int, arm: str, outcome: str):
    from dataclasses import replace

    found, _ = episode("libero_object", task, init, arm, False, outcome == "error", 0)
    if outcome == "error":
        return found
    return replace(found, outcome=outcome, success_step=found.steps if outcome == "success" else None)


def ran(videos: Videos, *records) -> None:
    for one in records:
        path = scratch_path(videos.directory, one.arm, one.key)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"{one.arm} {one.key}".encode())
        videos.finished(one)


def kept(run_dir: Path) -> list[str]:
    return sorted(f"{path.parent.parent.name} {path.stem}" for path in run_dir.glob("*/videos/*"))


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("QLIBERO_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def test_flips_are_kept_at_once_others_fill_up_and_scratch_is_left_empty(tmp_path, scratch):
    with Videos(tmp_path, ARMS, 2) as videos:
        for init in range(3):
            ran(videos, *(record(0, init, arm, "success") for arm in ARMS))
        assert kept(tmp_path) == []
        assert len(list(scratch.rglob("*.mp4"))) == 4, "at most so many spare ones as are wanted"
        ran(videos, record(1, 0, "baseline", "success"), record(1, 0, "w4a8", "failure"))
        assert kept(tmp_path) == ["baseline libero_object-1-0-7", "w4a8 libero_object-1-0-7"], "before the run ends"
        videos.fill()
    assert kept(tmp_path) == [f"{arm} libero_object-{at}-7" for arm in ARMS for at in ("0-0", "1-0")]
    text = (tmp_path / "w4a8/videos/libero_object-1-0-7.mp4").read_text()
    assert text == "w4a8 libero_object/1/0/7"
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(("wanted", "expected"), [(0, 0), (1, 2), ("all", 8)])
def test_no_more_than_wanted(tmp_path, scratch, wanted, expected):
    with Videos(tmp_path, ARMS, wanted) as videos:
        if wanted == 0:
            assert videos.directory is None
            videos.finished(record(0, 0, "baseline", "success"))
        else:
            for init in range(4):
                ran(videos, record(0, init, "baseline", "success"), record(0, init, "w4a8", "failure"))
        videos.fill()
        assert videos.lacking() == []
    assert len(kept(tmp_path)) == expected


def test_a_flip_against_an_earlier_call_is_kept_and_its_other_half_is_asked_of_a_replay(tmp_path, scratch):
    earlier = [record(0, init, "baseline", "success") for init in range(2)]
    with Videos(tmp_path, ARMS, 2, earlier) as videos:
        ran(videos, record(0, 0, "w4a8", "failure"), record(0, 1, "w4a8", "success"), record(0, 2, "w4a8", "error"))
        videos.fill()
        assert [(one.arm, one.init) for one in videos.lacking()] == [("baseline", 0)], "flips only are replayed"
    assert kept(tmp_path) == ["w4a8 libero_object-0-0-7", "w4a8 libero_object-0-1-7"]


def test_scratch_that_cannot_be_written_is_a_wrong_request_and_no_ffmpeg_is_a_word(tmp_path, monkeypatch, said):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLIBERO_SCRATCH", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set QLIBERO_SCRATCH to a directory"), Videos(tmp_path, ARMS, 2):
        pass
    monkeypatch.setenv("PATH", str(tmp_path))
    with Videos(tmp_path, ARMS, 2) as videos:
        assert videos.directory is None
    assert said == ["no videos: there is no ffmpeg on this machine (`qlibero doctor` says how to get it)"]


# ------------------------------------------------------------------------------------------------- real episodes
def qlibero(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "qlibero.cli", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


def frames(path: Path) -> int:
    command = ["ffprobe", "-v", "error", "-count_frames", "-select_streams", "v", "-show_entries",
               "stream=nb_read_frames", "-of", "csv=p=0", str(path)]  # fmt: skip
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().strip(","))


def test_what_is_recorded_is_what_a_replay_shows_and_ctrl_c_keeps_it(tmp_path, scratch, tiny_experiment):
    run_dir = tmp_path / "run"
    process = qlibero("run", tiny_experiment, "--out", run_dir, "--set", "videos=all", "--set", "tasks=[0]")
    until = time.monotonic() + 600
    while len(kept(run_dir)) < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    assert len(list(scratch.iterdir())) == 1, "recorded on the node"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert json.loads(stdout.splitlines()[-1])["error"]["kind"] == "Interrupted"
    assert list(scratch.iterdir()) == []
    assert 3 <= len(kept(run_dir)) < 6, "all was over before Ctrl-C"

    stdout, stderr = qlibero("run", tiny_experiment, "--out", run_dir, "--set", "videos=all",
                             "--set", "tasks=[0]").communicate(timeout=600)  # fmt: skip
    found = {(arm, r.init): r for arm in ("baseline", "fake") for r in read_ledger(run_dir, arm)}
    assert len(found) == 6, stderr
    for said in ("loading the policy", "starting simulators", "physics check"):
        assert said in stderr
    recorded = {at: video_path(run_dir, one).read_bytes() for at, one in found.items()}
    assert all(frames(video_path(run_dir, one)) == one.steps + 1 for one in found.values())

    video_path(run_dir, found["fake", 1]).unlink()
    video_path(run_dir, found["baseline", 2]).unlink()
    process = qlibero("videos", run_dir, "--arm", "fake", "--init", 1)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    (again,) = json.loads(stdout.splitlines()[-1])["videos"]
    assert (
        Path(again) == video_path(run_dir, found["fake", 1]) and not video_path(run_dir, found["baseline", 2]).exists()
    )
    assert Path(again).read_bytes() == recorded["fake", 1], "the replay shows another episode"
