"""Risk: an episode lost, doubled or half-written after a kill, a full disk, a torn tail or a foreign directory."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hy

from qlibero.errors import GuardRefusal, UserError, WorkFailed
from qlibero.results import ledger as room
from qlibero.results.declaration import declare, make_declaration
from qlibero.results.ledger import Ledger, read_arm, read_ledger, read_trajectory, write_meta
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import read_run


def record(init: int, outcome: str = "success", digest: str = "cd", task: int = 0) -> EpisodeRecord:
    return EpisodeRecord(
        suite="libero_object",
        task=task,
        init=init,
        seed=7,
        arm="fake",
        outcome=outcome,
        steps=50,
        replans=10,
        success_step=50 if outcome == "success" else None,
        error="worker died" if outcome == "error" else None,
        fingerprint="ab",
        action_digest=digest,
    )


def trajectory(seed: int, steps: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(steps, 10)).astype(np.float32)


def test_what_is_written_is_read_with_its_trajectory(tmp_path):
    with Ledger(tmp_path, "fake", 0, "hash") as ledger:
        written = [ledger.append(record(i), trajectory(i, 10 + i)) for i in range(5)]
        written.append(ledger.append(record(9, "error")))
        assert ledger.done_keys() == {r.key for r in written[:5]}  # an error is to be tried again
    assert read_ledger(tmp_path, "fake") == written
    for i, r in enumerate(written[:5]):
        assert np.array_equal(read_trajectory(tmp_path, r), trajectory(i, 10 + i))
    assert read_trajectory(tmp_path, written[5]) is None
    assert written[0].path_length_m > 0 and written[0].config_hash == "hash"


def test_last_complete_line_wins_and_contradictions_are_named(tmp_path):
    with Ledger(tmp_path, "fake", 0, "h") as first:
        first.append(record(1, "error"))
        first.append(record(2))
        first.append(record(3))
    with Ledger(tmp_path, "fake", 1, "h") as second:  # another shard later: still a later attempt
        assert second.attempt == 2
        second.append(record(1))
        second.append(record(2))
        second.append(record(3, digest="other actions"))
    arm = read_arm(tmp_path, "fake")
    assert [r.outcome for r in arm.records] == ["success"] * 3
    assert arm.repeated == 3 and arm.conflicts == (record(3).key,)


@pytest.mark.parametrize("cut", [1, 5, 40, 200])
def test_torn_tail_is_counted_then_cut_at_the_next_opening(tmp_path, cut):
    with Ledger(tmp_path, "fake", 0, "h") as ledger:
        for i in range(3):
            ledger.append(record(i), trajectory(i))
    path = tmp_path / "fake" / "episodes-0-1.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    arm = read_arm(tmp_path, "fake")
    assert len(arm.records) == 2 and arm.torn == 1
    with Ledger(tmp_path, "fake", 0, "h") as again:
        assert again.torn_recovered == 1
        assert path.read_bytes().endswith(b"}\n")
        again.append(record(2), trajectory(2))
    arm = read_arm(tmp_path, "fake")
    assert len(arm.records) == 3 and arm.torn == 0


def test_zero_pages_after_a_power_loss_are_torn_lines(tmp_path):
    with Ledger(tmp_path, "fake", 0, "h") as ledger:
        ledger.append(record(0))
    with open(tmp_path / "fake" / "episodes-0-1.jsonl", "ab") as file:
        file.write(b"\0" * 100 + b"\n")
    arm = read_arm(tmp_path, "fake")
    assert len(arm.records) == 1 and arm.torn == 1


def test_lost_sidecar_is_none_not_a_crash(tmp_path):
    with Ledger(tmp_path, "fake", 0, "h") as ledger:
        written = ledger.append(record(0), trajectory(0))
    os.truncate(tmp_path / "fake" / "trajectory-0-1.f32", 100)
    assert read_trajectory(tmp_path, written) is None
    os.remove(tmp_path / "fake" / "trajectory-0-1.f32")
    assert read_trajectory(tmp_path, written) is None


def test_directory_of_another_configuration_is_refused(tmp_path):
    Ledger(tmp_path, "fake", 0, "bbbb").close()  # a start that recorded nothing binds nothing
    with Ledger(tmp_path, "fake", 0, "aaaa") as ledger:
        ledger.append(record(0))
    with pytest.raises(GuardRefusal, match="another configuration"):
        Ledger(tmp_path, "fake", 1, "bbbb")
    Ledger(tmp_path, "fake", 0, "aaaa").close()  # the refusal left nothing locked


def test_mixed_lines_are_refused_by_the_reader(tmp_path):
    with Ledger(tmp_path, "fake", 0, "aaaa") as ledger:
        ledger.append(record(0))
    with open(tmp_path / "fake" / "episodes-1-1.jsonl", "w") as file:
        file.write(replace(record(1), config_hash="bbbb").to_json() + "\n")
    with pytest.raises(GuardRefusal, match="episodes-1-1.jsonl:1.*mixed"):
        read_arm(tmp_path, "fake")


def test_two_writers_of_one_shard_are_refused(tmp_path):
    with Ledger(tmp_path, "fake", 0, "h"):
        with pytest.raises(GuardRefusal, match=f"process {os.getpid()}"):
            Ledger(tmp_path, "fake", 0, "h")
        Ledger(tmp_path, "fake", 1, "h").close()


def test_meta_is_merged_and_replaced_whole(tmp_path):
    write_meta(tmp_path, "fake", {"config_hash": "h", "memory": {"weight_bytes": 5}})
    write_meta(tmp_path, "fake", {"artifact": "x"})
    assert read_arm(tmp_path, "fake").meta.model_dump(exclude_unset=True) == {
        "schema": 1,
        "arm": "fake",
        "config_hash": "h",
        "memory": {"weight_bytes": 5},
        "artifact": "x",
    }
    assert sorted(os.listdir(tmp_path / "fake")) == [".lock-meta", "meta.json"]


def test_arms_come_in_the_order_of_the_experiment(tmp_path):
    for arm in ("aa", "baseline", "w4a4"):
        with Ledger(tmp_path, arm, 0, "h") as ledger:
            ledger.append(replace(record(0), arm=arm))
    (tmp_path / "experiment.yaml").write_text("name: x\nbackends: [baseline, {name: w4a4, backend: fake}, aa]\n")
    run = read_run(tmp_path)
    assert list(run.arms) == ["baseline", "w4a4", "aa"] and run.name == "x"


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_arm_names_stay_inside_the_run(tmp_path, name):
    with pytest.raises(UserError, match="arm name"):
        Ledger(tmp_path, name)


def test_missing_and_empty_run_directories_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="no such run"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no episodes"):
        read_run(tmp_path)


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkFailed, match="cannot write"):
        Ledger(tmp_path / "file", "fake")


@settings(max_examples=25, deadline=None)
@given(data=hy.data())
def test_any_history_of_retries_crashes_and_shards_reads_as_the_last_outcome(tmp_path_factory, data):
    """Model test: a dict against the ledger, with attempts, shards, repeats and tails torn at random."""
    directory, model = tmp_path_factory.mktemp("ledger"), {}
    for _ in range(data.draw(hy.integers(1, 4))):
        shard = data.draw(hy.integers(0, 1))
        with Ledger(directory, "fake", shard, "h") as ledger:
            for _ in range(data.draw(hy.integers(0, 5))):
                r = ledger.append(
                    record(data.draw(hy.integers(0, 3)), data.draw(hy.sampled_from(["success", "error"])))
                )
                model[r.key] = r
            path = directory / "fake" / f"episodes-{shard}-{ledger.attempt}.jsonl"
        if data.draw(hy.booleans()):  # a line that was never acknowledged
            with open(path, "ab") as file:
                file.write(record(0).to_json().encode()[: data.draw(hy.integers(1, 80))])
    assert read_arm(directory, "fake").by_key() == model


# full disk
# -----------------------------------------------------------------------------------------------------------


def fill(directory, shard: int) -> list[EpisodeRecord]:
    """Append until the ledger says that the disk is full."""
    kept = []
    with Ledger(directory, "fake", shard, "h") as ledger:
        with pytest.raises(WorkFailed, match="disk is full|file size limit"):
            for i in range(100_000):
                kept.append(ledger.append(record(i % 50, task=i // 50), trajectory(i) if i % 2 else None))
    return kept


def test_full_disk_on_a_small_tmpfs(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True)
    if mount.returncode:
        pytest.skip("needs the right to mount a tmpfs; the file size limit test covers the same path")
    try:
        kept = fill(disk, 0)
        arm = read_arm(disk, "fake")
        assert len(kept) > 20 and arm.records == sorted(kept, key=lambda r: r.key) and arm.torn == 0
    finally:
        subprocess.run(["umount", disk], check=True)


def test_file_size_limit_leaves_no_torn_line(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # Python ignores SIGXFSZ: short writes, then EFBIG
    try:
        kept = fill(tmp_path, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    arm = read_arm(tmp_path, "fake")
    assert arm.records == sorted(kept, key=lambda r: r.key) and arm.torn == 0
    with Ledger(tmp_path, "fake", 0, "h") as ledger:  # after space is made the same command goes on
        ledger.append(record(49, task=99))


def test_short_write_is_taken_back(tmp_path, monkeypatch):
    """The dangerous case of a full disk: os.write takes a part and raises nothing."""
    with Ledger(tmp_path, "fake", 0, "h") as ledger:
        ledger.append(record(0))
        whole = os.write
        monkeypatch.setattr(room.os, "write", lambda fd, data: whole(fd, data[: len(data) * 3 // 4]))
        with pytest.raises(WorkFailed, match="the disk is full"):
            ledger.append(record(1))
        monkeypatch.undo()
        ledger.append(record(2))
    assert [r.init for r in read_ledger(tmp_path, "fake")] == [0, 2]


# kill -9 ----------------------------------------------------------------------------------------------------
# ---------

WRITER = """
import sys, numpy as np
sys.path.insert(0, {tests!r})
from test_ledger_survives import record, trajectory
from qlibero.results.ledger import Ledger
with Ledger({directory!r}, "fake", int(sys.argv[1]), "h") as ledger:
    done = ledger.done_keys()
    for i in range(100_000):
        r = record(i, task=int(sys.argv[1]))
        if r.key not in done:
            ledger.append(r, trajectory(i))
            print(i, flush=True)
