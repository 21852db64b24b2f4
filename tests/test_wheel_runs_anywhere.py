"""Risk: installed without a checkout, qlibero writes among the interpreter's files, or lacks what it came with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.libero

ROOT = Path(__file__).parents[1]
HASH = (
    "from qlibero.config.load import load_experiment; from qlibero.config.config_hash import config_hash; "
    "from qlibero.places import experiment_file; e = load_experiment(experiment_file('llm_w4a8_fake'), environ={}); "
    "print([config_hash(e, arm) for arm in e.arms()])"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The python of a virtual environment that holds the wheel, and sees this environment's other packages."""
    directory = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.check_output(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT).decode()
    for name in filter(None, tracked.split("\0")):  # a build leaves its traces in the source tree: not in ours
        if name.startswith(("src/", "configs/", "examples/")) or "/" not in name:
            (directory / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, directory / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    quiet = {"check": True, "capture_output": True, "text": True}
    build = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(directory)]
    subprocess.run([*build, str(directory / "source")], **quiet)
    shutil.rmtree(directory / "source")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory / "venv")], **quiet)
    python = directory / "venv" / "bin" / "python"
    (wheel,) = directory.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], **quiet)
    (site,) = (directory / "venv").glob("lib/python3*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def files(directory: Path) -> dict[str, int]:
    """Every file with its time of change, but for the interpreter's own compiled modules."""
    found = (path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path): path.stat().st_mtime_ns for path in found}


def call(python: Path, cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "QLIBERO_HOME")}
    return subprocess.run(
        [str(python), *arguments], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=400
    )


def answer(finished: subprocess.CompletedProcess[str]) -> dict:
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


def test_a_wheel_lists_its_experiments_and_gives_them_the_checkouts_hashes(installed, tmp_path):
    rows = answer(call(installed, tmp_path, "-m", "qlibero", "ls", "experiments"))["experiments"]
    names = {path.stem for folder in ("experiments", "sweeps") for path in (ROOT / "configs" / folder).glob("*.yaml")}
    assert {row["experiment"] for row in rows} == names
    assert all(Path(row["file"]).is_file() and "episodes" in row for row in rows), rows
    policies = {
        row["policy"]: row for row in answer(call(installed, tmp_path, "-m", "qlibero", "ls", "policies"))["policies"]
    }
    assert policies["embedded"]["here"]
    there = call(installed, tmp_path, "-c", HASH)
    here = call(Path(sys.executable), tmp_path, "-c", HASH, PYTHONPATH=str(ROOT / "src"))
    assert there.stdout == here.stdout and there.stdout.count("'") == 4, (there.stderr, here.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_runs_an_experiment_by_name_below_the_current_directory(installed, tmp_path):
    before = files(installed.parents[1])
    sets = [
        "tasks=[0]",
        "episodes_per_task=1",
        "max_steps=10",
        "videos=0",
        "tracking=[]",
        "backends=[baseline]",
        "workers=1",
    ]
    sets = ["--set=name=first", *(f"--set={text}" for text in sets)]
    qlibero = str(installed.parent / "qlibero")
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "QLIBERO_HOME")}
    command = [qlibero, "run", "llm_w4a8_fake", *sets]
    found = answer(subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=500))
    assert found["complete"] and Path(found["run_dir"]).parent == tmp_path.resolve() / "logs"
    assert files(installed.parents[1]) == before
    assert json.loads((Path(found["run_dir"]) / "environment.json").read_text())["git"] == {}


def test_qlibero_home_moves_the_runs_and_nothing_else(installed, tmp_path):
    home = tmp_path / "big disk"
    plan = call(installed, tmp_path, "-m", "qlibero", "plan", "baseline", "--set=name=x", QLIBERO_HOME=str(home))
    assert answer(plan)["directory"].startswith(f"{home}/logs/x")
    ours = {"QLIBERO_HOME": str(home), "PYTHONPATH": str(ROOT / "src")}
    plan = call(Path(sys.executable), tmp_path, "-m", "qlibero", "plan", "baseline", **ours)
    assert answer(plan)["directory"].startswith(f"{home}/logs/")


@pytest.mark.parametrize("way", [["-m", "qlibero"], ["-m", "qlibero.cli"]], ids=lambda way: way[-1])
def test_module_and_command_are_one_program(way, tmp_path):
    said = call(Path(sys.executable), tmp_path, *way, "--version", PYTHONPATH=str(ROOT / "src"))
    assert (said.returncode, said.stdout) == (0, "qlibero 0.1.0\n")
    wrong = call(Path(sys.executable), tmp_path, *way, "run", "llm_w4a8_fak", PYTHONPATH=str(ROOT / "src"))
    assert wrong.returncode == 2 and "did you mean llm_w4a8_fake?" in wrong.stderr
