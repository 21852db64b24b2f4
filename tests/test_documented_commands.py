"""Risk: a command of README or docs does not exist, or not in the shell that a newcomer has.

Every command line of a code block is taken from the text and run in a fresh shell: the system's PATH, no variable of
this process, at the top of a checkout that was set up, after the activation line that its page shows. The rule, whose
outcome is part of each test's name:

- what only looks (`plan`, `config show`, `ls`, and `status`, `compare`, `report`, `dashboard --offline` on small runs
  that lie where the page has them) runs as written;
- what submits (`sweep`, sweep_slurm.sh) runs with --dry-run;
- what takes episodes, a GPU, a checkpoint, an account or forever runs as --help, which must know every flag of the
  line. A checkout's doctor, its first run and its tests are among them.

YAML blocks that name their file in their first line are written there, so that commands find what their page defined.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from synthetic_run import make_run

from qlibero.config.sweep import load_sweep
from qlibero.launch.cells import make_manifest, write_manifest
from qlibero.places import COMMAND

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"(?:\w+=\S+ )*(?:\./\S+|scripts/\S+|containers/\S+|qlibero|python|pip|wandb|trackio|git) ?")
ACTIVATE = "source .venv/bin/activate"
LOOKS = ("plan", "config show", "ls", "status", "compare", "report", "dashboard")
AS_WRITTEN, DRY, HELP = "as written", "--dry-run", "--help"


@dataclass(frozen=True)
class Line:
    page: str
    number: int
    text: str


def blocks(page: Path) -> list[tuple[str, list[tuple[int, str]]]]:
    """(language, numbered lines) of each fenced or indented code block."""
    found: list[tuple[str, list[tuple[int, str]]]] = []
    fenced = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
            if fenced:
                found.append((line[3:], []))
        elif fenced:
            found[-1][1].append((number, line))
        elif line.startswith("    ") and not line.lstrip().startswith(("-", "*")):
            found.append(("", [(number, line.strip())]))
    return found


def commands() -> list[Line]:
    return [
        Line(page.name, number, text.partition("  #")[0].strip())
        for page in PAGES
        for language, lines in blocks(page)
        if language in ("", "sh", "bash")
        for number, text in lines
        if PROGRAM.match(text) and not re.match(r"\S+/ |wandb {2}|report {2}", text)
    ]


COMMANDS = commands()


@pytest.fixture(scope="module")
def top(tmp_path_factory) -> Path:
    """A checkout of its own that was set up, with the files and small runs that the pages define.

    The environment that the tests run in is not theirs to change: this one has links to its packages, scripts of its
    own, and stamps that leave setup.sh nothing to do.
    """
    top = tmp_path_factory.mktemp("top")
    for entry in ROOT.iterdir():
        if entry.name in ("src", "scripts", "configs"):
            shutil.copytree(entry, top / entry.name)
        elif entry.is_file():
            shutil.copy(entry, top)
        elif entry.name not in (".git", ".venv", "logs"):
            (top / entry.name).symlink_to(entry)
    venv, (site,) = top / ".venv", (ROOT / ".venv").glob("lib/python3*/site-packages")
    for made in (venv / "bin", venv / site.relative_to(ROOT / ".venv")):
        made.mkdir(parents=True)
    for package in site.iterdir():
        (venv / package.relative_to(ROOT / ".venv")).symlink_to(package)
    for own in venv.glob("lib/python3*/site-packages/*qlibero*.pth"):
        own.unlink()
        own.write_text(f"{top / 'src'}\n")
    made_at = (ROOT / ".venv/bin/qlibero").read_text().splitlines()[0].removeprefix("#!").partition("/bin/")[0]
    for program in (ROOT / ".venv" / "bin").iterdir():
        if program.is_symlink():
            (venv / "bin" / program.name).symlink_to(program.readlink())
        elif program.name == "activate" or program.read_bytes().startswith(b"#!"):
            shutil.copy(program, venv / "bin" / program.name).write_text(
                program.read_text().replace(made_at, str(venv))
            )
    shutil.copy(ROOT / ".venv/pyvenv.cfg", venv)
    for lock in ("requirements.txt", "requirements-test.txt"):
        shutil.copy(ROOT / lock, venv / f".installed-{lock}")
    shutil.copy(ROOT / "pyproject.toml", venv / ".installed-qlibero")
    for page in PAGES:
        for language, lines in blocks(page):
            named = re.match(r"# (configs/\S+\.yaml)", lines[0][1]) if language == "yaml" and lines else None
            if named and not (top / named[1]).exists():
                (top / named[1]).write_text("\n".join(line for _, line in lines) + "\n")
    write_manifest(make_manifest(load_sweep(top / "configs/sweeps/overnight.yaml"), top / "logs/overnight"))
    run = make_run(top / "logs/mine_w4a8", {"baseline": 0.0, "w4a8": 0.05})
    for other in ("llm_w4a8_fake", "methods_and_layouts/CELL", "overnight/CELL"):
        (top / "logs" / other).parent.mkdir(exist_ok=True)
        (top / "logs" / other).symlink_to(run)
    return top


def fresh(top: Path, command: str) -> subprocess.CompletedProcess[str]:
    kept = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=top,
        env={**kept, "PATH": "/usr/local/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


def split(text: str) -> tuple[list[str], list[str]]:
    """(words up to the first that is no program or subcommand, the flags of the rest)."""
    words = shlex.split(text.replace("<cell>", "CELL"))
    assignments = [word for word in words if re.match(r"[A-Z_]+=", word)]
    words = words[len(assignments) :]
    head = 1
    if words[0] in ("python", "./.venv/bin/python"):
        head = 3 if words[1] == "-m" else 2
    elif Path(words[0]).name in ("qlibero", "wandb", "trackio", "git", "pip"):
        head = 3 if words[1] in ("config", "kernels", "checkpoint", "ls") and words[1] != "ls" else 2
    return words[:head], [word.partition("=")[0] for word in words[head:] if word.startswith("-")]


@cache
def help_of(top: Path, head: str, activate: bool) -> str:
    done = fresh(top, f"{ACTIVATE} && {head} --help" if activate else f"{head} --help")
    assert done.returncode == 0, f"{head} --help: {done.stderr[-2000:]}"
    return done.stdout + done.stderr


def test_there_are_commands_and_the_first_page_says_how_to_call_them() -> None:
    assert len(COMMANDS) > 30 and {line.page for line in COMMANDS} >= {"README.md", "clusters.md", "checkpoints.md"}
    assert "`./qlibero`" in (ROOT / "docs/quantization.md").read_text() and ACTIVATE in (ROOT / "README.md").read_text()


def way(line: Line) -> str:
    head, flags = split(line.text)
    what = " ".join(head[1:])
    if head[0].endswith("sweep_slurm.sh") or what == "sweep":
        return DRY
    looks = what.startswith(LOOKS) and not {"--calibrate", "--follow"} & set(flags)
    return AS_WRITTEN if looks and (what != "dashboard" or "--offline" in flags) else HELP


@cache
def done(top: Path, command: str) -> subprocess.CompletedProcess[str]:
    return fresh(top, command)


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: f"{line.page}:{line.number} {way(line)}")
def test_it_runs_from_a_fresh_shell(line: Line, top: Path) -> None:
    head, flags = split(line.text)
    bare = head[0] in ("qlibero", "python", "wandb", "trackio", "pip")
    if bare:
        assert ACTIVATE in (ROOT / ("." if line.page == "README.md" else "docs") / line.page).read_text()
    if way(line) == HELP:
        text = help_of(top, " ".join(map(shlex.quote, head)), bare)
        unknown = [flag for flag in flags if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text)]
        assert unknown == [], text
        return
    command = " ".join(line.text.replace("<cell>", "CELL").removesuffix(" --dry-run").split())
    ran = done(top, (f"{ACTIVATE} && " if bare else "") + command + (" --dry-run" if way(line) == DRY else ""))
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.parametrize("place", ["the top", "elsewhere", "activated"])
def test_a_hint_can_be_pasted_where_it_was_printed(place: str, top: Path, tmp_path: Path) -> None:
    """`run` of a sweep names two commands; both run where the message appeared, whatever the shell knows."""
    at = tmp_path if place == "elsewhere" else top
    before = f"cd {shlex.quote(str(top))} && {ACTIVATE} && " if place == "activated" else ""
    sweep = shlex.quote(str(top / "configs/sweeps/methods_and_layouts.yaml"))
    own = shlex.quote(str(top / "qlibero"))
    refused = fresh(at, f"{before}{'qlibero' if before else own} run {sweep}")
    hints = re.findall(r"`([^`]* (?:sweep|plan))`", refused.stderr)
    assert refused.returncode == 2 and len(hints) == 2, refused.stderr
    called = {"the top": "./qlibero", "elsewhere": own, "activated": "qlibero"}[place]
    assert [hint.rpartition(" ")[0] for hint in hints] == [called] * 2
    pasted = fresh(at, f"{before}{hints[0]} --help && {hints[1]} --help")
    assert pasted.returncode == 0 and pasted.stdout.startswith("usage: qlibero"), pasted.stderr


def test_words_in_the_text_name_subcommands_that_exist(top: Path) -> None:
    known = set(re.findall(r"^    ([a-z-]+)\b", help_of(top, "qlibero", True), re.M))
    assert {name for name in known if not COMMAND.match(f"qlibero {name} X")} == set()  # each can be pasted from a hint
    said = {
        (page.name, word)
        for page in PAGES
        for word in re.findall(r"`(?:\./)?qlibero ([a-z][a-z-]+)\b", page.read_text())
    }
    assert {word for _, word in said} - known == set(), said
    assert len(said) > 10
