"""Risk: a policy evaluated through a server gives other episodes than the same policy in this process. Real LIBERO."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

SMALL = ["--set", "tasks=[0]", "--set", "episodes_per_task=2", "--set", "workers=1"]


def cli(*arguments: object, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "qlibero.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(config: Path, out: Path, *arguments: str) -> dict[str, list[tuple]]:
    """Run an experiment; (key, fingerprint, action digest, outcome) of every episode of every arm."""
    process = cli("run", config, "--out", out, *arguments)
    stdout, stderr = process.communicate(timeout=500)
    assert process.returncode == 0, stderr[-3000:]
    assert json.loads(stdout.splitlines()[-1])["complete"]
    fields = ("suite", "task", "init", "seed", "fingerprint", "action_digest", "outcome", "steps")
    return {
        arm.name: sorted(
            tuple(json.loads(line)[f] for f in fields)
            for file in arm.glob("episodes-*.jsonl")
            for line in file.read_text().splitlines()
        )
        for arm in out.iterdir()
        if arm.is_dir() and any(arm.glob("episodes-*"))
    }


def test_a_served_quantized_policy_gives_the_same_episodes(tiny_experiment: Path, tmp_path: Path):
    here = run(tiny_experiment, tmp_path / "here", *SMALL, "--set", "backends=[fake]")
    ready = tmp_path / "ready.json"
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "qlibero.cli",
                "serve",
                str(tiny_experiment),
                "--arm",
                "fake",
                "--port",
                "0",
                "--ready-file",
                str(ready),
                "--set",
                "backends=[fake]",
            ],
            stdout=log,
            stderr=log,
            env=os.environ,
        )
        try:
            deadline = time.monotonic() + 240
            while not ready.exists():
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()[
                    -3000:
                ]
                time.sleep(0.2)
            settings = yaml.safe_load(tiny_experiment.read_text())
            settings["policy"] = {
                "type": "remote",
                "url": f"ws://127.0.0.1:{json.loads(ready.read_text())['port']}",
            }
            settings |= {"backends": ["baseline"], "tasks": [0], "episodes_per_task": 2, "workers": 1}
            settings.pop("quant")
            config = tmp_path / "remote.yaml"
            config.write_text(yaml.safe_dump(settings))
            there = run(config, tmp_path / "there")
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
    assert there["baseline"] == here["fake"] and len(here["fake"]) == 2
    assert not ready.exists()
    meta = json.loads((tmp_path / "there" / "baseline" / "meta.json").read_text())
    assert meta["policy"]["guarantees"]["noise"] and not meta["policy"]["guarantees"]["kernel_attestation"]
