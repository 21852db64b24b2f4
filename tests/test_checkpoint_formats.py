"""Risk: weights loaded wrongly, partly, or under the wrong meaning.

Small checkpoints in exactly the formats that exist.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from pi05_small import PROMPTS, STATISTICS, conv_config, noises, observations, random_model, siglip_config
from safetensors.torch import load_file, save_file

from qlibero import cli
from qlibero.errors import GuardRefusal, UserError
from qlibero.policies import load_policy
from qlibero.policies.pi05 import Pi05
from qlibero.policies.pi05.checkpoint import open_checkpoint, write_checkpoint
from qlibero.policies.pi05.normalize import from_openpi
from qlibero.policies.pi05.tensor_table import tensor_table
from qlibero.policies.pi05.tokenizer import WordTokenizer, load_tokenizer, split_words
from qlibero.policies.pi05.verify import verify_checkpoint
from qlibero.policies.pi05.weights import sha256

EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
WORDS = WordTokenizer(
    sorted(
        {w for p in PROMPTS for w in split_words(p)} | {"task", "state", "action"} | {str(i) for i in range(-1, 256)}
    )
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ours(path: Path) -> Path:
    write_checkpoint(
        path,
        random_model(conv_config()),
        name="small",
        statistics=STATISTICS,
        tokenizer=vocabulary().to_json(),
    )
    return path


def vocabulary() -> WordTokenizer:
    return WordTokenizer(sorted({w for p in PROMPTS for w in split_words(p)}))


def openpi(path: Path, *, tied: bool = False) -> Path:
    """openpi's converter: names without prefix, the tied embedding saved under lm_head, assets beside the weights."""
    state = {name: t.clone().bfloat16() for name, t in random_model(siglip_config()).state_dict().items()}
    if tied:
        state["paligemma_with_expert.paligemma.lm_head.weight"] = state.pop(EMBEDDING)
        state["paligemma_with_expert.gemma_expert.lm_head.weight"] = torch.zeros(300, 48, dtype=torch.bfloat16)
    assets = path / "assets" / "physical-intelligence" / "libero"
    assets.mkdir(parents=True)
    save_file(state, path / "model.safetensors")
    (path / "config.json").write_text(
        json.dumps(
            {
                "action_dim": 32,
                "action_horizon": 10,
                "paligemma_variant": "gemma_2b",
                "action_expert_variant": "gemma_300m",
                "precision": "bfloat16",
            }
        )
    )
    (assets / "norm_stats.json").write_text(json.dumps({"norm_stats": STATISTICS}))
    (path.parent / "tokenizer.json").write_text(WORDS.to_json())
    return path


