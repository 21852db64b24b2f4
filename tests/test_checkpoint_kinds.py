"""Risk: weights that are not there, not whole or another policy's are loaded, or refused without the hint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint_formats import ask, lerobot, load, openpi, ours, rewrite, settings

from qlibero.errors import UserError
from qlibero.policies.pi05.checkpoint import open_checkpoint
from qlibero.policies.pi05.verify import verify_checkpoint

LAYER = "paligemma_with_expert.gemma_expert.model.layers.1.self_attn."


def shard(path: Path, parts: int) -> None:
    state = load_file(path / "model.safetensors")
    names = sorted(state)
    files = {name: f"model-{i % parts + 1:05d}-of-{parts:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (path / "model.safetensors").unlink()


@pytest.mark.slow
def test_shards_and_prefixes_are_the_same_policy(tmp_path):
    (tmp_path / "a").mkdir()
    path = openpi(tmp_path / "a" / "c")
    expected = ask(load(path, profile="openpi"))
    state = load_file(path / "model.safetensors")
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "model.", "_orig_mod.module.model."):
        save_file({prefix + name: tensor for name, tensor in state.items()}, path / "model.safetensors")
        assert np.array_equal(ask(load(path, profile="openpi")), expected), prefix
    inside = {name.replace("gemma_expert.", "gemma_expert._orig_mod."): tensor for name, tensor in state.items()}
    save_file(inside, path / "model.safetensors")
    assert np.array_equal(ask(load(path, profile="openpi")), expected)
    shard(path, 3)
    assert np.array_equal(ask(load(path, profile="openpi")), expected)
    assert verify_checkpoint(path)["ok"] and len(open_checkpoint(path).files) == 5


def test_shards_that_are_not_whole_are_refused(tmp_path):
    path = openpi(tmp_path / "c")
    whole = (path / "model.safetensors").read_bytes()
    shard(path, 2)
    index = path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]

    def refused(change: dict, message: str) -> None:
        index.write_text(json.dumps({"weight_map": {k: v for k, v in (listed | change).items() if v}}))
        with pytest.raises(UserError, match=message):
            open_checkpoint(path)

    refused(
        {"action_in_proj.bias": "../model-00001-of-00002.safetensors"}, "weight_map.action_in_proj.bias is ../model"
    )
    refused(
        {"action_in_proj.bias": "model-00009-of-00002.safetensors"}, "model-00009-of-00002.safetensors; the download"
    )
    refused({"action_in_proj.bias": None}, "is not where .* says .nowhere.")
    refused({"gone.weight": "model-00001-of-00002.safetensors"}, "1 tensor in no shard, first gone.weight")
    (path / "model.safetensors").write_bytes(whole)
    refused({}, "one of them is stale")


def other_name(p: Path) -> None:
    (p / "model.safetensors").rename(p / "pi05.safetensors")


def lost_index(p: Path) -> None:
    shard(p, 2)
    (p / "model.safetensors.index.json").unlink()


def below(p: Path) -> None:
    shutil.move(p / "model.safetensors", p / "x.safetensors")
    (p / "checkpoints" / "last" / "pretrained_model").mkdir(parents=True)


def adapter(p: Path) -> None:
    (p / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    "damage,message",
    [
        (other_name, "no model.safetensors but pi05.safetensors; if that is the policy, rename it"),
        (lost_index, "without their model.safetensors.index.json: download it too"),
        (below, "folder above a checkpoint: write the folder .*last/pretrained_model"),
        (adapter, "LoRA adapters .adapter_config.json..* merge them .* move the adapter files away"),
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "pickled torch files .pytorch_model.bin"),
        (
            lambda p: ((p / "model.safetensors").unlink(), (p / "model.safetensors").symlink_to("../gone")),
            "link to ../gone, which is not there",
        ),
        (
            lambda p: (p / "model.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
            ),
            "git lfs pull",
        ),
        (
            lambda p: (p / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "config.json is a Git LFS pointer",
        ),
        (
            lambda p: ((p / "model.safetensors").unlink(), (p / "manifest.ocdbt").write_text("")),
            "JAX checkpoint .orbax.; convert",
        ),
        (lambda p: settings(p, type="smolvla"), "type is 'smolvla': this is a SmolVLA policy"),
        (lambda p: settings(p, type="pi0"), "this is a pi0 policy"),
        (lambda p: settings(p, type="pi0_fast"), "this is a pi0-FAST policy"),
        (lambda p: settings(p, model_type="gr00t_n1_5"), "this is a GR00T policy"),
        (lambda p: settings(p, type="act"), "that qlibero does not know"),
        (lambda p: settings(p, type=["pi05"]), "type is"),
        (
            lambda p: rewrite(
                p, lambda s: (s.pop("time_mlp_in.weight"), s.update({"action_time_mlp_in.weight": torch.ones(1)}))
            ),
            "those of a pi0 policy",
        ),
        (
            lambda p: rewrite(p, lambda s: s.update({f"base.{LAYER}q_proj.lora_A.weight": torch.ones(2, 2)})),
            "LoRA adapters among its tensors",
        ),
    ],
)
def test_each_other_thing_is_named_with_its_cure(tmp_path, damage, message):
    path = openpi(tmp_path / "c")
    damage(path)
    with pytest.raises(UserError, match=message):
        load(path, profile="openpi")


def test_a_name_that_stands_there_twice_is_refused(tmp_path):
    path = openpi(tmp_path / "c")
    rewrite(path, lambda state: state.update({"model.action_in_proj.bias": state["action_in_proj.bias"] + 1}))
    with pytest.raises(UserError, match="1 tensor twice: action_in_proj.bias and model.action_in_proj.bias"):
        load(path, profile="openpi")
    assert not verify_checkpoint(path)["ok"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.int16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_weights_are_of_three_floating_types(tmp_path, dtype):
    path = ours(tmp_path / "c")
    rewrite(path, lambda state: state.update({"time_mlp_in.weight": state["time_mlp_in.weight"].to(dtype)}))
    with pytest.raises(UserError, match="of another type than F32, BF16, F16: time_mlp_in.weight"):
        load(path)
    assert "time_mlp_in.weight" in " ".join(verify_checkpoint(path)["problems"])


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.zero_(), "1 tensor with all zeros: time_mlp_in.weight"),
        (lambda t: t.view(-1)[5:6].fill_(1e30), r"values up to 1e\+30: time_mlp_in.weight"),
        (lambda t: t.view(-1)[5:6].fill_(-4e8), r"values up to 4e\+08: time_mlp_in.weight"),
        (lambda t: t.view(-1)[5:6].fill_(float("-inf")), "NaN or infinity: time_mlp_in.weight"),
    ],
)
def test_numbers_no_trained_network_holds_are_refused(tmp_path, change, message):
    path = ours(tmp_path / "c")
    rewrite(path, lambda state: change(state["time_mlp_in.weight"]))
    with pytest.raises(UserError, match=message):
        load(path)
    report = verify_checkpoint(path)
    assert not report["ok"] and set(report["faults"]) == {"time_mlp_in.weight"}


def test_a_vector_of_zeros_loads_and_is_named(tmp_path):
    path = ours(tmp_path / "c")
    rewrite(path, lambda state: state["time_mlp_in.bias"].zero_())
    load(path)
    report = verify_checkpoint(path)
    assert report["ok"] and any("zeros alone" in note and "time_mlp_in.bias" in note for note in report["notes"])


def test_a_lerobot_directory_without_its_statistics_file_says_what_lerobot_would_do(tmp_path):
    path = lerobot(tmp_path / "c")
    next(path.glob("*_normalizer_processor.safetensors")).unlink()
    with pytest.raises(UserError, match="which is not there; without it LeRobot leaves"):
        load(path, profile="lerobot-0.6")
