"""Risk: a planted link, a shared directory or a read-only disk turns what qlibero writes into something else."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from qlibero import cache, files
from qlibero.errors import WorkFailed


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o027, 0o640)])
def test_the_umask_is_respected_also_where_a_library_writes(tmp_path, umask, mode):
    """Artifacts and videos go through `beside` and `settle`, everything else through `replace`."""
    before = os.umask(umask)
    try:
        files.replace(tmp_path / "text", "x")
        temporary = files.beside(tmp_path / "artifact")
        temporary.write_bytes(b"y")
        files.settle(temporary, tmp_path / "artifact")
    finally:
        os.umask(before)
    for name in ("text", "artifact"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode
    assert sorted(os.listdir(tmp_path)) == ["artifact", "text"]


@pytest.mark.parametrize("name", ["report.html", "experiment.yaml", "wandb-mirror.json"])
def test_a_planted_link_is_replaced_and_its_target_left_alone(tmp_path, name):
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    (tmp_path / name).symlink_to(victim)
    files.replace(tmp_path / name, "ours")
    assert victim.read_text() == "precious" and not (tmp_path / name).is_symlink()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    files.replace(tmp_path / "dangling", "ours")
    assert not (tmp_path / "nowhere").exists()


def test_a_directory_or_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "directory")
    for name in ("fifo", "directory", "link"):
        with pytest.raises(WorkFailed, match="a directory or a device"):
            files.replace(tmp_path / name, "x")
    assert sorted(os.listdir(tmp_path)) == ["directory", "fifo", "link"]


def chosen(tmp_path, **environment) -> tuple[str, str]:
    """The cache's directory in a fresh process, and what it said on stderr, its child included."""
    code = (
        "import os, subprocess, sys; from qlibero.cache import cache_directory\n"
        "print(cache_directory('kernels'), cache_directory('content'))\n"
        "sys.exit(subprocess.call([sys.executable, '-c', 'from qlibero.cache import *; cache_directory(\"x\")']))"
    )
    kept = {key: value for key, value in os.environ.items() if key not in ("QLIBERO_CACHE", "XDG_CACHE_HOME", "HOME")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "TMPDIR": str(tmp_path / "tmp"), "HOME": str(tmp_path / "home"), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_one_rule_for_the_cache(tmp_path):
    (tmp_path / "tmp").mkdir()
    assert chosen(tmp_path)[0].split()[0] == str(tmp_path / "home/.cache/qlibero/kernels")
    xdg = {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
    assert chosen(tmp_path, **xdg)[0].split()[1] == str(tmp_path / "xdg/qlibero/content")
    ours = {"QLIBERO_CACHE": str(tmp_path / "ours")}
    assert chosen(tmp_path, **xdg, **ours) == (f"{tmp_path}/ours/kernels {tmp_path}/ours/content", "")


@pytest.mark.parametrize("unwritable", ["/proc/nowhere", "a file"])
def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one_and_said_once(tmp_path, unwritable):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "a file").write_text("x")
    found, said = chosen(tmp_path, QLIBERO_CACHE=str(tmp_path / unwritable))
    assert found.split() == [str(tmp_path / f"tmp/qlibero-{os.getuid()}" / part) for part in ("kernels", "content")]
    assert said.count("the cache cannot be written") == 1
    assert stat.S_IMODE((tmp_path / f"tmp/qlibero-{os.getuid()}").stat().st_mode) == 0o700


def test_a_planted_temporary_directory_is_passed_over(tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "planted").mkdir()
    (tmp_path / f"tmp/qlibero-{os.getuid()}").symlink_to(tmp_path / "planted")
    found, _ = chosen(tmp_path, QLIBERO_CACHE="/proc/nowhere")
    assert "/tmp/qlibero-" in found and not any((tmp_path / "planted").iterdir())


def test_what_cannot_be_kept_costs_nothing_else():
    cache.keep(cache.Path("/proc/nowhere/x"), "y")


@pytest.mark.skipif(os.getuid() != 0, reason="needs a mount of its own")
def test_artifacts_go_where_it_can_be_written_and_are_found_there(tmp_path):
    """As in a container: the place of all runs is a read-only mount; beside the run is next, then the cache."""
    (tmp_path / "checkout").mkdir()
    code = (
        "from pathlib import Path; from qlibero.quant import prepare; import sys\n"
        "prepare.ARTIFACTS = Path(sys.argv[1]) / 'checkout' / 'artifacts'\n"
        "for run in (Path(sys.argv[1]) / 'out' / 'run', Path(sys.argv[1]) / 'checkout' / 'run'):\n"
        "    places = prepare.artifact_places(run); print(prepare._first_writable(places))\n"
        "    found = places[-1] / 'key' / prepare.FILE\n"
        "    found.parent.mkdir(parents=True, exist_ok=True); found.touch()\n"
        "    assert prepare._found('key', places) == found\n"
    )
    mount = f"mount --bind {tmp_path}/checkout {tmp_path}/checkout && mount -o remount,ro,bind {tmp_path}/checkout"
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", f'{mount} && exec "$@"', "-", sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "QLIBERO_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("no mounts here")
    assert done.stdout.split() == [str(tmp_path / "out/artifacts"), str(tmp_path / "cache/artifacts")], done.stderr
