"""Risk: what a checkpoint says it is for is not listened to, and another policy than the trained one is scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pi05_small import STATISTICS, noises, observations
from safetensors.torch import save_file
from test_checkpoint_formats import ask, lerobot, load, openpi, ours, settings

from qlibero.errors import UserError
from qlibero.policies.pi05.verify import verify_checkpoint

VISUAL = {"type": "VISUAL", "shape": [3, 224, 224]}
IMAGES = "observation.images."


def features(*cameras: str, state: int = 8) -> dict:
    return {IMAGES + name: VISUAL for name in cameras} | {"observation.state": {"type": "STATE", "shape": [state]}}


def steps(path: Path, which: str, change) -> None:
    """Change the steps of policy_<which>.json in place."""
    file = path / f"policy_{which}.json"
    content = json.loads(file.read_text())
    content["steps"] = change(content["steps"]) or content["steps"]
    file.write_text(json.dumps(content))


def step(name: str, **config) -> dict:
    return {"registry_name": name, "config": config}


def renamed(path: Path, mapping: dict) -> None:
    steps(path, "preprocessor", lambda s: [step("rename_observations_processor", rename_map=mapping), *s])


# -- horizon, executed steps, flow steps, tokens ------------------------------------------------------------------
def test_a_horizon_that_no_file_says_has_to_be_said(tmp_path):
    path = openpi(tmp_path / "c")
    (path / "config.json").unlink()
    with pytest.raises(UserError, match=r"policy.action_horizon: no file of .* says how many actions"):
        load(path, profile="openpi")
    assert load(path, profile="openpi", action_horizon=16).noise_shape == (16, 32)
    report = verify_checkpoint(path)
    assert report["ok"] and report["architecture"]["action_horizon"] is None
    assert "action_horizon" in [condition.split(":")[0] for condition in report["conditions"]]


def test_our_own_format_is_not_given_a_horizon_either(tmp_path):
    path = ours(tmp_path / "c")
    architecture = json.loads((path / "config.json").read_text())["architecture"]
    del architecture["action_horizon"]
    settings(path, architecture=architecture)
    with pytest.raises(UserError, match="policy.action_horizon: no file of"):
        load(path)
    assert load(path, action_horizon=12).noise_shape == (12, 7)


def test_a_horizon_said_twice_must_agree(tmp_path):
    path = openpi(tmp_path / "c")
    settings(path, action_horizon=15)
    assert load(path, profile="openpi", action_horizon=15).noise_shape == (15, 32)
    with pytest.raises(UserError, match="action_horizon: 10, but .*config.json says 15; leave the key out"):
        load(path, profile="openpi", action_horizon=10)
    with pytest.raises(UserError, match="config.json says 10"):
        load(ours(tmp_path / "d"), action_horizon=50)


@pytest.mark.parametrize("value", [0, -1, "10", 10.0, True, [10], 2**70], ids=str)
def test_a_horizon_that_is_no_number_of_actions_is_refused(tmp_path, value):
    path = openpi(tmp_path / "c")
    settings(path, action_horizon=value)
    with pytest.raises(UserError, match="config.json: action_horizon is"):
        load(path, profile="openpi")


def test_what_is_declared_and_not_run_is_said(tmp_path):
    path = lerobot(tmp_path / "c")
    settings(path, num_inference_steps=4, chunk_size=30, n_action_steps=25, tokenizer_max_length=72)
    notes = " ".join(verify_checkpoint(path)["notes"])
    assert (
        "declares 4 flow steps, 10 run" in notes and "declares 25 executed actions of a chunk, 5 are executed" in notes
    )
    policy = load(path, profile="lerobot-0.6")
    assert policy.noise_shape == (30, 32) and policy.model.config.max_token_len == 72
    assert "declares 4 flow steps, 10 run" in " ".join(policy.provenance()["remarks"])
    said = load(path, profile="lerobot-0.6", flow_steps=4, replan_steps=25).provenance()["remarks"]
    assert not any("declares" in line for line in said)


def test_an_instruction_beyond_the_token_limit_is_not_cut(tmp_path):
    path = lerobot(tmp_path / "c")
    settings(path, tokenizer_max_length=12)
    policy = load(path, profile="lerobot-0.6")
    with pytest.raises(UserError, match="tokens, the checkpoint's limit is 12"):
        ask(policy)


# -- cameras ------------------------------------------------------------------------------------------------------
def test_cameras_are_fed_in_the_declared_order(tmp_path):
    path = lerobot(tmp_path / "c")
    settings(path, input_features=features("image", "image2"))
    forward = load(path, profile="lerobot-0.6")
    seen = observations(1)
    swapped = [type(seen[0])(seen[0].wrist_image, seen[0].image, seen[0].state, seen[0].prompt)]
    noise = noises(1, forward.noise_shape)
    settings(path, input_features=features("image2", "image"))
    turned = load(path, profile="lerobot-0.6")
    assert np.array_equal(turned.infer(swapped, noise).actions, forward.infer(seen, noise).actions)
    assert not np.array_equal(turned.infer(seen, noise).actions, forward.infer(seen, noise).actions)
    assert "wrist's view is fed first" in " ".join(verify_checkpoint(path)["notes"])


def test_renamed_and_empty_cameras_are_understood(tmp_path):
    path = lerobot(tmp_path / "c")
    settings(path, input_features=features("camera1", "camera2", "empty_camera_0"), empty_cameras=1)
    with pytest.raises(UserError, match="names the camera observation.images.camera1"):
        load(path, profile="lerobot-0.6")
    renamed(path, {IMAGES + "image": IMAGES + "camera2", IMAGES + "image2": IMAGES + "camera1"})
    assert load(path, profile="lerobot-0.6")._cameras == (1, 0)


@pytest.mark.parametrize(
    "cameras",
    [("image",), ("image", "image2", "image3"), ("image", "agentview"), ("top", "wrist"), ("image2",)],
    ids=str,
)
def test_other_cameras_than_liberos_two_are_refused(tmp_path, cameras):
    path = lerobot(tmp_path / "c")
    settings(path, input_features=features(*cameras))
    with pytest.raises(UserError, match="config.json: input_features names"):
        load(path, profile="lerobot-0.6")


# -- processor steps ----------------------------------------------------------------------------------------------
NEUTRAL = [
    step("to_batch_processor"),
    step("relative_actions_processor", enabled=False, exclude_joints=["gripper"], action_names=None),
]
TOKENIZER = dict(
    max_length=200,
    task_key="task",
    padding_side="right",
    padding="max_length",
    truncation=True,
    tokenizer_name="google/paligemma-3b-pt-224",
)


def test_the_pipeline_that_lerobot_saves_changes_nothing(tmp_path):
    path = lerobot(tmp_path / "c")
    expected = ask(load(path, profile="lerobot-0.6"))
    end = [step("tokenizer_processor", **TOKENIZER), step("device_processor", device="cuda", float_dtype=None)]
    renamed(path, {})
    steps(path, "preprocessor", lambda s: [s[0], *NEUTRAL, *s[1:], *end])
    steps(path, "postprocessor", lambda s: [*s, step("absolute_actions_processor", enabled=False), end[1]])
    settings(
        path, input_features=features("image", "image2"), output_features={"action": {"type": "ACTION", "shape": [7]}}
    )
    assert np.array_equal(ask(load(path, profile="lerobot-0.6")), expected)


@pytest.mark.parametrize(
    "which,change,message",
    [
        (
            "preprocessor",
            step("relative_actions_processor", enabled=True),
            "relative_actions_processor.enabled is True",
        ),
        ("postprocessor", step("absolute_actions_processor", enabled=1), "absolute_actions_processor.enabled is 1"),
        ("preprocessor", step("image_crop_resize_processor"), "step image_crop_resize_processor is not supported"),
        ("preprocessor", {"class": "mine.Clip", "config": {}}, "step mine.Clip is not supported"),
        ("preprocessor", step("tokenizer_processor", **TOKENIZER | {"padding_side": "left"}), "padding_side is left"),
        ("preprocessor", step("tokenizer_processor", **TOKENIZER | {"max_length": 64}), "which was it trained with"),
        ("preprocessor", step("tokenizer_processor", max_length=[1]), "tokenizer_processor: max_length is"),
        ("preprocessor", step("device_processor", float_dtype="bfloat16"), "float_dtype is bfloat16"),
        ("postprocessor", step("unnormalizer_processor", eps=1e-8), "stands there 2 times"),
        ("preprocessor", step("rename_observations_processor", rename_map=[1]), "it is a map of names"),
    ],
)
def test_a_step_that_would_change_something_is_refused(tmp_path, which, change, message):
    path = lerobot(tmp_path / "c")
    settings(path, tokenizer_max_length=200, input_features=features("image", "image2"))
    first = change.get("registry_name") == "rename_observations_processor"
    steps(path, which, lambda s: [change, *s] if first else [*s, change])
    with pytest.raises(UserError, match=message):
        load(path, profile="lerobot-0.6")


def test_the_state_is_normalised_before_it_is_written(tmp_path):
    path = lerobot(tmp_path / "c")
    steps(path, "preprocessor", lambda s: list(reversed(s)))
    with pytest.raises(UserError, match="the steps run as pi05_prepare"):
        load(path, profile="lerobot-0.6")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"n_obs_steps": 2}, "n_obs_steps is 2"),
        ({"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha is True"),
        ({"rtc_config": {"enabled": True}}, "real-time chunking"),
        ({"max_action_dim": 14}, "14 action dimensions, the tensor action_in_proj has 32"),
        ({"input_features": features("image", "image2", state=14)}, "observation.state has shape .14.*another robot"),
        ({"output_features": {"action": {"type": "ACTION", "shape": [6]}}}, "action has shape .6.*another robot"),
        ({"chunk_size": "50"}, "chunk_size is 50: Input should be a valid integer"),
        ({"input_features": 5}, "input_features is 5"),
    ],
)
def test_what_lerobots_config_declares_and_is_not_supported_is_refused(tmp_path, change, message):
    path = lerobot(tmp_path / "c")
    settings(path, **change)
    with pytest.raises(UserError, match=message):
        load(path, profile="lerobot-0.6")


# -- statistics ---------------------------------------------------------------------------------------------------
def stats_file(path: Path) -> Path:
    return next(path.glob("assets/**/norm_stats.json"))


def restate(path: Path, **entries) -> None:
    stats_file(path).write_text(json.dumps({"norm_stats": STATISTICS | entries}))


def padded(entry: dict, width: int, **fill) -> dict:
    return {key: values + [fill.get(key, 0.0)] * (width - len(values)) for key, values in entry.items()}


@pytest.mark.parametrize("fill", [{}, {"std": 1.0}, {"std": 1.0, "q01": -1.0, "q99": 1.0}], ids=str)
def test_padded_statistics_are_liberos(tmp_path, fill):
    path = openpi(tmp_path / "c")
    expected = ask(load(path, profile="openpi-state"))
    restate(path, state=padded(STATISTICS["state"], 32, **fill), actions=padded(STATISTICS["actions"], 32, **fill))
    assert np.array_equal(ask(load(path, profile="openpi-state")), expected)


def other(entry: dict, width: int) -> dict:
    """Statistics of another robot: `width` real numbers, padded to 32."""
    return padded({key: (values * 5)[:width] for key, values in entry.items()}, 32)


@pytest.mark.parametrize("kind", [openpi, lerobot])
@pytest.mark.parametrize(
    "name,width", [("state", w) for w in (6, 7, 9, 14, 32)] + [("actions", w) for w in (6, 8, 14, 32)]
)
def test_statistics_of_another_robot_are_refused(tmp_path, kind, name, width):
    path = kind(tmp_path / "c")
    if kind is openpi:
        restate(path, **{name: other(STATISTICS[name], width)})
    else:
        file = next(path.glob("*_normalizer*" if name == "state" else "*_unnormalizer*"))
        feature = "observation.state" if name == "state" else "action"
        changed = {f"{feature}.{key}": torch.tensor(v) for key, v in other(STATISTICS[name], width).items()}
        save_file(changed, file)
    with pytest.raises(UserError, match=f"statistics of {width} {name} numbers.*another robot"):
        load(path, profile="openpi" if kind is openpi else "lerobot-0.6")
    assert not verify_checkpoint(path)["ok"]


def changed(name: str, key: str, at: int, value) -> dict:
    entry = {k: list(v) for k, v in STATISTICS[name].items()}
    entry[key][at] = value
    return {name: entry}


@pytest.mark.parametrize(
    "entries,message",
    [
        (changed("actions", "q01", 2, 0.9), "actions: q01 is above q99 in dimension 2"),
        (changed("actions", "q99", 5, 1e9), r"actions: q99 is 1e\+09 in dimension 5"),
        (changed("state", "mean", 0, -1e9), r"state: mean is -1e\+09 in dimension 0"),
        (changed("state", "std", 3, -0.5), "state: std is negative in dimension 3"),
        (changed("state", "q01", 7, STATISTICS["state"]["q99"][7]), "the state do not vary in dimension 7"),
        (changed("state", "std", 3, float("nan")), "norm_stats.state.std.3 is nan"),
        (changed("state", "q99", 3, None), "norm_stats.state.q99.3 is None"),
        (changed("state", "q99", 3, "1"), "norm_stats.state.q99.3 is 1: Input should be a valid number"),
        ({"state": {"q01": [[0.0] * 8], "q99": [1.0] * 8}}, "norm_stats.state.q01.0 is"),
        ({"state": []}, "norm_stats.state is"),
        ({"actions": {**STATISTICS["actions"], "mean": [0.0] * 6}}, "vectors of one length"),
    ],
)
def test_statistics_that_no_data_can_have_are_refused(tmp_path, entries, message):
    path = openpi(tmp_path / "c")
    restate(path, **entries)
    with pytest.raises(UserError, match=message):
        load(path, profile="openpi")
    assert not verify_checkpoint(path)["ok"]


@pytest.mark.parametrize("place", ["physical-intelligence/libero", "libero", "."])
def test_statistics_are_found_where_trainers_leave_them(tmp_path, place):
    path = openpi(tmp_path / "c")
    expected = ask(load(path, profile="openpi-state"))
    (path / place).mkdir(parents=True, exist_ok=True)
    stats_file(path).rename(path / place / "norm_stats.json")
    shutil.rmtree(path / "assets")
    assert np.array_equal(ask(load(path, profile="openpi-state")), expected)


def test_a_key_chooses_among_several_and_names_a_file_elsewhere(tmp_path):
    path = openpi(tmp_path / "c")
    expected = ask(load(path, profile="openpi-state"))
    second = path / "assets" / "droid"
    second.mkdir()
    wider = {**STATISTICS, "state": {key: [2 * v for v in values] for key, values in STATISTICS["state"].items()}}
    (second / "norm_stats.json").write_text(json.dumps({"norm_stats": wider}))
    with pytest.raises(UserError, match="found 2 asset ids: droid .*, physical-intelligence/libero .*policy.asset_id"):
        load(path, profile="openpi-state")
    assert "asset_id" in [condition.split(":")[0] for condition in verify_checkpoint(path)["conditions"]]
    right = load(path, profile="openpi-state", asset_id="physical-intelligence/libero")
    assert np.array_equal(ask(right), expected)
    assert not np.array_equal(ask(load(path, profile="openpi-state", asset_id="droid")), expected)
    with pytest.raises(UserError, match="policy.asset_id is franka, of which .* has no norm_stats.json; found: droid"):
        load(path, profile="openpi-state", asset_id="franka")
    stats_file(path).rename(tmp_path / "mine.json")
    (tmp_path / "mine.json").write_text(json.dumps({"norm_stats": STATISTICS}))
    named = load(path, profile="openpi-state", norm_stats=tmp_path / "mine.json")
    assert np.array_equal(ask(named), expected)
    with pytest.raises(UserError, match="give one"):
        load(path, profile="openpi", asset_id="droid", norm_stats=tmp_path / "mine.json")
    with pytest.raises(UserError, match="leave the key out"):
        load(lerobot(tmp_path / "d"), profile="lerobot-0.6", asset_id="droid")