"""


@pytest.mark.slow
def test_sigkill_loses_nothing_that_was_acknowledged(tmp_path):
    """Two writers SIGKILLed at random moments, restarted, killed again: every acknowledged episode is there, once."""
    random.seed(4)
    code = WRITER.format(tests=os.path.dirname(__file__), directory=str(tmp_path))
    acknowledged: dict[int, set[int]] = {0: set(), 1: set()}
    for round_ in range(4):
        writers = []
        for shard in (0, 1):
            out = open(tmp_path / f"out-{shard}-{round_}", "w+")
            process = subprocess.Popen([sys.executable, "-c", code, str(shard)], stdout=out)
            writers.append((shard, process, out))
        deadline = time.time() + 60
        while any(os.path.getsize(out.name) < 50 and p.poll() is None for _, p, out in writers):
            assert time.time() < deadline, "the writers did not get going"
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.15))
        for shard, process, out in writers:
            process.send_signal(signal.SIGKILL)
            process.wait()
            out.seek(0)
            numbers = [int(line) for line in out.read().split("\n")[:-1]]
            out.close()
            assert numbers and not acknowledged[shard] & set(numbers), "a finished episode ran again"
            acknowledged[shard] |= set(numbers)
    arm = read_arm(tmp_path, "fake")
    assert arm.conflicts == () and arm.repeated == 0
    found = {shard: {r.init for r in arm.records if r.task == shard} for shard in (0, 1)}
    for shard in (0, 1):
        assert acknowledged[shard] <= found[shard]
        # written but killed before it could say so: at most one per kill
        assert len(found[shard]) - len(acknowledged[shard]) <= 4
    for r in arm.records[:: max(1, len(arm.records) // 50)]:
        assert np.array_equal(read_trajectory(tmp_path, r), trajectory(r.init))
    shutil.rmtree(tmp_path, ignore_errors=True)


# what is on disk, and what somebody else put there ----------------------------------------------------------


def test_nothing_counts_as_written_before_it_is_on_disk(tmp_path, monkeypatch):
    """A power loss takes what was not fsynced: rows, line, the new files' names, meta.json, the sequential rule."""
    synced: list[str] = []
    sync = os.fsync

    def spy(descriptor: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    with Ledger(tmp_path, "fake", 0, "h") as ledger:
        assert synced == ["fake"], "the names of the new files"
        synced.clear()
        ledger.append(record(0), trajectory(0))
        assert synced[0] == "fake/trajectory-0-1.f32" and synced[-1] == "fake/episodes-0-1.jsonl"
        assert synced[1].startswith("fake/.meta.json-") and synced[2] == "fake"
        synced.clear()
        ledger.append(record(1), trajectory(1))
        assert synced == ["fake/trajectory-0-1.f32", "fake/episodes-0-1.jsonl"]
    synced.clear()
    declare(tmp_path, make_declaration([record(0).key], margin=0.02, alpha=0.025, arms=["fake"], seed=7))
    assert len(synced) == 2 and synced[0].startswith(".stopping.json-") and synced[1] == "."


def test_a_flipped_bit_inside_a_number_is_found_and_old_lines_are_read(tmp_path):
    with Ledger(tmp_path, "fake", 0, "h") as ledger:
        ledger.append(record(0))
    path = tmp_path / "fake" / "episodes-0-1.jsonl"
    line = path.read_text()
    assert '"checksum":"' in line and '"replans":10' in line
    path.write_text(line.replace('"replans":10', '"replans":11'))
    with pytest.raises(UserError, match=r"episodes-0-1.jsonl:1: the line is not what was written"):
        read_arm(tmp_path, "fake")
    path.write_text(replace(record(0), config_hash="h").to_json() + "\n")  # as lines were before they had a checksum
    assert len(read_ledger(tmp_path, "fake")) == 1


DAMAGE = {
    "another arm": lambda d: d | {"arm": "baseline"},
    "text for a count": lambda d: d | {"steps": "50"},
    "a negative count": lambda d: d | {"steps": -1},
    "a truth value for a count": lambda d: d | {"task": True},
    "a count without end": lambda d: d | {"replans": 2**70},
    "a seed that is text": lambda d: d | {"seed": "x"},
    "phases that are a list": lambda d: d | {"phases_ms": [1]},
    "a dictionary for a suite": lambda d: d | {"suite": {}},
    "a hash that is a list": lambda d: d | {"config_hash": []},
    "a trajectory elsewhere": lambda d: d | {"trajectory": {"file": "../../../etc/passwd", "offset": 0, "rows": 1}},
    "more rows than there can be": lambda d: (
        d | {"trajectory": {"file": "trajectory-0-1.f32", "offset": 0, "rows": 2**60}}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_line_that_no_writer_wrote_is_refused_with_its_place(tmp_path, damage):
    (tmp_path / "fake").mkdir()
    line = json.dumps(DAMAGE[damage](json.loads(record(0).to_json())))
    (tmp_path / "fake" / "episodes-0-1.jsonl").write_text(record(1).to_json() + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"episodes-0-1.jsonl:2: "):
        read_arm(tmp_path, "fake")


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 3000, b"9" * 5000, b"garbage", b"\xff\xfe", b"NaN"])
@pytest.mark.parametrize("file", ["episodes-0-1.jsonl", "meta.json"])
def test_json_that_ends_a_parser_ends_in_a_sentence(tmp_path, file, text):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / file).write_bytes(text + b"\n")
    with pytest.raises(UserError, match=file) as refusal:
        read_arm(tmp_path, "fake")
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("file", ["episodes-0-1.jsonl", "meta.json"])
def test_a_pipe_in_a_files_place_does_not_hang(tmp_path, file):
    (tmp_path / "fake").mkdir()
    os.mkfifo(tmp_path / "fake" / file)
    with pytest.raises(UserError, match="not a file"):
        read_arm(tmp_path, "fake")


