"""Risk: a setup that was killed, or started twice at once, says that all is well over an installation with holes.

The real setup.sh and the real pip in a checkout of its own, with a lock of small wheels made here: it takes no
network.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES, FILES = 8, 60
SITE = ".venv/lib/python3*/site-packages"
PROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
BACKEND = """
import zipfile
from pathlib import Path
def build_editable(folder, config_settings=None, metadata_directory=None):
    name, info = "qlibero-0-py3-none-any.whl", "qlibero-0.dist-info/"
    with zipfile.ZipFile(Path(folder, name), "w") as wheel:
        wheel.writestr("qlibero.pth", str(Path("src").absolute()))
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: qlibero\\nVersion: 0\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "entry_points.txt", "[console_scripts]\\nqlibero = qlibero:main\\n")
        wheel.writestr(info + "RECORD", "")
    return name
"""


def content(package: str, number: int) -> str:
    return f"value = '{hashlib.sha256(f'{package}{number}'.encode()).hexdigest() * 40}'\n"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """scripts/ and the shim as they are; a package of one line; a lock of PACKAGES wheels, each of FILES files."""
    top = tmp_path_factory.mktemp("setup")
    here, wheels = top / "check out", top / "wheels"
    (here / "src" / "qlibero" / "sim").mkdir(parents=True)
    wheels.mkdir()
    shutil.copytree(ROOT / "scripts", here / "scripts")
    shutil.copy(ROOT / "qlibero", here)
    shutil.copy(ROOT / "src/qlibero/sim/egl.py", here / "src/qlibero/sim")
    (here / "src/qlibero/__init__.py").write_text("def main():\n    print('it runs')\n")
    (here / "pyproject.toml").write_text(PROJECT)
    (here / "backend.py").write_text(BACKEND)
    names = [f"part{i}" for i in range(PACKAGES)]
    for name in names:
        with zipfile.ZipFile(wheels / f"{name}-1-py3-none-any.whl", "w") as wheel:
            # metadata first, the worst order for whoever is killed between them and the rest
            info = f"{name}-1.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
            wheel.writestr(
                f"{name}-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            files = {f"{name}/m{i}.py": content(name, i) for i in range(FILES)}
            wheel.writestr(
                f"{name}-1.dist-info/RECORD", "".join(f"{file},,{len(text)}\n" for file, text in files.items())
            )
            for file, text in files.items():
                wheel.writestr(file, text)
    (here / "requirements.txt").write_text("".join(f"{name}==1\n" for name in names))
    return here


def clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON", "TORCH_INDEX"))}


def setup(checkout: Path) -> subprocess.Popen[str]:
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(checkout.parent / "wheels")}
    return subprocess.Popen(
        [checkout / "scripts" / "setup.sh", "--login-node"],
        env={**clean(), **offline, "PATH": f"/usr/bin:/bin:{os.environ['PATH']}"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def holes(checkout: Path) -> list[str]:
    """Files of the lock that are not there as their wheels have them; read by us, not by pip's records."""
    (site,) = checkout.glob(SITE)
    wanted = {f"part{p}/m{i}.py": content(f"part{p}", i) for p in range(PACKAGES) for i in range(FILES)}
    return [name for name, text in wanted.items() if not (site / name).is_file() or (site / name).read_text() != text]


