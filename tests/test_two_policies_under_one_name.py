"""Risk: one run directory holds two policies, two simulators or two arithmetics under one success rate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from qlibero import cli, identity
from qlibero.errors import GuardRefusal
from qlibero.identity import Identity
from qlibero.results.ledger import Ledger, read_arm, read_ledger
from qlibero.results.meta import bind, check, read_meta
from qlibero.results.pairing import Arm, pair_arms
from qlibero.results.summary import summarize_arm

SHORT = ("tasks=[0]", "max_steps=5", "workers=1", "tracking=[]", "videos=0")


def run(config: Path, out: Path, *sets: str) -> int:
    return cli.main(["run", str(config), "--out", str(out), *(x for s in (*SHORT, *sets) for x in ("--set", s))])


# ------------------------------------------------------------------------------------------------ by content
@pytest.fixture(scope="module")
def begun(tmp_path_factory, tiny_experiment, calibration_file):
    """A policy's own folder and a run directory with one episode of each arm."""
    place = tmp_path_factory.mktemp("identity")
    for file in tiny_experiment.parent.iterdir():
        shutil.copy(file, place / file.name)
    shutil.copy(calibration_file, place / "calibration.npz")
    document = yaml.safe_load((place / "tiny.yaml").read_text())
    document["quant"]["calibration"]["path"] = "calibration.npz"
    (place / "tiny.yaml").write_text(yaml.safe_dump(document))
    assert run(place / "tiny.yaml", place / "out", "episodes_per_task=1") == 0
    return place


def words(place: Path, monkeypatch) -> None:
    (place / "tokenizer.json").write_text((place / "tokenizer.json").read_text().replace('"type"', ' "type"'))


def architecture(place: Path, monkeypatch) -> None:
    (place / "config.json").write_text((place / "config.json").read_text().replace("}}", '}, "name": "again"}'))


def demonstrations(place: Path, monkeypatch) -> None:
    from qlibero.policies.base import Observation
    from qlibero.quant.observations import write_demonstrations

    rng = np.random.default_rng(5)
    frames = rng.integers(0, 256, (4, 2, 256, 256, 3), dtype=np.uint8)
    prompt = "pick up the alphabet soup and place it in the basket"
    seen = [Observation(a, b, rng.standard_normal(8).astype(np.float32), prompt) for a, b in frames]
    write_demonstrations(place / "calibration.npz", seen, "others")


def compiled(place: Path, monkeypatch) -> None:
    from qlibero.policies.pi05.fast import cpu_flow

    monkeypatch.setattr(cpu_flow.numba, "__version__", "0.0.1")


def noise(place: Path, monkeypatch) -> None:
    from qlibero.run import arms

    monkeypatch.setattr(arms, "RECIPE", "another")