def lerobot(path: Path, mode: str = "QUANTILES") -> Path:
    """LeRobot: everything prefixed, both lm_heads, statistics inside processor files."""
    state = {f"model.{name}": t.clone() for name, t in random_model(siglip_config()).state_dict().items()}
    state["model.paligemma_with_expert.paligemma.lm_head.weight"] = torch.ones(300, 64)
    state["model.paligemma_with_expert.gemma_expert.lm_head.weight"] = torch.ones(300, 48)
    path.mkdir()
    save_file(state, path / "model.safetensors")
    (path / "config.json").write_text(
        json.dumps({"type": "pi05", "chunk_size": 10, "n_action_steps": 10, "max_state_dim": 32})
    )
    for which, step, feature, entry in (
        ("preprocessor", "normalizer_processor", "observation.state", STATISTICS["state"]),
        ("postprocessor", "unnormalizer_processor", "action", STATISTICS["actions"]),
    ):
        file = f"policy_{which}_step_5_{step}.safetensors"
        save_file({f"{feature}.{key}": torch.tensor(value) for key, value in entry.items()}, path / file)
        norm_map = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
        steps = [
            {
                "registry_name": step,
                "config": {"eps": 1e-8, "features": {}, "norm_map": norm_map},
                "state_file": file,
            }
        ]
        if which == "preprocessor":
            steps.append({"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}})
        (path / f"policy_{which}.json").write_text(json.dumps({"name": f"policy_{which}", "steps": steps}))
    (path.parent / "tokenizer.json").write_text(WORDS.to_json())
    return path


def load(path: Path, **changes):
    settings = {"type": "pi05", "checkpoint": path, **changes}
    if (path.parent / "tokenizer.json").exists():
        settings.setdefault("tokenizer", path.parent / "tokenizer.json")
    return load_policy(Pi05(**settings))


def ask(policy) -> np.ndarray:
    return policy.infer(observations(1), noises(1, policy.noise_shape)).actions


def test_our_own_format_round_trip(tmp_path):
    policy = load(ours(tmp_path / "c"))
    assert policy.provenance()["sha256"] == sha256(tmp_path / "c" / "model.safetensors")
    assert policy.provenance()["profile"] == "qlibero"
    original = {name: t.bfloat16().float() for name, t in random_model(conv_config()).state_dict().items()}
    assert all(torch.equal(t, original[name]) for name, t in policy.model.state_dict().items())
    assert np.isfinite(ask(policy)).all()


def test_openpi_directory_and_its_tied_embedding(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    plain, tied = openpi(tmp_path / "a" / "c"), openpi(tmp_path / "b" / "c", tied=True)
    first, second = load(plain, profile="openpi"), load(tied, profile="openpi")
    assert np.array_equal(ask(first), ask(second))
    assert "tied" in " ".join(tensor_table(open_checkpoint(tied)).notes)


def test_lerobot_directory_is_the_same_network(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    theirs, same = lerobot(tmp_path / "a" / "c"), openpi(tmp_path / "b" / "c")
    policy = load(theirs, profile="lerobot-0.6")
    reference = load(same, profile="openpi-state").model.state_dict()
    assert all(torch.equal(t.bfloat16().float(), reference[name]) for name, t in policy.model.state_dict().items())
    assert policy.noise_shape == (10, 32) and ask(policy).shape == (1, 10, 7)


def test_both_normalisation_modes_are_read_from_the_files(tmp_path):
    answers = []
    for mode in ("QUANTILES", "MEAN_STD"):
        (tmp_path / mode).mkdir()
        path = lerobot(tmp_path / mode / "c", mode)
        assert (
            verify_checkpoint(path)["statistics"]["actions"]["mode"]
            == {"QUANTILES": "quantile", "MEAN_STD": "mean_std"}[mode]
        )
        answers.append(ask(load(path, profile="lerobot-0.6")))
    assert np.abs(answers[0] - answers[1]).max() > 1e-3


def test_the_profile_changes_the_answer_and_is_never_guessed(tmp_path):
    path = lerobot(tmp_path / "c")
    with pytest.raises(UserError, match="lerobot-0.4 or lerobot-0.6"):
        load(path)
    assert np.abs(ask(load(path, profile="lerobot-0.4")) - ask(load(path, profile="lerobot-0.6"))).max() > 1e-4
    with pytest.raises(UserError, match="is for openpi checkpoints"):
        load(path, profile="openpi")


def rewrite(path: Path, change) -> None:
    """Change the tensors of a checkpoint in place."""
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors")


def test_missing_extra_and_misshapen_tensors_are_listed(tmp_path):
    path = ours(tmp_path / "c")

    def damage(state: dict) -> None:
        del state["action_out_proj.bias"]
        state["surprise"] = torch.zeros(1)
        state["time_mlp_in.weight"] = torch.zeros(3, 3)

    rewrite(path, damage)
    with pytest.raises(UserError) as error:
        load(path)
    for word in (
        "missing: action_out_proj.bias",
        "extra: surprise",
        "time_mlp_in.weight (3, 3), expected (48, 48)",
    ):
        assert word in str(error.value)
    report = verify_checkpoint(path)
    assert not report["ok"] and report["missing"] == ["action_out_proj.bias"] and report["extra"] == ["surprise"]


def test_non_finite_tensors_are_refused(tmp_path):
    path = ours(tmp_path / "c")
    rewrite(path, lambda state: state["action_in_proj.weight"].view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(UserError, match="NaN or infinity: action_in_proj.weight"):
        load(path)
    assert verify_checkpoint(path)["non_finite"] == ["action_in_proj.weight"]


def test_other_weights_than_the_config_was_written_for_are_refused(tmp_path):
    path = ours(tmp_path / "c")
    load(path, sha256=sha256(path / "model.safetensors"))
    with pytest.raises(GuardRefusal, match="expects " + "0" * 64):
        load(path, sha256="0" * 64)


@pytest.mark.parametrize(
    "damage,message",
    [
        (
            lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:1000]),
            "cannot be read as safetensors",
        ),
        (lambda p: (p / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda p: (p / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda p: next(p.glob("assets/**/norm_stats.json")).unlink(), "copy it here by hand"),
        (lambda p: (p / "tokenizer.json").unlink(), "does not exist"),
        (lambda p: ((p / "model.safetensors").unlink(), (p / "params").mkdir()), "JAX checkpoint"),
    ],
)
def test_every_broken_directory_says_what_to_do(tmp_path, damage, message):
    path = ours(tmp_path / "c")
    damage(path)
    with pytest.raises(UserError, match=message):
        load(path)


def test_verify_says_all_there_is_to_say(tmp_path):
    report = verify_checkpoint(lerobot(tmp_path / "c"))
    assert report["ok"] and report["kind"] == "lerobot" and report["problems"] == []
    assert report["profile"]["guess"] == "lerobot-0.4" and not report["profile"]["proven"]
    assert set(report["sha256"]) >= {"model.safetensors", "config.json", "policy_preprocessor.json"}
    assert any("lm_head" in note for note in report["notes"])
    assert json.dumps(report)


def settings(path: Path, **changes) -> None:
    """Change keys of config.json; None removes one."""
    content = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def verified(path: Path, capfd) -> tuple[int, dict]:
    """Exit status and last line of `qlibero checkpoint verify`."""
    status = cli.main(["checkpoint", "verify", str(path)])
    out, _ = capfd.readouterr()
    assert out.count("\n") == 1
    return status, json.loads(out)


@pytest.mark.parametrize("change", [{"normalization": "quantiles"}, {"normalization": None}], ids=str)
def test_a_normalisation_nobody_knows_is_refused_not_taken_for_another(tmp_path, change, capfd):
    """A typo used to be read as mean/std: other actions, and nothing said so."""
    path = ours(tmp_path / "c")
    settings(path, **change)
    with pytest.raises(UserError, match="write one of quantile, mean_std"):
        load(path)
    status, report = verified(path, capfd)
    assert status == 1 and not report["ok"] and "write one of quantile, mean_std" in report["problems"][0]
    with pytest.raises(UserError, match="'quantiles' is not known"):
        from_openpi(STATISTICS["state"], "quantiles", "test")


def test_verify_exits_0_only_for_what_loads_as_it_says(tmp_path, capfd):
    for folder in "abc":
        (tmp_path / folder).mkdir()
    path = ours(tmp_path / "a" / "c")
    status, report = verified(path, capfd)
    assert status == 0 and report["ok"] and report["conditions"] == []
    load(path)

    path = openpi(tmp_path / "b" / "c")
    status, report = verified(path, capfd)
    assert status == 0 and [said.split(":")[0] for said in report["conditions"]] == ["profile", "tokenizer"]
    assert report["statistics"]["state"]["mode"] == "quantile"
    assert "openpi normalises every pi0.5 by quantiles" in report["statistics"]["state"]["why"]
    load(path, profile=report["profile"]["guess"], tokenizer=tmp_path / "b" / "tokenizer.json")

    path = lerobot(tmp_path / "c" / "c", "MEAN_STD")
    status, report = verified(path, capfd)
    assert status == 0 and len(report["conditions"]) == 2
    assert report["statistics"]["actions"]["why"] == "policy_postprocessor.json says MEAN_STD"
    load(path, profile=report["profile"]["guess"], tokenizer=tmp_path / "c" / "tokenizer.json")

    assert cli.main(["checkpoint", "verify", str(tmp_path / "nowhere")]) == 2
    assert json.loads(capfd.readouterr().out)["error"]["exit_status"] == 2


def shorten(path: Path) -> None:
    file = next(path.glob("assets/**/norm_stats.json"))
    content = json.loads(file.read_text())
    content["norm_stats"]["state"] = {key: value[:3] for key, value in content["norm_stats"]["state"].items()}
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
        (lambda p: (p / "tokenizer.json").write_text("{"), "cannot be read as JSON"),
        (
            lambda p: (p / "tokenizer.json").write_text(WordTokenizer([f"w{i}" for i in range(200)]).to_json()),
            "do not belong together",
        ),
        (lambda p: settings(p, profile="lerobot-0.3"), "'lerobot-0.3' is not known"),
        (shorten, "statistics of 3 state numbers"),
        (lambda p: next(p.glob("assets/**/norm_stats.json")).unlink(), "copy it here by hand"),
        (lambda p: rewrite(p, lambda state: state.pop("time_mlp_in.bias")), "missing: time_mlp_in.bias"),
    ],
)
def test_verify_finds_what_would_not_load(tmp_path, damage, message, capfd):
    path = ours(tmp_path / "c")
    damage(path)
    with pytest.raises(UserError, match=message):
        load(path)
    status, report = verified(path, capfd)
    assert status == (2 if "error" in report else 1)
    said = report["error"]["message"] if "error" in report else " ".join(report["problems"])
    assert re.search(message, said), said


def test_the_guess_follows_what_lerobot_wrote_and_when(tmp_path):
    path = lerobot(tmp_path / "c")
    settings(path, use_relative_actions=False)
    assert verify_checkpoint(path)["profile"]["guess"] == "lerobot-0.6"
    settings(path, use_relative_actions=True)
    with pytest.raises(UserError, match="use_relative_actions is True"):
        verify_checkpoint(path)


def test_sentencepiece_and_tokenizer_json(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{p} Task: State: {i} Action:" for i in range(40) for p in PROMPTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "small"),
        vocab_size=120,
        bos_id=2,
        eos_id=1,
        unk_id=3,
        pad_id=0,
        model_type="bpe",
        byte_fallback=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    mine = load_tokenizer(tmp_path / "small.model")
    raw = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "small.model"))
    # openpi: encode(task, add_bos=True) + encode("\n")
    assert mine.encode((PROMPTS[0], "\n")) == raw.encode(PROMPTS[0], add_bos=True) + raw.encode("\n")

    words = {
        "<pad>": 0,
        "<eos>": 1,
        "<bos>": 2,
        "<unk>": 3,
        **{w: i + 4 for i, w in enumerate(sorted(split_words(PROMPTS[0])))},
    }
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    ids = load_tokenizer(tmp_path / "tokenizer.json").encode((PROMPTS[0], "\n"))
    assert ids == [2, *(words[w] for w in PROMPTS[0].split())]
    with pytest.raises(UserError, match="not a sentencepiece model"):
        (tmp_path / "broken.model").write_bytes(b"nothing")
        load_tokenizer(tmp_path / "broken.model")