def until(seen: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while not seen():
        assert process.poll() is None, "it ended before the moment came"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def made(checkout) -> Path:
    """Set up from nothing by two launchers that start at once, as the first shards of an array do."""
    both = [setup(checkout), setup(checkout)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    waited = [text for text in said if "waiting for another setup of this checkout: process " in text]
    assert len(waited) == 1 and f"on {os.uname().nodename} since" in waited[0], said
    assert sum("creating .venv" in text for text in said) == 1
    return checkout


def test_started_twice_at_once_the_second_waits_and_says_for_what(made) -> None:
    assert holes(made) == []
    quiet = setup(made)
    assert (quiet.wait(60), quiet.stderr.read()) == (0, "")


def test_a_package_with_metadata_and_without_files_is_brought_again(made) -> None:
    (site,) = made.glob(SITE)
    (site / "part3" / "m7.py").write_text("")
    (site / "part4-1.dist-info" / "RECORD").unlink()
    shutil.rmtree(site / "part5")
    # as a pip before 23.1 leaves a package that has a setup.py: installed, without a record of its files
    (site / "part6-1.dist-info").rename(site / "part6-1.egg-info")
    (site / "part6-1.egg-info" / "METADATA").rename(site / "part6-1.egg-info" / "PKG-INFO")
    (made / ".venv" / ".unfinished").write_text("installing\n")
    again = setup(made)
    said = again.communicate(timeout=300)[1]
    assert again.returncode == 0 and "looking at every file" in said
    assert all(f"part{i}-1 is not whole" in said for i in (3, 4, 5)) and "part7-1 is" not in said
    assert holes(made) == []
    assert (site / "part6-1.dist-info" / "RECORD").exists() and not (site / "part6-1.egg-info").exists()


@pytest.mark.parametrize(
    ("moment", "dies"),
    [
        ("creating", "all of it, as a node that loses power"),
        ("unpacking", "all of it, as a node that loses power"),
        ("nearly done", "the script alone, whose pip goes on"),
    ],
)
def test_killed_at_any_moment_and_started_again(made, moment, dies) -> None:
    venv = made / ".venv"
    (made / "requirements.txt").open("a").write(f"# {moment}, {dies}\n")
    if moment == "creating":
        (venv / ".unfinished").write_text("creating\n")
    else:
        shutil.rmtree(next(made.glob(SITE)) / "part0")  # with its metadata: pip believes that it is there
        for info in made.glob(f"{SITE}/part?-1.dist-info"):
            shutil.rmtree(info)
    seen = {
        "creating": lambda: list(made.glob(f"{SITE}/pip/__init__.py")),
        "unpacking": lambda: list(made.glob(f"{SITE}/part1-1.dist-info")),
        "nearly done": lambda: (
            (venv / ".installing-requirements.txt").exists()
            and "# nearly" in (venv / ".installing-requirements.txt").read_text()
            and list(made.glob(f"{SITE}/part{PACKAGES - 1}-1.dist-info/RECORD"))
        ),
    }[moment]
    process = setup(made)
    if moment == "creating":
        until(lambda: not seen(), process)
    until(seen, process)
    os.killpg(process.pid, signal.SIGKILL) if dies.startswith("all") else process.kill()
    process.communicate()
    assert (venv / ".unfinished").read_text() == ("creating\n" if moment == "creating" else "installing\n")
    last = setup(made)
    said = last.communicate(timeout=300)[1]
    assert last.returncode == 0, said
    assert holes(made) == [] and not (venv / ".unfinished").exists()
    ran = subprocess.run([made / "qlibero"], env=clean(), capture_output=True, text=True)
    assert ran.stdout == "it runs\n", ran.stderr


def test_another_system_is_told_what_runs_there(checkout, tmp_path) -> None:
    (tmp_path / "uname").write_text("#!/bin/sh\necho Darwin\n")
    (tmp_path / "uname").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    ran = subprocess.run([checkout / "scripts/setup.sh"], env=clean() | {"PATH": path}, capture_output=True, text=True)
    assert ran.returncode == 1 and "needs Linux, and this is Darwin" in ran.stderr and "container" in ran.stderr
    assert "No such file" not in ran.stderr


def test_a_link_to_another_checkouts_environment_is_left_alone(made, tmp_path) -> None:
    """Installing there would make the other checkout run this one's code."""
    here = tmp_path / "here"
    shutil.copytree(made, here, ignore=shutil.ignore_patterns(".venv*"))
    (here / ".venv").symlink_to(made / ".venv")
    (here / "requirements.txt").open("a").write("# newer\n")
    tried = setup(here)
    said = tried.communicate(timeout=60)[1]
    assert tried.returncode == 1 and f".venv is the environment of {made}" in said
    assert subprocess.run([made / "qlibero"], env=clean(), capture_output=True, text=True).stdout == "it runs\n"
