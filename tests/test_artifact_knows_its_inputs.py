"""Risk: two arms that differ in how they are fed share the calibration of whichever came first; or one is made twice
for a difference that decides nothing; or two processes that make one replace what the other runs on."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from pi05_small import PROMPTS, STATISTICS, observations, random_model, siglip_config
from safetensors.torch import save_file
from test_fake_equals_kernel import small_policy

from qlibero import registry
from qlibero.config.quantization import Calibration, Quant
from qlibero.config.schema import Experiment
from qlibero.errors import GuardRefusal
from qlibero.policies import load_policy, weights_sha256
from qlibero.policies.pi05 import Pi05
from qlibero.policies.pi05.tokenizer import WordTokenizer, split_words
from qlibero.quant import artifact as artifacts
from qlibero.quant import prepare
from qlibero.quant.layout import select
from qlibero.quant.observations import write_demonstrations
from qlibero.quant.prepare import ensure_artifact, ready_artifact

RTN = Quant(method="rtn", rounding="nearest", layout="llm")  # looks at weights alone, so a row costs milliseconds
OPENPI = {"action_dim": 32, "action_horizon": 10, "max_token_len": 200}


def checkpoint(path: Path, config: dict | None = None) -> Path:
    """openpi's kind, which proves no profile and may have several statistics."""
    for number, asset in enumerate(("one/libero", "two/libero")):
        statistics = json.loads(json.dumps(STATISTICS))
        statistics["state"]["q99"][2] += number
        (path / "assets" / asset).mkdir(parents=True)
        (path / "assets" / asset / "norm_stats.json").write_text(json.dumps({"norm_stats": statistics}))
    state = {name: t.clone().bfloat16() for name, t in random_model(siglip_config()).state_dict().items()}
    save_file(state, path / "model.safetensors")
    words = {w for p in PROMPTS for w in split_words(p)} | {"task", "state", "action", *map(str, range(-1, 256))}
    (path / "tokenizer.json").write_text(WordTokenizer(sorted(words)).to_json())
    (path / "config.json").write_text(json.dumps(OPENPI if config is None else config))
    return path


