"""Risk: a file that changes what a policy does is left out of its identity."""

from __future__ import annotations

from test_checkpoint_formats import lerobot, openpi, ours

from qlibero.policies import files_of
from qlibero.policies.pi05 import Pi05
from qlibero.policies.remote_family import Remote


def names(policy, root) -> list[str]:
    return [str(path.relative_to(root)) for path in files_of(policy)]


def test_every_file_that_a_policy_reads_is_listed(tmp_path):
    for folder in "abcd":
        (tmp_path / folder).mkdir()
    mine = Pi05(type="pi05", checkpoint=ours(tmp_path / "a" / "c"))
    assert names(mine, tmp_path / "a" / "c") == [
        "model.safetensors",
        "config.json",
        "assets/qlibero/libero/norm_stats.json",
        "tokenizer.json",
    ]
    theirs = Pi05(type="pi05", checkpoint=openpi(tmp_path / "b" / "c"), tokenizer=tmp_path / "b" / "tokenizer.json")
    assert names(theirs, tmp_path / "b") == [
        "c/model.safetensors",
        "c/config.json",
        "c/assets/physical-intelligence/libero/norm_stats.json",
        "tokenizer.json",
    ]
    hub = Pi05(type="pi05", checkpoint=lerobot(tmp_path / "d" / "c"), tokenizer=tmp_path / "d" / "tokenizer.json")
    assert names(hub, tmp_path / "d") == [
        "c/model.safetensors",
        "c/config.json",
        "c/policy_preprocessor.json",
        "c/policy_preprocessor_step_5_normalizer_processor.safetensors",
        "c/policy_postprocessor.json",
        "c/policy_postprocessor_step_5_unnormalizer_processor.safetensors",
        "tokenizer.json",
    ]


def test_an_untrained_policy_and_a_server(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    policy = Pi05(type="pi05", untrained={"config": tmp_path / "config.json"})
    assert names(policy, tmp_path) == ["config.json", "tokenizer.json"]
    assert files_of(Remote(type="remote", url="ws://127.0.0.1:1")) == []
