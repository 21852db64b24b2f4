"""What several tests need: a tiny real experiment (untrained policy, two LIBERO tasks, a second of simulated time)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# as in a shell with .venv activated, where messages call the command by its bare name
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

import numpy as np
import pytest
import yaml

from qlibero.console import log_to
from qlibero.sim.pool import SimulatorPool

TINY_ARCHITECTURE = {
    "llm": {"width": 64, "depth": 2, "mlp_dim": 128, "head_dim": 16},
    "expert": {"width": 64, "depth": 2, "mlp_dim": 128, "head_dim": 16},
    "vision": {"type": "conv", "channels": [8, 16, 16], "width": 32},
    "vocab_size": 64,
    "action_dim": 7,
    "max_token_len": 24,
    "state_dim": 8,
}


@pytest.fixture
def said():
    """What the package logs from here on, line by line."""
    lines: list[str] = []
    with log_to(lines.append):
        yield lines


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory) -> Path:
    """Eight made-up observations in the format of a calibration file: enough to fit transforms on."""
    from qlibero.policies.base import Observation
    from qlibero.quant.observations import write_demonstrations

    rng = np.random.default_rng(0)
    observations = [
        Observation(
            rng.integers(0, 256, (256, 256, 3), dtype=np.uint8),
            rng.integers(0, 256, (256, 256, 3), dtype=np.uint8),
            rng.standard_normal(8).astype(np.float32),
            "pick up the alphabet soup and place it in the basket",
        )
        for _ in range(8)
    ]
    return write_demonstrations(
        tmp_path_factory.mktemp("calibration") / "calibration.npz", observations, "random, for tests"
    )


@pytest.fixture(scope="session")
def tiny_experiment(tmp_path_factory, calibration_file: Path) -> Path:
    """An experiment of 12 episodes: 2 tasks × 3 initial states × (full precision, fake W4A8 DuQuant), 15 steps each."""
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps({"architecture": TINY_ARCHITECTURE}))
    words = sorted(set("pick up the alphabet soup cream cheese and place it in basket".split()))
    (directory / "tokenizer.json").write_text(json.dumps({"type": "words", "words": words}))
    config = directory / "tiny.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "suite": "libero_object",
                "tasks": [0, 1],
                "episodes_per_task": 3,
                "max_steps": 15,
                "policy": {"type": "pi05", "untrained": {"config": "config.json", "seed": 0}},
                "quant": {
                    "layout": "llm",
                    "block_size": 16,
                    "calibration": {"path": str(calibration_file), "samples": 4},
                },
                "backends": ["baseline", "fake"],
                "videos": 0,
                "tracking": {"mode": "disabled"},
            }
        )
    )
    return config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A tiny experiment is there to be run in real simulators; other tests that start some carry `libero` by hand."""
    for item in items:
        if "tiny_experiment" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.libero)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without the marker no simulator starts in this process, so that the fast tier stays one."""

    def start(pool: SimulatorPool, *args: object, **kwargs: object) -> None:
        assert item.get_closest_marker("libero"), f"{item.nodeid} starts simulators: mark it with pytest.mark.libero"
        _start(pool, *args, **kwargs)

    SimulatorPool.__init__ = start


_start = SimulatorPool.__init__
