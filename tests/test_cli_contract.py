"""Risk: a program that reads qlibero's stdout or exit status gets something else than the design promises."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlibero import cli
from qlibero.cli import outcomes
from qlibero.cli.commands import installation
from qlibero.cli.parser import build_parser
from qlibero.config.load import load_experiment
from qlibero.errors import GuardRefusal, UserError, WorkFailed

pytestmark = pytest.mark.slow

GOOD = "suite: libero_object\npolicy: {type: pi05, checkpoint: weights}\nbackends: [baseline]\n"


def qlibero(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qlibero.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)


def document(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.stdout.count("\n") == 1, f"stdout is one line, not {done.stdout!r}"
    return json.loads(done.stdout)


@pytest.mark.parametrize("what", ["suites", "policies", "backends", "experiments", "plugins"])
def test_ls_tells_people_on_stderr_and_programs_on_stdout(what: str) -> None:
    done = qlibero("ls", what)
    assert done.returncode == 0, done.stderr
    rows = document(done)[what]
    assert rows and all(str(next(iter(row.values()))) in done.stderr for row in rows)


def test_config_show_resolves_and_its_json_is_itself_a_config(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(GOOD)
    done = qlibero("config", "show", "x.yaml", "--set", "seed=11", cwd=tmp_path)
    assert done.returncode == 0 and document(done)["seed"] == 11
    assert "seed: 11" in done.stderr and f"checkpoint: {tmp_path}/weights" in done.stderr
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert document(qlibero("config", "show", "again.yaml", cwd=tmp_path)) == document(done)
    assert document(qlibero("config", "show", "--schema"))["properties"]["suite"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "x.yaml"], "x.yaml:2:22: policy.checkpoint: no such file or directory: weights"),
        (["run", "x.yaml", "--set", "sede=1"], "--set sede=1: sede: unknown key; did you mean seed?"),
        (["run", "s.yaml"], "s.yaml:2:1: grid: makes this a sweep of many experiments; use `qlibero sweep`"),
        (["plan", "s.yaml"], "s.yaml:2:15: seed: should be a whole number (got 'x')"),
        (["sweep", "s.yaml"], "s.yaml:2:15: seed: should be a whole number (got 'x')"),
        (["run", "y.yaml"], "did you mean x.yaml?"),
        (["run"], "the following arguments are required: CONFIG"),
        (["rnu", "x.yaml"], "; did you mean run?"),
        (["run", "x.yaml", "--sett", "seed=1", "--otu", "d"], "did you mean --out?"),
        (["run", "x.yaml", "--otu", "d"], "usage: qlibero run"),
        (["kernels", "chekc"], "did you mean check?"),
        (["run", "x.yaml", "--out", "x.yaml"], "argument --out: 'x.yaml' is there and is no directory"),
        (["sweep", "x.yaml", "--out", "a" * 300], "a part of more than 255 bytes"),
        ([], "say what each costs in success"),
        (["videos", "nowhere", "--task", "3", "--init", "7"], "nowhere: no run directory"),
        (["film", "nowhere"], "nowhere: no run directory"),
        (["ls", "planets"], "invalid choice: 'planets'"),
        (["config", "show"], "name a CONFIG"),
        (["compare", "nowhere"], "nowhere: no such run directory"),
        (
            ["serve", "x.yaml", "--set", "policy.checkpoint=.", "--arm", "fake"],
            "--arm fake: x.yaml has the arms baseline",
        ),
        (["export", "nowhere", "-o", "x.txt"], "ends in neither .csv nor .jsonl nor .parquet"),
    ],
)
def test_a_wrong_request_is_status_2_with_its_cure(tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "x.yaml").write_text(GOOD)
    (tmp_path / "s.yaml").write_text("extends: x.yaml\ngrid: {seed: [x, 1]}\n")
    done = qlibero(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    error = document(done)["error"]
    assert error["exit_status"] == 2 and says in error["message"] and says in done.stderr
    assert "Traceback" not in done.stderr


def test_kernels_check_takes_the_experiment_that_will_run(
    tiny_experiment: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documented command: this policy's layers at this run's token counts, on every kernel or the named one."""
    from qlibero.policies import load_policy
    from qlibero.quant import prepare
    from qlibero.run import arms

    monkeypatch.setattr(prepare, "ARTIFACTS", tmp_path)
    assert cli.main(["kernels", "check", str(tiny_experiment), "--backend", "cpu_int4"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["shapes"] == "tiny" and found["verdicts"]
    experiment = load_experiment(tiny_experiment)
    policy = load_policy(experiment.policy)
    llm = list(policy.token_counts(arms.prompts(experiment))["llm"])
    for verdict in found["verdicts"]:
        assert ".language_model." in verdict["layer"] and verdict["tokens"] == llm and verdict["verdict"] == "pass"
    assert cli.main(["kernels", "check", str(tiny_experiment), "--set", "backends=[baseline]"]) == 2
    assert "nothing is asked of a kernel" in json.loads(capfd.readouterr().out)["error"]["message"]


def test_no_library_can_speak_on_stdout(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def chatty(args: Any) -> dict[str, int]:
        print("from Python")
        os.write(1, b"from C\n")
        subprocess.run(["echo", "from a child"], check=True)
        return {"answer": 42}

    monkeypatch.setattr(installation, "ls", chatty)
    assert cli.main(["ls", "suites"]) == 0
    out, err = capfd.readouterr()
    assert out == '{"answer": 42}\n'
    assert all(words in err for words in ("from Python", "from C", "from a child"))


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (WorkFailed("disk full"), 1),
        (UserError("typo"), 2),
        (GuardRefusal("kernel lies"), 3),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device", "/x"), 1),
        (ZeroDivisionError("defect"), 1),
        (outcomes.Incomplete("errors", {"a": 1}), 1),
    ],
)
def test_each_kind_of_failure_has_its_status(
    raised: BaseException, status: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(args: Any) -> None:
        raise raised

    monkeypatch.setattr(installation, "ls", failing)
    assert cli.main(["ls", "suites"]) == status
    out, err = capfd.readouterr()
    last = json.loads(out)
    assert last == {"a": 1} if isinstance(raised, outcomes.Incomplete) else last["error"]["exit_status"] == status
    assert ("Traceback" in err) == isinstance(raised, OSError | ZeroDivisionError)


def test_sigterm_ends_like_ctrl_c() -> None:
    sleeper = """
import sys, time
from qlibero import cli
from qlibero.cli.commands import installation
from qlibero.config.load import load_experiment

def wait(args):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(300)

installation.ls = wait
print(cli.main(["ls", "suites"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", sleeper], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    first, status = out.splitlines()
    assert json.loads(first)["error"]["exit_status"] == 130 and status == "130"


def test_every_help_reads_well_and_answers_at_once() -> None:
    def pages(*path: str) -> None:
        done = qlibero(*path, "--help")
        assert done.returncode == 0 and done.stdout.startswith(f"usage: qlibero {' '.join(path)}".rstrip()), done.stderr
        parser = parser_of(path)
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction) or action.choices, (
                f"{path}: {action.dest}"
            )

    def parser_of(path: tuple[str, ...]) -> Any:
        parser = build_parser()
        for word in path:
            parser = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices[word]
        return parser

    pages()
    for word, command in next(
        a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)
    ).choices.items():
        if not any(isinstance(a, argparse._SubParsersAction) for a in command._actions):
            assert parser_of((word,)).description, word
    pages("run")
    imported = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, qlibero.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
            "print([m for m in ('torch', 'mujoco', 'numpy', 'scipy', 'pydantic', 'rich', 'wandb') "
            "if m in sys.modules], file=sys.stderr)",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert imported.stderr.strip() == "[]", "`--help` imports only what it needs"
    before = os.times()
    qlibero("--help")
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 0.3, f"--help takes {seconds:.2f} s of processor time"


@pytest.mark.parametrize(("flags", "lines"), [([], 0), (["--json"], 1)])
def test_a_terminal_gets_no_json_unless_it_asks(flags: list[str], lines: int) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "qlibero", "ls", "trackers", *flags]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    try:
        shown = os.read(ours, 1_000_000).decode()
    except OSError:  # how a pseudo-terminal says that nothing was written
        shown = ""
    os.close(ours)
    assert done.returncode == 0 and "wandb" in done.stderr
    assert shown.count("\n") == lines and shown.startswith('{"trackers"' * lines)
