"""Risk: the wandb view loses, doubles or invents a row, or a dead wandb delays an episode. Real client throughout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import wandb_endpoint
import yaml
from wandb_offline import read_offline_run

from qlibero.config.schema import Tracking
from qlibero.results.compare import compare_runs
from qlibero.results.ledger import Ledger, read_ledger, write_meta
from qlibero.results.records import EpisodeRecord
from qlibero.results.summary import summarize_arm
from qlibero.tracking.mirror import children, log_path, read_state, start_mirrors

pytestmark = pytest.mark.slow


def start_mirror(run_dir: Path, mode: str = "offline"):
    (mirror,) = start_mirrors(run_dir, Tracking(mode=mode)).mirrors
    return mirror


def record(arm: str, i: int, outcome: str | None = None) -> EpisodeRecord:
    outcome = outcome or ("success" if i % 3 else "failure")
    finished = outcome != "error"
    return EpisodeRecord(
        suite="libero_object",
        task=i % 10,
        init=i // 10,
        seed=7,
        arm=arm,
        outcome=outcome,
        steps=20 + i if finished else 0,
        replans=3,
        fingerprint="ab" * 32 if finished else "",
        action_digest=f"{i:064x}" if finished else "",
        error=None if finished else "simulator died",
        success_step=20 + i if outcome == "success" else None,
        policy_ms=[10.0 + i, 11.0],
    )


def write(run_dir: Path, arm: str, numbers, outcome: str | None = None) -> None:
    if not (run_dir / "experiment.yaml").exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        experiment = {"name": "drill", "suite": "libero_object", "backends": ["baseline", "fake"], "workers": 2}
        (run_dir / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    with Ledger(run_dir, arm, config_hash="c0ffee") as ledger:
        for i in numbers:
            ledger.append(record(arm, i, outcome), np.zeros((4, 10), np.float32))


def offline_runs(run_dir: Path, arm: str):
    return [read_offline_run(path) for path in sorted((run_dir / arm / "wandb").glob("*run-*/*.wandb"))]


def assert_equal_to_ledger(rows: list[dict], run_dir: Path, arm: str) -> None:
    """Every finished episode exactly once, numbered 1…n, its own outcome and steps beside its key."""
    rows = [row for row in rows if "key" in row]
    truth = {str(r.key): (r.outcome, r.steps) for r in read_ledger(run_dir, arm) if r.outcome != "error"}
    assert sorted(row["key"] for row in rows) == sorted(truth)
    assert [row["episode"] for row in rows] == list(range(1, len(truth) + 1))
    assert {row["key"]: (row["outcome"], row["steps"]) for row in rows} == truth


def wait_until(condition, timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def mirrored(run_dir: Path, arm: str) -> int:
    return read_state(run_dir, "wandb").get("rows", {}).get(arm, 0)


def test_offline_view_equals_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SERVICE", "2-1-tcp-localhost-9")  # of a launcher that uses wandb itself, and is gone
    run = tmp_path / "run"
    write(run, "baseline", range(3))
    write_meta(
        run,
        "baseline",
        {"kernels": {"q_proj": {"kernel": "fake", "reason": "asked for"}, "o_proj": {"kernel": "fake"}}},
    )
    mirror = start_mirror(run)
    wait_until(lambda: mirrored(run, "baseline") == 3)
    write(run, "baseline", [3], outcome="error")
    write(run, "fake", range(4))
    wait_until(lambda: mirrored(run, "fake") == 4)
    assert mirrored(run, "baseline") == 3  # an error is no row yet
    write(run, "baseline", [3])  # it was tried again
    write(run, "baseline", [4], outcome="error")
    video = run / "fake" / "videos" / "libero_object-1-0-7.mp4"
    video.parent.mkdir()
    subprocess.run(f"ffmpeg -v error -f lavfi -i color=red:s=64x64:d=0.2 -pix_fmt yuv420p {video}".split(), check=True)
    said = mirror.finish(300)
    assert said.complete and said.mode == "offline", (said, log_path(run, "wandb").read_text())
    assert said.rows == {"baseline": 4, "fake": 4}
    assert read_state(run, "wandb")["attempt"] == 1

    for arm in ("baseline", "fake"):
        (view,) = offline_runs(run, arm)
        assert view.finished and view.group == "drill" and view.run_id.startswith(arm)
        assert view.config["suite"] == "libero_object" and view.config["arm"] == arm
        assert_equal_to_ledger(view.history, run, arm)
        truth = summarize_arm(read_ledger(run, arm)).to_json()
        assert {n: view.summary[n] for n in ("successes", "episodes", "errors")} == {
            n: truth[n] for n in ("successes", "episodes", "errors")
        }
        assert [view.summary["success_rate_low95"], view.summary["success_rate_high95"]] == pytest.approx(
            truth["wilson95"], abs=1e-6
        )
        assert {p: view.summary[f"latency_ms/{p}"] for p in ("p50", "p95", "p99")} == truth["latency_ms"]
    assert offline_runs(run, "baseline")[0].summary["kernels/fake"] == 2
    verdict = compare_runs([run])["arms"]["fake"]
    seen = offline_runs(run, "fake")[0].summary
    assert (
        [seen[f"versus_baseline/{n}"] for n in ("pairs", "verdict")]
        == [verdict["pairs"], verdict["verdict"]]
        == [4, verdict["verdict"]]
    )
    films = [row for row in offline_runs(run, "fake")[0].history if "rollout/task1/success.path" in row]
    assert len(films) == 1 and films[0]["rollout/task1/success.path"].endswith(".mp4")
    assert list((run / "fake" / "wandb").glob("*/files/media/videos/**/*.mp4"))


def test_equal_x_is_the_same_episode_in_every_arm_and_each_arm_says_what_it_is(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    experiment = {
        "name": "drill",
        "suite": "libero_object",
        "tasks": [0, 1, 2, 3],
        "episodes_per_task": 1,
        "seed": 7,
        "policy": {"type": "pi05", "flow_steps": 10, "replan_steps": 5},
        "quant": {"method": "duquant", "activation_bits": 8},
        "arms": ["baseline", {"name": "w4a4", "backend": "fake", "policy": {"flow_steps": 1}}],
    }
    (run / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    kernels = {f"layer{i}": {"kernel": "fake", "verdict": "pass", "reason": "", "shape": "8x8"} for i in range(200)}
    quant = {"method": "duquant", "layout": "llm", "weight_bits": 4, "activation_bits": 4}
    of_baseline = {"backend": "baseline", "policy": {"type": "pi05", "dtype": "float32", "flow_steps": 10}}
    of_w4a4 = {"backend": "fake", "policy": {"type": "pi05", "flow_steps": 1}, "quant": quant, "kernels": kernels}
    write(run, "baseline", [2, 0])  # as they finished: 1 is still running
    write_meta(run, "baseline", of_baseline)
    mirror = start_mirror(run)
    wait_until(lambda: mirrored(run, "baseline") == 1)
    write(run, "w4a4", [3, 1, 0])
    write_meta(run, "w4a4", of_w4a4)
    write(run, "baseline", [3, 1])
    said = mirror.finish(300)
    assert said.complete, log_path(run, "wandb").read_text()
    views = {arm: offline_runs(run, arm)[0] for arm in ("baseline", "w4a4")}
    places = {arm: {row["episode"]: row["key"] for row in view.history} for arm, view in views.items()}
    keys = [f"libero_object/{task}/0/7" for task in range(4)]
    assert places["baseline"] == dict(zip((1, 2, 3, 4), keys, strict=True))
    assert places["w4a4"] == {1: keys[0], 2: keys[1], 4: keys[3]}
    for view in views.values():
        assert [row["episode"] for row in view.history] == sorted(row["episode"] for row in view.history)
    configs = {arm: view.config for arm, view in views.items()}
    shown = ("backend", "method", "layout", "weight_bits", "activation_bits", "flow_steps", "suite", "seed")
    assert [configs["w4a4"][key] for key in shown] == ["fake", "duquant", "llm", 4, 4, 1, "libero_object", 7]
    assert [configs["baseline"][key] for key in shown] == ["baseline", None, None, None, None, 10, "libero_object", 7]
    assert configs["baseline"].keys() == configs["w4a4"].keys() and len(configs["w4a4"]) < 40
    assert [key for key, value in configs["w4a4"].items() if isinstance(value, dict)] in ([], ["_wandb"])  # its own
    assert views["w4a4"].tags == ["w4a4", "fake", "duquant", "W4A4", "libero_object"] and views["w4a4"].group == "drill"
    assert views["w4a4"].artifacts == {"qlibero-arm": ["experiment.yaml", "kernels.table.json", "meta.json"]}


def test_no_row_lost_or_doubled_when_mirror_or_service_is_killed(tmp_path):
    run = tmp_path / "run"
    write(run, "baseline", range(5))
    mirror = start_mirror(run)
    wait_until(lambda: mirrored(run, "baseline") == 5)
    (service,) = children(mirror.process.pid)
    os.kill(service, signal.SIGKILL)
    write(run, "baseline", range(5, 8))
    wait_until(lambda: mirrored(run, "baseline") == 8)
    assert read_state(run, "wandb")["attempt"] == 2
    (service,) = children(mirror.process.pid)
    mirror.process.kill()
    write(run, "baseline", range(8, 11))
    said = mirror.finish(300)
    assert said.complete, (said, log_path(run, "wandb").read_text())
    (view,) = offline_runs(run, "baseline")
    assert_equal_to_ledger(view.history, run, "baseline")
    wait_until(
        lambda: not Path(f"/proc/{service}/cmdline").exists() or not Path(f"/proc/{service}/cmdline").read_bytes()
    )


def test_episode_whose_record_was_torn_after_it_was_mirrored_gets_its_row_when_it_is_run_again(tmp_path):
    """Power loss takes the last line; the next run's mirror knows the row's place before the ledger has it again."""
    run = tmp_path / "run"
    write(run, "baseline", range(3))
    assert start_mirror(run).finish(300).complete
    (ledger,) = (run / "baseline").glob("episodes-*.jsonl")
    os.truncate(ledger, ledger.stat().st_size - 40)
    mirror = start_mirror(run)
    wait_until(lambda: mirrored(run, "baseline") == 2)
    write(run, "baseline", [2, 3])
    assert mirror.finish(300).rows == {"baseline": 4}
    for _ in range(2):  # as it stands, and when the order that now names the episode twice is replayed from row 0
        (view,) = offline_runs(run, "baseline")
        assert_equal_to_ledger(view.history, run, "baseline")
        assert start_mirror(run).finish(300).complete


def test_mirror_outlives_a_killed_launcher_drains_and_ends(tmp_path):
    run = tmp_path / "run"
    write(run, "fake", range(6))
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from qlibero.tracking.mirror import start_mirrors\n"
            "from qlibero.config.schema import Tracking\n"
            "print(start_mirrors(sys.argv[1], Tracking()).mirrors[0].process.pid, flush=True); time.sleep(600)",
            str(run),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    pid = int(launcher.stdout.readline())
    launcher.kill()  # before the mirror has even imported wandb
    launcher.wait()
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text())
    (view,) = offline_runs(run, "fake")
    assert view.finished
    assert_equal_to_ledger(view.history, run, "fake")
    write(run, "fake", range(6, 9))  # the run is continued: same id, replayed from row 0, one directory
    assert start_mirror(run).finish(300).complete
    (again,) = offline_runs(run, "fake")
    assert again.run_id == view.run_id
    assert_equal_to_ledger(again.history, run, "fake")


def test_online_restart_continues_exactly_and_host_and_key_are_written_nowhere(tmp_path, monkeypatch):
    run = tmp_path / "run"
    write(run, "baseline", range(4))
    with wandb_endpoint.running() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", wandb_endpoint.KEY)
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
        mirror = start_mirror(run, "online")
        wait_until(lambda: any(len(server.rows(run_id)) == 4 for run_id in server.history))
        mirror.process.kill()
        write(run, "baseline", range(4, 7))
        said = mirror.finish(300)
        assert said.complete and said.mode == "online", (said, log_path(run, "wandb").read_text())
        (run_id,) = server.history
        assert_equal_to_ledger(server.rows(run_id), run, "baseline")
        assert server.group[run_id] == "drill"
        assert server.summary[run_id]["episodes"] == 7
        assert "CreateArtifact" in server.requests and "no artifact" not in log_path(run, "wandb").read_text()
    for path in run.rglob("*"):
        if path.is_file():
            written = path.read_bytes()
            assert wandb_endpoint.KEY.encode() not in written and f":{server.server_port}".encode() not in written, path


def test_offline_run_synced_later_equals_the_ledger(tmp_path, monkeypatch):
    run = tmp_path / "run"
    write(run, "baseline", range(3))
    with wandb_endpoint.running() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", wandb_endpoint.KEY)
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
        for more in (range(3, 5), range(5, 6)):  # synced, continued, synced again
            assert start_mirror(run).finish(300).mode == "offline"
            directories = sorted((run / "baseline" / "wandb").glob("offline-run-*"))
            subprocess.run(
                [str(Path(sys.executable).parent / "wandb"), "sync", str(directories[-1])],
                check=True,
                capture_output=True,
                cwd=tmp_path,
            )
            (run_id,) = server.history
            assert_equal_to_ledger(server.rows(run_id), run, "baseline")
            write(run, "baseline", more)


@pytest.mark.parametrize("fault", ["refused", "hanging", "stopped service"])
def test_dead_wandb_is_bounded_and_keeps_every_row(tmp_path, monkeypatch, fault):
    run = tmp_path / "run"
    write(run, "baseline", range(3))
    with wandb_endpoint.running() as server:
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9" if fault == "refused" else server.url)
        monkeypatch.setenv("WANDB_API_KEY", wandb_endpoint.KEY)
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
        started = time.monotonic()
        mirror = start_mirror(run, "online")
        assert time.monotonic() - started < 1.0
        timeout_s = 240.0
        if fault != "refused":
            wait_until(lambda: mirrored(run, "baseline") == 3)
            timeout_s = 5.0
        if fault == "hanging":
            server.hang.set()
        if fault == "stopped service":
            (service,) = children(mirror.process.pid)
            os.kill(service, signal.SIGSTOP)
        write(run, "baseline", range(3, 5))
        pids = [mirror.process.pid, *children(mirror.process.pid)]
        started = time.monotonic()
        said = mirror.finish(timeout_s)
        assert time.monotonic() - started < timeout_s + 2.0
        if fault == "refused":
            assert said.complete and said.mode == "offline", (said, log_path(run, "wandb").read_text())
        else:
            assert not said.complete and "did not end within" in said.problem
            for pid in pids:
                wait_until(
                    lambda pid=pid: not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text()
                )
            assert start_mirror(run).finish(300).complete  # what `again` tells the user to do, offline
    (view,) = offline_runs(run, "baseline")
    assert_equal_to_ledger(view.history, run, "baseline")


def test_directory_that_cannot_be_written_is_named(tmp_path):
    run = tmp_path / "run"
    write(run, "baseline", range(1))
    (run / "baseline" / "wandb").write_text("a file where the directory should be")
    said = start_mirror(run).finish(240)
    assert not said.complete and said.problem
    assert "baseline/wandb cannot be written" in log_path(run, "wandb").read_text()
    assert json.loads((run / "baseline" / "meta.json").read_text())["config_hash"] == "c0ffee"