def goal(place: Path, monkeypatch) -> None:
    from qlibero.sim import libero

    files = libero.task_files

    def other(suite: str, task: int) -> dict[str, Path]:
        return files(suite, task) | ({"goal": files(suite, 8)["goal"]} if task == 7 else {})

    monkeypatch.setattr(libero, "task_files", other)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (words, "policy file tokenizer.json"),
        (architecture, "policy file config.json"),
        (demonstrations, "calibration data"),
        (compiled, "compiled flow"),
        (noise, "noise recipe"),
        (goal, "task 7 of libero_object (goal, initial states, instruction)"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_changed_content_is_refused_by_name_and_nothing_is_overwritten(
    begun, tmp_path, monkeypatch, capfd, change, named
):
    place = tmp_path / "elsewhere"  # moved, too: where a thing lies does not count
    shutil.copytree(begun, place)
    change(place, monkeypatch)
    before = {p: p.read_bytes() for p in (place / "out").rglob("*") if p.suffix in (".json", ".yaml", ".jsonl")}
    assert run(place / "tiny.yaml", place / "out", "episodes_per_task=2") == 3
    said = json.loads(capfd.readouterr().out.splitlines()[-1])["error"]["message"]
    assert named in said and "choose another --out" in said
    assert {p: p.read_bytes() for p in before} == before


def test_a_policy_that_was_moved_is_still_itself(begun, tmp_path):
    place = tmp_path / "moved"
    shutil.copytree(begun, place)
    assert run(place / "tiny.yaml", place / "out", "episodes_per_task=2") == 0
    first, second = read_ledger(place / "out", "baseline")
    meta = read_meta(place / "out", "baseline")
    assert first.identity == second.identity == Identity(meta.identity).digest and len(first.identity) == 16
    assert first.probe == second.probe == meta.probe and len(first.probe) == 16
    assert first.machine == second.machine == meta.probes[first.probe].kind
    assert (first.max_steps, first.replan_steps) == (5, 5)
    assert not [part for part in meta.identity.values() if "/" in part], "a path in an identity"
    assert {"policy file tokenizer.json", "robosuite as imported", "mujoco as imported"} <= meta.identity.keys()


def test_a_failed_start_binds_nothing(tmp_path, tiny_experiment):
    """The hint that an error names must be accepted by the directory that the error left behind."""
    out = tmp_path / "out"
    server = ("policy={type: remote, url: 'ws://localhost:1', timeout_s: 1}", "backends=[baseline]", "quant=null")
    for again in (server, tuple(s.replace("localhost", "127.0.0.1") for s in server)):
        assert run(tiny_experiment, out, *again) == 1  # no server, both times
    assert run(tiny_experiment, out, "seed=8", "backends=[baseline]", "episodes_per_task=1") == 0
    assert run(tiny_experiment, out, "seed=9", "backends=[baseline]", "episodes_per_task=1") == 3


# ------------------------------------------------------------------------------------------------- by arithmetic
def record_of(key: int, arm: str = "fake"):
    from test_ledger_survives import record

    return replace(record(key), arm=arm)


def meta_of(probe: str, kind: str, **identity_: str) -> dict:
    facts = {"processor": kind, "vector code": "AVX2"}
    return {"identity": {"policy": "a", **identity_}, "probe": probe, "probes": {probe: {"kind": kind, "facts": facts}}}


def test_another_answer_to_the_probe_is_refused_with_the_machines_difference_unless_a_mix_is_allowed(tmp_path):
    with Ledger(tmp_path, "fake", 0, "h") as ledger:
        ledger.bind(meta_of("aa" * 8, "EPYC"))
        ledger.append(record_of(0))
    with Ledger(tmp_path, "fake", 0, "h") as ledger:
        with pytest.raises(GuardRefusal, match="processor was 'EPYC', is 'Xeon'.*mixed_machines: true"):
            ledger.bind(meta_of("bb" * 8, "Xeon"))
        with pytest.raises(GuardRefusal, match="policy 'a', now 'b'"):
            ledger.bind(meta_of("bb" * 8, "Xeon", policy="b"), mixed_machines=True)
        ledger.bind(meta_of("bb" * 8, "Xeon"), mixed_machines=True)
        ledger.append(record_of(1))
    arm = read_arm(tmp_path, "fake")
    assert [(r.probe[:2], r.machine) for r in arm.records] == [("aa", "EPYC"), ("bb", "Xeon")]
    assert arm.meta.probe == "aa" * 8 and set(arm.meta.probes) == {"aa" * 8, "bb" * 8}
    assert summarize_arm(arm.records).machines == {"EPYC": 1, "Xeon": 1}


def test_under_a_mix_both_sides_of_a_pair_come_from_one_kind_of_machine():
    def arm(name: str, *machines: tuple[str, str]) -> Arm:
        records = [replace(record_of(i, name), machine=m, probe=p) for i, (m, p) in enumerate(machines)]
        return Arm(name, {r.key: r for r in records}, {})

    left = arm("baseline", ("EPYC", "aa"), ("Xeon", "bb"), ("Xeon", "bb"))
    pairing = pair_arms(left, arm("fake", ("EPYC", "cc"), ("EPYC", "cc"), ("Xeon", "dd")))
    assert [pair.key.init for pair in pairing.pairs] == [0, 2]
    assert list(pairing.unpaired.values()) == ["different machines: Xeon and EPYC"]
    same = pair_arms(arm("baseline", ("EPYC", "aa"), ("Xeon", "aa")), arm("fake", ("Xeon", "cc"), ("Xeon", "cc")))
    assert len(same.pairs) == 2  # machines that answer alike are no mix


def test_a_process_with_other_vector_code_is_found_by_its_probe(begun, tmp_path):
    """ATEN_CPU_CAPABILITY stands for another node of a mixed cluster."""
    import torch

    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no vector code to leave out")
    place = tmp_path / "place"
    shutil.copytree(begun, place)

    def again(*sets: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "qlibero.cli", "run", place / "tiny.yaml", "--out", place / "out"]
        sets = (*SHORT, "backends=[baseline]", "episodes_per_task=2", *sets)
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
        return subprocess.run(
            [*map(str, command), *(x for s in sets for x in ("--set", s))],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    refused = again()
    assert refused.returncode == 3, refused.stderr
    assert "vector code was 'AVX" in refused.stdout and "is 'DEFAULT'" in refused.stdout
    allowed = again("mixed_machines=true")
    assert allowed.returncode == 0, allowed.stderr
    machines = json.loads(allowed.stdout.splitlines()[-1])["arms"]["baseline"]["machines"]
    assert sorted(machines.values()) == [1, 1] and len(machines) == 2


# -------------------------------------------------------------------------------------------- what is remembered
def test_hashing_is_remembered_until_a_file_changes_and_not_while_it_may_still_change(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, asked = tmp_path / "weights", []
    file.write_bytes(b"one")
    digest = identity.sha256
    monkeypatch.setattr(identity, "sha256", lambda path: asked.append(path) or digest(path))
    first = identity.file_sha256(file)
    assert identity.file_sha256(file) == first and len(asked) == 2, "written this moment: not to be remembered"
    monkeypatch.setattr(identity, "_SETTLED_NS", 0)
    identity.file_sha256(file)
    assert identity.file_sha256(file) == first and len(asked) == 3
    times = os.stat(file)
    file.write_bytes(b"two")  # same size, and the old modification time put back
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identity.file_sha256(file) != first


def test_a_directory_that_was_bound_without_an_identity_is_not_continued(tmp_path):
    with Ledger(tmp_path, "fake", 0, "h") as ledger:
        ledger.append(record_of(0))
    with pytest.raises(GuardRefusal, match="an earlier qlibero recorded"):
        check(tmp_path, "fake", {"config_hash": "h", "identity": {"policy": "a"}})
    assert len(read_ledger(tmp_path, "fake")) == 1


def test_one_part_of_the_identity_that_differs_is_refused_and_the_same_one_is_not(tmp_path):
    known = {"policy file model.safetensors": "a" * 64, "noise recipe": "qlibero-noise-1"}
    with Ledger(tmp_path, "fake", 0, "h") as ledger:
        ledger.bind({"identity": known})
        ledger.append(record_of(0))
    check(tmp_path, "fake", {"config_hash": "h", "identity": known})
    for part, value in (("policy file model.safetensors", "b" * 64), ("policy file more.safetensors", "c" * 64)):
        with pytest.raises(GuardRefusal, match=f"not the same any more: .*{part}"):
            check(tmp_path, "fake", {"config_hash": "h", "identity": known | {part: value}})


def test_whoever_records_first_binds_and_the_other_is_told(tmp_path):
    with Ledger(tmp_path, "fake", 0, "one") as first, Ledger(tmp_path, "fake", 1, "two") as second:
        first.bind({"label": "one"})
        second.bind({"label": "two"})
        first.append(record_of(0))
        with pytest.raises(GuardRefusal, match="another configuration"):
            second.append(record_of(1))
    assert read_meta(tmp_path, "fake").label == "one"
    bind(tmp_path, "fake", {"config_hash": "one", "label": "still one"})
    assert read_meta(tmp_path, "fake").label == "still one"
