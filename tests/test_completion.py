"""Risk: Tab in a shell completes to what does not exist, prints something else, or nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def complete(line: str, directory) -> list[str]:
    """What a shell is offered at the end of `line`, by the protocol of register-python-argcomplete."""
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(directory / "offered"),
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SHELL": "bash",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    done = subprocess.run(
        [sys.executable, "-m", "qlibero"], env=environment, cwd=directory, capture_output=True, text=True
    )
    assert done.stdout == "" and done.returncode == 0, done.stderr
    return [word.strip() for word in (directory / "offered").read_text().split("\n")]


@pytest.mark.parametrize(
    ("line", "offered", "never"),
    [
        ("qlibero ", ["run", "open", "videos", "film", "status"], ["runn"]),
        ("qlibero st", ["status"], ["run"]),
        ("qlibero videos run --a", ["--arm"], ["--task"]),
        ("qlibero ls ", ["suites", "artifacts"], []),
        ("qlibero sweep baseline --engine s", ["slurm"], ["ray"]),
        ("qlibero run base", ["baseline"], []),
        ("qlibero run mi", ["mine.yaml"], ["mine.txt"]),
    ],
)  # fmt: skip
def test_what_there_is_is_offered(line, offered, never, tmp_path):
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "mine.txt").write_text("")
    found = complete(line, tmp_path)
    assert set(offered) <= set(found) and not set(never) & set(found), found
