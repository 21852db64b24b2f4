"""Risk: numbers come from a quantization that is damaged, made with other settings, or another checkpoint's."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pi05_small import noises, observations
from quant_settings import quant_of
from safetensors.torch import load_file, save_file
from test_fake_equals_kernel import asked, small_policy

from qlibero.config.quantization import Calibration, Quant
from qlibero.errors import GuardRefusal, UserError, WorkFailed
from qlibero.quant import artifact as artifacts
from qlibero.quant.apply import quantize_policy
from qlibero.quant.artifact import load, save
from qlibero.quant.calibrate import calibrate
from qlibero.quant.inspect import SORTS, inspect_artifact, sensitivity
from qlibero.quant.nibbles import pack_nibbles, unpack_nibbles
from qlibero.quant.observations import read_demonstrations, write_demonstrations
from qlibero.quant.prepare import artifact_for, ensure_artifact, noise_for

SETTINGS = dict(block_size=16, rotation_steps=8, layout="llm")


@pytest.fixture(scope="module")
def policy():
    return small_policy()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_demonstrations(
        tmp_path_factory.mktemp("data") / "calibration.npz", observations(6), "random, for tests"
    )


@pytest.fixture(scope="module")
def quant(data) -> Quant:
    return Quant(**SETTINGS, calibration=Calibration(path=data, samples=4))


@pytest.fixture(scope="module")
def path(policy, quant, tmp_path_factory) -> Path:
    return ensure_artifact(policy, quant, [tmp_path_factory.mktemp("artifacts")]).path


def test_what_is_read_back_is_what_was_made(policy, quant, path):
    artifact = load(path)
    data = read_demonstrations(quant.calibration.path).sample(4, 0)
    again = calibrate(
        policy.for_calibration(),
        data.observations,
        noise_for(policy, 4, 0),
        artifact.spec,
        {"data_sha256": data.sha256, "source": data.source, "seed": 0, "file": "calibration.npz"},
    )
    assert again.sha256 == artifact.sha256
    assert np.array_equal(
        asked(quantize_policy(policy, artifact, "fake")), asked(quantize_policy(policy, again, "fake"))
    )
    assert artifact.calibration["source"] == "random, for tests" and artifact.calibration["observations"] == 4
    assert artifact.calibration["action_error"]["arm"] > 0


def test_made_once_and_found_again(policy, quant, path, said):
    root = path.parents[1]
    assert artifact_for(policy, quant, [root]).path == path and "found" in said[0]
    other = ensure_artifact(policy, quant.model_copy(update={"method": "rtn"}), [root])
    assert other.made and other.path != path
    named = ensure_artifact(policy, quant.model_copy(update={"artifact": path}), [root])
    assert not named.made and named.path == path


def test_any_damaged_byte_is_refused(path, tmp_path):
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    places = [rng.randrange(header) for _ in range(60)] + [rng.randrange(header, len(whole)) for _ in range(60)]
    for place in places + [0, 7, 8, header - 1, header, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        (tmp_path / "a.safetensors").write_bytes(damaged)
        with pytest.raises(GuardRefusal, match="qlibero quantize"):
            load(tmp_path / "a.safetensors")


def test_any_truncation_is_refused(path, tmp_path):
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.safetensors").write_bytes(whole[:length])
        with pytest.raises(GuardRefusal, match="qlibero quantize"):
            load(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(whole + b"\0")
    with pytest.raises(GuardRefusal, match="qlibero quantize"):
        load(tmp_path / "a.safetensors")


def test_no_artifact_and_no_artifact_at_all(path, tmp_path):
    with pytest.raises(UserError, match="no artifact at"):
        load(tmp_path / "missing.safetensors")
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(GuardRefusal, match="not a quantization artifact"):
        load(tmp_path / "other.safetensors")


def test_stale_settings_are_refused_value_by_value(policy, quant, path):
    with pytest.raises(GuardRefusal, match=r"stale: alpha: 0.5 there, 0.7 asked"):
        ensure_artifact(policy, quant.model_copy(update={"artifact": path, "alpha": 0.7}))


def test_another_format_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "FORMAT", artifacts.FORMAT + 1)
    with pytest.raises(GuardRefusal, match="artifact format"):
        load(path)


def test_a_foreign_checkpoint_is_refused(policy, quant, path):
    stranger = small_policy()
    stranger._identity = {"sha256": "f" * 64}
    for attempt in (
        lambda: ensure_artifact(stranger, quant.model_copy(update={"artifact": path})),
        lambda: quantize_policy(stranger, load(path), "fake"),
    ):
        with pytest.raises(GuardRefusal, match="foreign: made for checkpoint 111"):
            attempt()


def test_an_artifact_planted_at_the_right_place_is_still_checked(policy, quant, path, tmp_path):
    """The directory's name is a promise; the file has to keep it."""
    other = calibrate(
        policy,
        observations(2),
        noises(2, policy.noise_shape),
        quant_of(**SETTINGS, method="rtn"),
        {"data_sha256": "x"},
    )
    planted = tmp_path / path.parent.name / path.name
    save(other, planted)
    with pytest.raises(GuardRefusal, match="stale: method"):
        ensure_artifact(policy, quant, [tmp_path])