@pytest.mark.parametrize("plant", ["symlink", "hard link"])
def test_a_planted_lock_destroys_nobodys_file(tmp_path, plant):
    victim = tmp_path / "thesis.txt"
    victim.write_text("chapter one")
    (tmp_path / "fake").mkdir()
    (os.symlink if plant == "symlink" else os.link)(victim, tmp_path / "fake" / ".lock-0")
    with pytest.raises(GuardRefusal, match="no plain file of qlibero's"):
        Ledger(tmp_path, "fake", 0)
    assert victim.read_text() == "chapter one"


def test_a_directory_that_was_deleted_under_its_writer_is_told_at_once(tmp_path):
    with Ledger(tmp_path, "fake", 0, "h") as ledger:
        ledger.append(record(0), trajectory(0))
        shutil.rmtree(tmp_path / "fake")
        with pytest.raises(WorkFailed, match="was deleted"):
            ledger.append(record(1), trajectory(1))


def test_lost_episode_files_leave_the_next_start_a_free_name(tmp_path):
    with Ledger(tmp_path, "fake", 0, "h") as ledger:
        ledger.append(record(0), trajectory(0))
    os.remove(tmp_path / "fake" / "episodes-0-1.jsonl")
    with Ledger(tmp_path, "fake", 0, "h") as ledger:
        ledger.append(record(0), trajectory(0))
        assert ledger.attempt == 2
