"""Risk: a recipe of docs/configuration.md does not run as it stands there. Small policies, real simulators, servers."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pi05_small import STATISTICS, conv_config, random_model

from qlibero import cli
from qlibero.policies.pi05.checkpoint import write_checkpoint
from qlibero.policies.pi05.tokenizer import WordTokenizer, split_words
from qlibero.sim.suites import task_language

pytestmark = [pytest.mark.libero, pytest.mark.slow]

PAGE = Path(__file__).parents[1] / "docs/configuration.md"
SHORT = ("tasks=[0]", "episodes_per_task=1", "max_steps=10", "workers=1", "videos=0", "tracking.mode=disabled")


def recipes() -> dict[str, str]:
    """The YAML of each recipe by the name of its file, as it stands on the page."""
    section = PAGE.read_text().partition("## Recipes\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```yaml\n(# configs/experiments/(\w+)\.yaml\n.*?)```", section, re.DOTALL)
    return {name: text for text, name in blocks}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, calibration_file) -> Path:
    """configs/ and my/checkpoint as the recipes expect them, of small networks."""
    root = tmp_path_factory.mktemp("checkout")
    words = WordTokenizer(sorted(set(split_words(task_language("libero_object", 0)))))
    for seed, place in enumerate(("embedded", "my/checkpoint")):
        model = random_model(conv_config(), seed)
        write_checkpoint(root / place, model, name=f"s{seed}", statistics=STATISTICS, tokenizer=words.to_json())
    for name, content in {
        "policies/embedded": {"policy": {"type": "pi05", "checkpoint": "../../embedded"}},
        "quant/duquant_w4a8": {
            "quant": {"layout": "llm", "block_size": 16, "calibration": {"path": str(calibration_file), "samples": 4}}
        },
    }.items():
        path = root / f"configs/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    (root / "configs/experiments").mkdir()
    return root


@pytest.fixture
def servers(checkout: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Two policy servers in place of the page's addresses: its address → a real one."""
    plain = checkout / "configs/experiments/plain.yaml"
    plain.write_text("extends: ../policies/embedded.yaml\nsuite: libero_object\ntasks: [0]\narms: [baseline]\n")
    ready = {port: tmp_path / f"{port}.json" for port in (8000, 8001)}
    log = (tmp_path / "servers.log").open("w")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "qlibero", "serve", str(plain), "--port", "0", "--ready-file", str(file)],
            stdout=log,
            stderr=log,
        )
        for file in ready.values()
    ]
    try:
        deadline = time.monotonic() + 240
        while not all(file.exists() for file in ready.values()):
            said = (tmp_path / "servers.log").read_text()[-2000:]
            assert all(server.poll() is None for server in started) and time.monotonic() < deadline, said
            time.sleep(0.2)
        yield {f"127.0.0.1:{port}": f"127.0.0.1:{json.loads(f.read_text())['port']}" for port, f in ready.items()}
    finally:
        for server in started:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        log.close()


def run(checkout: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]) -> dict:
    path = checkout / f"configs/experiments/{name}.yaml"
    path.write_text(text)
    sets = [word for said in SHORT for word in ("--set", said)]
    assert cli.main(["run", str(path), "--out", str(checkout / "logs" / name), *sets]) == 0
    capsys.readouterr()
    assert cli.main(["compare", str(checkout / "logs" / name)]) == 0
    found: dict = json.loads(capsys.readouterr().out.splitlines()[-1])["arms"]
    assert all(arm["pairs"] == 1 for arm in found.values())
    return {arm: list(said["unlike"]) for arm, said in found.items()}


def test_every_recipe_is_run_here():
    assert set(recipes()) == {"finetuned", "steps", "on_time", "servers"}


@pytest.mark.parametrize(
    ("name", "unlike"),
    [
        ("finetuned", {"finetuned": ["weights"]}),
        (
            "steps",
            {f"steps.flow_steps-{n}.backend-{b}": ["flow_steps"] for n in (1, 2, 4) for b in ("baseline", "fake")},
        ),
        ("on_time", {"late": ["latency_steps"], "late-int4": ["latency_steps"]}),
    ],
)
def test_a_recipe_runs_and_says_what_it_compared(name, unlike, checkout, capsys):
    assert run(checkout, name, recipes()[name], capsys) == unlike
    if name == "finetuned":
        arms = [f"{checkout}/logs/finetuned/{arm}" for arm in ("baseline", "finetuned")]
        assert cli.main(["compare", *arms]) == 0
    if name == "steps":
        sets = ("--set", "quant.calibration.samples=4")
        assert cli.main(["probe", str(checkout / "configs/experiments/steps.yaml"), *sets]) == 0


def test_two_servers_are_two_arms(checkout, servers, capsys):
    text = recipes()["servers"]
    for written, real in servers.items():
        assert written in text
        text = text.replace(written, real)
    assert run(checkout, "servers", text, capsys) == {"ours": ["url"]}