def test_altered_with_a_matching_header_but_no_hash(path, tmp_path):
    """Somebody edits the settings and writes a perfectly valid safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    meta = json.loads(header["qlibero"])
    meta["spec"]["alpha"] = 0.9
    save_file(load_file(path), tmp_path / "edited.safetensors", metadata=header | {"qlibero": json.dumps(meta)})
    with pytest.raises(GuardRefusal, match="altered after it was written"):
        load(tmp_path / "edited.safetensors")


def test_a_layer_list_that_does_not_fit_the_model_is_refused(policy, path):
    artifact = load(path)
    fewer = replace(artifact, layers=artifact.layers[1:])
    with pytest.raises(GuardRefusal, match="20 linears"):
        quantize_policy(policy, fewer, "fake")


def test_a_backend_that_cannot_do_a_layer_says_which(policy, quant, tmp_path):
    artifact = ensure_artifact(
        policy, quant.model_copy(update={"weight_bits": 8, "method": "rtn"}), [tmp_path]
    ).artifact
    with pytest.raises(UserError, match=r"cpu_int4 cannot run .*q_proj .*packs int4"):
        quantize_policy(policy, artifact, "cpu_int4")


def test_quantizing_nothing_is_noticed(policy, monkeypatch):
    """A quantized arm whose actions equal the baseline's bit for bit has not been quantized."""
    monkeypatch.setattr("qlibero.quant.apply.swap_modules", lambda model, modules: model)
    with pytest.raises(WorkFailed, match="nothing was quantized"):
        calibrate(
            policy,
            observations(1),
            noises(1, policy.noise_shape),
            quant_of(**SETTINGS, method="rtn"),
            {"data_sha256": "x"},
        )


def test_fitted_methods_need_data(policy):
    with pytest.raises(UserError, match="fitted on observations and there are none"):
        calibrate(policy, [], noises(0, policy.noise_shape), quant_of(**SETTINGS), {"data_sha256": "x"})


def test_demonstrations_round_trip_and_refuse_what_they_are_not(data, tmp_path):
    read = read_demonstrations(data)
    made = observations(6)
    assert [o.prompt for o in read.observations] == [o.prompt for o in made]
    assert all(np.array_equal(a.state, b.state) for a, b in zip(read.observations, made, strict=True))
    assert all(o.image.shape == (256, 256, 3) and o.image.dtype == np.uint8 for o in read.observations)
    few = read.sample(3, seed=1)
    assert len(few.observations) == 3 and read.sample(3, seed=1) == few and read.sample(99, 0) is read
    (tmp_path / "broken.npz").write_bytes(data.read_bytes()[:500])
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(
        tmp_path / "pickled.npz",
        jpeg=np.array([{}], dtype=object),
        offsets=[0],
        states=[0],
        prompts=["x"],
        source="x",
    )
    for name in ("broken.npz", "other.npz", "pickled.npz"):
        with pytest.raises(UserError, match="not a file of demonstration observations"):
            read_demonstrations(tmp_path / name)
    with pytest.raises(UserError, match="No such file"):
        read_demonstrations(tmp_path / "missing.npz")


def test_nibbles_hold_every_pair_of_codes():
    codes = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    assert pack_nibbles(codes).nbytes == 256 and torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


def test_inspect_sorts_compares_and_hints(policy, quant, path):
    other = ensure_artifact(
        policy, quant.model_copy(update={"method": "rtn", "activation_bits": 4}), [path.parents[1]]
    ).path
    document = inspect_artifact(path, other, sort="sqnr_db")
    json.dumps(document)
    measured = [r["sqnr_db"] for r in document["layers"] if r["sqnr_db"] is not None]
    assert len(document["layers"]) == 21 and len(measured) == 16 and measured == sorted(measured)
    assert document["hint"][0]["layer"] == document["layers"][0]["layer"]
    assert document["diff"]["settings"]["method"] == ["duquant", "rtn"] and len(document["diff"]["layers"]) == 21
    assert document["diff"]["layers"][0]["change_db"] < 0
    for column in SORTS:
        assert len(inspect_artifact(path, sort=column)["layers"]) == 21
    with pytest.raises(UserError, match="cannot sort by 'size'"):
        inspect_artifact(path, sort="size")


def test_sensitivity_finds_the_layer_that_hurts(policy):
    """Spoil one layer's codes: the measured hint must name it."""
    artifact = calibrate(
        policy,
        observations(2),
        noises(2, policy.noise_shape),
        quant_of(**SETTINGS, method="rtn"),
        {"data_sha256": "x"},
    )
    victim = next(x.name for x in artifact.layers if x.executed and x.name.endswith("1.self_attn.o_proj"))
    artifact.tensors[f"{victim}.codes"] = torch.zeros_like(artifact.tensors[f"{victim}.codes"])
    rows = sensitivity(policy, artifact, observations(2), noises(2, policy.noise_shape))
    assert rows[0]["layer"] == victim and len(rows) == 16
    assert abs(sum(r["share_of_action_error"] for r in rows) - 1) < 0.01
