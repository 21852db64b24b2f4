"""Risk: a setup that was killed, or started twice at once, says that all is well over an installation with holes.

The real setup.sh and the real pip in a checkout of its own, with a lock of small wheels made here: it takes no
network.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES, FILES = 20, 60
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


@pytest.fixture
def checkout(tmp_path) -> Path:
    """scripts/ and the shim as they are; a package of one line; a lock of PACKAGES wheels, each of FILES files."""
    here, wheels = tmp_path / "check out", tmp_path / "wheels"
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
    (site,) = checkout.glob(".venv/lib/python3*/site-packages")
    wanted = {f"part{p}/m{i}.py": content(f"part{p}", i) for p in range(PACKAGES) for i in range(FILES)}
    return [name for name, text in wanted.items() if not (site / name).is_file() or (site / name).read_text() != text]


def test_killed_at_any_moment_and_started_again(checkout) -> None:
    moments = random.Random(15)
    began = time.monotonic()
    whole = setup(checkout)
    assert whole.wait(300) == 0, whole.stderr.read()
    takes = time.monotonic() - began
    assert holes(checkout) == []
    reached = set()
    for attempt in range(4):
        if attempt % 2 == 0:
            shutil.rmtree(checkout / ".venv")
        (checkout / "requirements.txt").open("a").write(f"# {attempt}\n")
        process = setup(checkout)
        time.sleep(takes * moments.uniform(0.05, 0.95))
        # all of it, as a node that loses power; or the script alone, whose pip then goes on
        os.killpg(process.pid, signal.SIGKILL) if attempt < 2 else process.kill()
        process.wait()
        mark = checkout / ".venv" / ".unfinished"
        reached.add(mark.read_text().strip() if mark.exists() else "other")
    last = setup(checkout)
    said = last.communicate(timeout=300)[1]
    assert last.returncode == 0, said
    assert reached & {"creating", "installing"}, reached
    assert holes(checkout) == [] and not (checkout / ".venv" / ".unfinished").exists()
    ran = subprocess.run([checkout / "qlibero"], env=clean(), capture_output=True, text=True)
    assert ran.stdout == "it runs\n", ran.stderr


def test_a_package_with_metadata_and_without_files_is_brought_again(checkout) -> None:
    assert setup(checkout).wait(300) == 0
    (site,) = checkout.glob(".venv/lib/python3*/site-packages")
    (site / "part3" / "m7.py").write_text("")
    (site / "part4-1.dist-info" / "RECORD").unlink()
    shutil.rmtree(site / "part5")
    (checkout / ".venv" / ".unfinished").write_text("installing\n")
    again = setup(checkout)
    said = again.communicate(timeout=300)[1]
    assert again.returncode == 0 and "looking at every file" in said
    assert all(f"part{i}-1 is not whole" in said for i in (3, 4, 5)) and "part6-1 is" not in said
    assert holes(checkout) == []


def test_started_twice_at_once_the_second_waits_and_says_for_what(checkout) -> None:
    both = [setup(checkout), setup(checkout)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    waited = [text for text in said if "waiting for another setup of this checkout: process " in text]
    assert len(waited) == 1 and f"on {os.uname().nodename} since" in waited[0], said
    assert sum("creating .venv" in text for text in said) == 1
    assert holes(checkout) == []
    quiet = setup(checkout)
    assert (quiet.wait(60), quiet.stderr.read()) == (0, "")
