"""Risk: a planted link, a shared directory or a read-only disk turns what qlibero writes into something else."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
from pi05_small import STATISTICS, conv_config, random_model

from qlibero import cache, files
from qlibero.errors import GuardRefusal, WorkFailed
from qlibero.launch.ray import _run as ray_task
from qlibero.policies.pi05.checkpoint import write_checkpoint
from qlibero.results.locks import lock
from qlibero.tracking.mirror import Mirror, _spawn
from qlibero.tracking.replay import Order, only_one


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


def mirror_log(path):
    mirror = Mirror("wandb", "qlibero.tracking.wandb_mirror", path.parent, ())
    _spawn(mirror)
    if mirror.problem:
        raise GuardRefusal(mirror.problem)


def mirror_lock(path):
    with only_one(path.parent, "wandb"):
        pass


LASTING = {
    "shard-0.log": lambda path: files.open_log(path).close(),  # of the local engine
    "shard-1.log": lambda path: ray_task(["true"], str(path), "1"),
    "wandb-mirror.log": mirror_log,
    ".wandb-mirror.lock": mirror_lock,
    "order": lambda path: Order(path).append("libero_goal/0/0/7"),
    ".lock-000of001": lambda path: os.close(lock(path.parent, "000of001")),
}


@pytest.mark.parametrize("name", LASTING)
def test_what_stays_and_grows_follows_no_link_and_no_second_name(tmp_path, name):
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    for plant in (lambda path: path.symlink_to(victim), lambda path: path.hardlink_to(victim), os.mkfifo):
        plant(tmp_path / name)
        with pytest.raises(GuardRefusal, match="no plain file of qlibero's; look who put it there"):
            LASTING[name](tmp_path / name)
        (tmp_path / name).unlink()
    assert victim.read_text() == "precious"


def test_a_checkpoint_that_is_written_replaces_a_link_to_somebody_elses(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.write_text("precious")
    (tmp_path / "ck").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / "ck" / name).symlink_to(theirs)
    umask = os.umask(0o027)
    try:
        write_checkpoint(
            tmp_path / "ck", random_model(conv_config()), name="small", statistics=STATISTICS, tokenizer="{}"
        )
    finally:
        os.umask(umask)
    written = [path for path in (tmp_path / "ck").rglob("*") if path.is_file()]
    assert theirs.read_text() == "precious" and len(written) == 4
    assert {stat.S_IMODE(path.lstat().st_mode) for path in written} == {0o640}


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


@pytest.mark.parametrize(
    "kept", [None, "TRITON_CACHE_DIR", "TRITON_HOME"], ids=["nowhere", "where told", "in the home told"]
)
def test_triton_gets_a_place_where_its_own_cannot_be_written(tmp_path, monkeypatch, kept):
    """Or its kernels fail, and others that round otherwise take their place: in one shard of a run, say."""
    (tmp_path / "no home").write_text("x")
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "no home"))
    monkeypatch.setenv("QLIBERO_CACHE", str(tmp_path / "ours"))
    if kept:
        monkeypatch.setenv(kept, str(tmp_path / "theirs"))
    cache.triton_cache()
    expected = {None: "ours/triton", "TRITON_CACHE_DIR": "theirs", "TRITON_HOME": None}[kept]
    assert os.environ.get("TRITON_CACHE_DIR") == (expected and str(tmp_path / expected))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "no home/triton"))
    cache.triton_cache()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "ours/triton")


@pytest.mark.skipif(os.getuid() != 0, reason="needs a mount of its own")
@pytest.mark.parametrize("first", ["", "import numba\n"], ids=["before numba", "after numba"])
def test_a_read_only_installation_without_a_home_compiles(first, tmp_path):
    """Left alone numba says "no locator available": no simulator runs, and no policy with a compiled flow."""
    (tmp_path / "installed").mkdir()
    function = "from numba import njit\n\n\n@njit(cache=True)\ndef plus_one(x):\n    return x + 1\n"
    (tmp_path / "installed/compiled.py").write_text(function)
    code = f"{first}from qlibero.cache import numba_cache\nnumba_cache()\nfrom compiled import plus_one\n"
    code += "print(plus_one(1), plus_one._cache.cache_path)"
    place = tmp_path / "installed"
    mount = f"mount --bind {place} {place} && mount -o remount,ro,bind {place}"
    kept = {key: value for key, value in os.environ.items() if key not in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    paths = os.pathsep.join(filter(None, [str(place), kept.get("PYTHONPATH")]))
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", f'{mount} && exec "$@"', "-", sys.executable, "-c", code],
        env={**kept, "HOME": "/proc/nowhere", "QLIBERO_CACHE": str(tmp_path / "ours"), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no mounts here")
    assert done.stdout.startswith(f"2 {tmp_path}/ours/numba/"), done.stderr
    assert done.stderr.count("numba's cache cannot be written") == 1


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