def settings(path: Path, **changes) -> Pi05:
    return Pi05(**{"type": "pi05", "checkpoint": path, "profile": "openpi", "asset_id": "one/libero", **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint, its artifact, and the directory that holds it."""
    path = checkpoint(tmp_path_factory.mktemp("base"))
    place = tmp_path_factory.mktemp("artifacts")
    return path, ensure_artifact(load_policy(settings(path)), RTN, [place]), place


def rewritten(path: Path, name: str, change) -> None:
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))


def other_bounds(content: dict) -> None:
    content["norm_stats"]["state"]["q01"][0] -= 0.5


def other_actions(content: dict) -> None:
    content["norm_stats"]["actions"]["q99"][0] += 0.5


ONE = "assets/one/libero/norm_stats.json"
#: key of the policy or declaration of its checkpoint -> what a refusal has to name
DECIDE = {
    "profile": ({"profile": "openpi-state"}, None, "profile: openpi there, openpi-state asked"),
    "asset_id": ({"asset_id": "two/libero"}, None, "statistics of state"),
    "norm_stats": ({"norm_stats": "assets/two/libero/norm_stats.json", "asset_id": None}, None, "statistics of state"),
    "statistics retrained in place": ({}, (ONE, other_bounds), "statistics of state"),
    "statistics of actions": ({}, (ONE, other_actions), "statistics of actions"),
    "tokenizer": ({"tokenizer": "other/tokenizer.json"}, None, "tokenizer"),
    "words in the tokenizer": ({}, ("tokenizer.json", lambda c: c["words"].reverse()), "tokenizer"),
    "action_horizon": (
        {"action_horizon": 5},
        ("config.json", lambda c: c.pop("action_horizon")),
        "action horizon: 10 there, 5 asked",
    ),
    "declared horizon": (
        {},
        ("config.json", lambda c: c.update(action_horizon=4)),
        "horizon: 10 there, 4 asked",
    ),
    "token limit": ({}, ("config.json", lambda c: c.update(max_token_len=64)), "max token len: 200 there, 64 asked"),
}
NOTHING = {
    "batch_size": ({"batch_size": 3}, None),
    "flow_steps": ({"flow_steps": 3}, None),
    "replan_steps": ({"replan_steps": 2}, None),
    "sha256": ({"sha256": ""}, None),
    "norm_stats": ({"norm_stats": ONE, "asset_id": None}, None),
    "another place": ({}, None),
    "a name": ({}, ("config.json", lambda c: c.update(name="renamed"))),
    "statistics that are not read": ({}, ("assets/two/libero/norm_stats.json", other_bounds)),
}


def changed(path: Path, tmp_path: Path, keys: dict, rewrite) -> Pi05:
    twin = shutil.copytree(path, tmp_path / "twin")
    words = json.loads((twin / "tokenizer.json").read_text())["words"]
    (twin / "other").mkdir()
    (twin / "other/tokenizer.json").write_text(WordTokenizer(words[::-1]).to_json())
    if rewrite is not None:
        rewritten(twin, *rewrite)
    keys = {k: twin / v if k in ("norm_stats", "tokenizer") else v for k, v in keys.items()}
    if "sha256" in keys:
        keys["sha256"] = weights_sha256(settings(twin))
    return settings(twin, **keys)


@pytest.mark.parametrize("name", DECIDE)
def test_what_decides_the_inputs_gives_another_artifact_and_is_refused_by_name(name, base, tmp_path):
    path, found, place = base
    keys, rewrite, named = DECIDE[name]
    said = changed(path, tmp_path, keys, rewrite)
    assert ready_artifact(said, weights_sha256(said), RTN, [place]) is None
    policy = load_policy(said)
    other = ensure_artifact(policy, RTN, [tmp_path / "other artifacts", place])
    assert other.made and other.artifact.key != found.artifact.key
    unloaded = ready_artifact(said, weights_sha256(said), RTN, [tmp_path / "other artifacts"])
    assert unloaded is not None and unloaded.path == other.path
    with pytest.raises(GuardRefusal, match=f"calibrated on other inputs: .*{named}"):
        ensure_artifact(policy, RTN.model_copy(update={"artifact": found.path}))
    shutil.copy(found.path, other.path)  # planted where it would be found
    with pytest.raises(GuardRefusal, match="calibrated on other inputs"):
        ensure_artifact(policy, RTN, [tmp_path / "other artifacts"])


@pytest.mark.parametrize("name", NOTHING)
def test_what_decides_nothing_finds_the_same_artifact(name, base, tmp_path):
    path, found, place = base
    said = changed(path, tmp_path, *NOTHING[name])
    assert ready_artifact(said, weights_sha256(said), RTN, [place]).path == found.path
    again = ensure_artifact(load_policy(said), RTN, [place])
    assert not again.made and again.path == found.path


def test_every_key_of_a_policy_is_in_one_table_or_says_where_it_runs():
    """A new key has to be put into one of them; weights have a hash of their own in the key."""
    weights, elsewhere = {"type", "checkpoint", "untrained"}, {"device", "dtype"}
    assert set(Pi05.model_fields) == weights | elsewhere | {
        key for rows in (DECIDE, NOTHING) for keys, *_ in rows.values() for key in keys
    }


def test_another_arithmetic_is_another_artifact_and_may_be_named(base, tmp_path, said):
    path, found, place = base
    half = settings(path, dtype="bfloat16")
    assert ready_artifact(half, weights_sha256(half), RTN, [place]) is None
    policy = load_policy(half)
    assert ensure_artifact(policy, RTN, [tmp_path]).made
    assert ensure_artifact(policy, RTN.model_copy(update={"artifact": found.path})).path == found.path
    assert "in another arithmetic: dtype: float32 there, bfloat16 asked" in said[-1]


def test_cameras_devices_and_plugged_in_code_are_told_apart(base, tmp_path, monkeypatch):
    policy = load_policy(settings(base[0]))
    swapped = load_policy(settings(base[0]))
    swapped._cameras = swapped._cameras[::-1]
    differing = {k for k, v in policy.calibration_inputs().items() if swapped.calibration_inputs()[k] != v}
    assert differing == {"cameras"} and policy.calibration_inputs()["device"] == "cpu"
    method = tmp_path / "mine.py"
    keys = []
    for body in ("return Transform()", "return  Transform()"):
        method.write_text(
            "from qlibero.quant.transform import Transform\nfrom qlibero.registry import MethodPlugin\n"
            f"PLUGIN = MethodPlugin('mine', 'nothing', data_free=True)\ndef fit(data, spec):\n    {body}\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        registry.forget()
        spec = Quant(method="mine", rounding="nearest", layout="llm")
        keys.append(artifacts.artifact_key(spec, "1" * 64, "none", prepare.inputs_of(policy, spec)))
    registry.forget()
    assert keys[0] != keys[1]


def test_an_artifact_made_before_inputs_were_recorded_is_taken_by_name_and_that_is_said(base, tmp_path, said):
    path, found, place = base
    whole = artifacts.load(found.path)
    record = {key: value for key, value in whole.calibration.items() if key != "inputs"}
    tensors = {
        name: whole.tensor(name) for layer in whole.layers for name in (f"{layer.name}.codes", f"{layer.name}.scales")
    }
    older = artifacts.build(whole.spec, whole.checkpoint_sha256, record, whole.layers, {}, tensors)
    artifacts.save(older, tmp_path / "older.safetensors")
    taken = ensure_artifact(
        load_policy(settings(path)), RTN.model_copy(update={"artifact": tmp_path / "older.safetensors"})
    )
    assert taken.artifact.sha256 == older.sha256 and taken.artifact.inputs is None
    assert "does not say on what inputs" in said[-1]


def test_what_a_policy_says_of_its_inputs_may_be_long_or_nothing(base, tmp_path, monkeypatch):
    """An artifact that was written after minutes is one that is read."""
    policy = load_policy(settings(base[0]))
    monkeypatch.setattr(policy, "calibration_inputs", lambda: {"asset": "", "words": "put the bowl " * 100})
    assert ensure_artifact(policy, RTN, [tmp_path]).made and not ensure_artifact(policy, RTN, [tmp_path]).made


def test_an_artifact_is_measured_on_the_policy_that_it_is_of(base, tmp_path, monkeypatch):
    path, found, place = base
    data = write_demonstrations(tmp_path / "calibration.npz", observations(4), "random, for tests")
    monkeypatch.setattr("qlibero.quant.inspect.sensitivity", lambda policy, *rest: [{"profile": policy.profile.name}])

    def measured(*profiles: str) -> list[dict]:
        policy = settings(path).model_dump(mode="json", exclude_unset=True)
        arms = [{"name": name, "backend": "fake", "policy": {"profile": name}} for name in profiles]
        quant = {"method": "rtn", "rounding": "nearest", "layout": "llm", "calibration": {"path": str(data)}}
        document = {"name": "x", "suite": "libero_goal", "policy": policy, "quant": quant, "arms": arms}
        return prepare.measured_sensitivity(Experiment.model_validate(document), found.path)

    assert measured("openpi-state", "openpi") == measured("openpi", "openpi-state") == [{"profile": "openpi"}]
    with pytest.raises(GuardRefusal, match="profile: openpi there, openpi-state asked"):
        measured("openpi-state")


@pytest.mark.parametrize("steps", [4, 10], ids=lambda steps: f"{steps} flow steps")
def test_batch_steps_and_threads_change_no_byte_of_a_calibration(steps, tmp_path, monkeypatch):
    data = write_demonstrations(tmp_path / "calibration.npz", observations(4), "random, for tests")
    quant = Quant(layout="llm", method="rtn", calibration=Calibration(path=data, samples=3))
    counted, found = [], []
    monkeypatch.setattr(
        "qlibero.quant.calibrate.select", lambda *a: counted.append(torch.get_num_threads()) or select(*a)
    )
    for threads, batch, flow_steps in ((1, 1, 10), (2, 3, steps)):
        policy = small_policy().with_batch_size(batch)
        policy.flow_steps = flow_steps
        torch.set_num_threads(threads)
        found.append(ensure_artifact(policy, quant, [tmp_path / str(threads)]).artifact)
        assert torch.get_num_threads() == threads
        torch.set_num_threads(1)
    assert found[0].sha256 == found[1].sha256 and counted == [1, 1]


def test_two_that_make_one_artifact_at_one_time_leave_one_and_neither_replaces_the_others(tmp_path, monkeypatch):
    """Both have found none and calibrate; the second to write finds the first's there, which may be running on it."""
    together, one = threading.Barrier(2), threading.Lock()
    files: list[tuple[int, int]] = []
    real_save = prepare.save

    def save(made, path, over=True):
        together.wait(60)  # neither writes before both have calibrated
        with one:
            real_save(made, path, over)
            files.append((path.stat().st_ino, path.stat().st_mtime_ns))

    monkeypatch.setattr(prepare, "save", save)
    policies = [small_policy() for _ in range(2)]
    found: list = [None, None]

    def make(i: int) -> None:
        found[i] = ensure_artifact(policies[i], RTN, [tmp_path])

    threads = [threading.Thread(target=make, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [f.made for f in found] == [True, True] and found[0].path == found[1].path
    assert found[0].artifact.sha256 == found[1].artifact.sha256
    assert len(files) == 2 and files[0] == files[1]
    assert [p.name for p in found[0].path.parent.iterdir()] == [found[0].path.name]
