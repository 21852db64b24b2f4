"""Risk: an arm is not what it says it overrides, weights are loaded twice, or a difference of all is told as one of
quantization."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from qlibero import cli
from qlibero.config.config_hash import config_hash
from qlibero.config.dump import dump_resolved
from qlibero.config.load import ConfigError, load_experiment
from qlibero.config.sweep import load_sweep
from qlibero.launch import cells
from qlibero.launch.plan import plan
from qlibero.policies.pi05 import load as loading
from qlibero.quant import prepare
from qlibero.results.compare import compare_runs
from qlibero.results.ledger import read_ledger
from qlibero.run import arms

ARMS = """arms:
  - baseline
  - {name: one, policy: {flow_steps: 1}}
  - {name: long, policy: {replan_steps: 10}}
  - {name: other, policy: {untrained: {seed: 1}}}
  - {name: w4, backend: fake, grid: {policy.flow_steps: [1, 10]}}
"""
ONE = "w4.flow_steps-1"


@pytest.fixture
def study(tiny_experiment: Path, tmp_path: Path) -> Path:
    """The tiny experiment with arms that differ in steps, replanning, weights and quantization."""
    path = tmp_path / "study.yaml"
    path.write_text(f"extends: {tiny_experiment}\ntasks: [0]\nepisodes_per_task: 2\nmax_steps: 10\n{ARMS}")
    return path


def refused(path: Path, arms_: str, *sets: str) -> str:
    before = path.read_text()
    path.write_text(before.partition("arms:")[0] + arms_)
    with pytest.raises(ConfigError) as error:
        load_experiment(path, sets)
    path.write_text(before)
    return str(error.value)


def test_the_older_word_means_the_same_arms_with_the_same_hashes(tiny_experiment):
    shipped = {  # what version 1 of these files hashed to
        ("llm_w4a8_fake", "baseline"): "8614bdaf72831c10",
        ("compare_backends", "aa"): "1bea046e49bfb4bc",
        ("quantization_table", "w4a4-llm+expert"): "c88aa16a28aa4fd5",
    }
    for (name, arm), digest in shipped.items():
        experiment = load_experiment(Path(__file__).parents[1] / f"configs/experiments/{name}.yaml", environ={})
        assert config_hash(experiment, next(a for a in experiment.arms() if a.name == arm)) == digest
    older = load_experiment(tiny_experiment)
    assert "arms:\n- baseline\n- fake\n" in dump_resolved(older) and "backends:" not in dump_resolved(older)
    for sets in (["arms=[baseline,fake]"], ["backends=[baseline,fake]"]):
        assert load_experiment(tiny_experiment, sets).arms() == older.arms()


def test_an_arm_is_the_experiment_s_policy_but_for_what_it_says(study, tmp_path):
    experiment = load_experiment(study)
    found = {arm.name: arm for arm in experiment.arms()}
    assert list(found) == ["baseline", "one", "long", "other", ONE, "w4.flow_steps-10"]
    assert [arm.policy.flow_steps for arm in found.values()] == [10, 1, 10, 10, 1, 10]
    assert found["long"].policy.replan_steps == 10 and found["other"].policy.untrained.seed == 1
    assert found["other"].policy.untrained.config == experiment.policy.untrained.config
    alone = load_experiment(study, ["policy.flow_steps=1", "arms=[baseline]"])
    assert config_hash(experiment, found["one"]) == config_hash(alone, alone.arms()[0])
    assert len({config_hash(experiment, arm) for arm in found.values()}) == 6
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_resolved(experiment))
    assert load_experiment(resolved) == experiment
    assert yaml.safe_load(resolved.read_text())["arms"][1]["policy"] == {"flow_steps": 1}


def test_what_an_arm_cannot_be_is_told_where_it_was_written(study):
    for word in ("arms", "backends"):
        said = refused(study, f"{word}:\n  - baseline\n  - {{name: x, policy: {{flow_step: 1}}}}\n")
        assert f"study.yaml:7:24: {word}.1.policy.flow_step: unknown key; did you mean flow_steps?" in said
    for entry, told in {
        "{name: x}": "arms.1.backend: is missing, and x differs in nothing else; write e.g. fake",
        "{name: x, flow_steps: 1}": "arms.1.flow_steps: unknown key; write policy: {flow_steps: …}",
        "{name: x, quant: {weight_bits: 8}}": "arms.1.quant: baseline is unquantized; remove its quant, or write e.g.",
        "{backend: aa, policy: {flow_steps: 1}}": "arms.1.policy: aa is the baseline again",
        "{name: x, policy: {checkpoint: gone}}": "arms.1.policy.checkpoint: no such file or directory",
        "{backend: fake, policy: {type: remote, url: 'ws://h:1'}}": "arms.1: a remote policy runs as it is",
        "{name: x, grid: {policy.flow_steps: 3}}": "arms.1.grid.policy.flow_steps: should be a list of values (got 3)",
        "{name: x, grid: {policy.flow_steps: [1, no]}}": "arms.2.policy.flow_steps: should be a whole number",
        "{name: x, grid: {name: [a, b]}}": "arms.1.grid.name: an arm of a grid is named after its values",
        "{name: x, grid: {policy.flow_steps: [1, 1]}}": "two arms are called x.flow_steps-1",
    }.items():
        assert told in refused(study, f"arms:\n  - baseline\n  - {entry}\n"), entry
    both = refused(study, "arms: [baseline]\nbackends: [fake]\n")
    assert "study.yaml:6:1: backends: is the older word for arms, and both are written" in both
    # of a policy that is wrong itself nothing is told twice
    assert refused(study, ARMS, "policy.dtype=f3").count("\n") == 0


def test_grids_of_cells_and_of_arms_multiply_and_a_set_reaches_into_an_arm(study):
    study.write_text(f"{study.read_text()}grid: {{seed: [7, 8], arms.1.policy.flow_steps: [1, 2]}}\n")
    found = load_sweep(study).cells
    assert [cell.id for cell in found] == [f"seed-{seed}.flow_steps-{steps}" for seed in (7, 8) for steps in (1, 2)]
    assert [cell.experiment.arms()[1].policy.flow_steps for cell in found] == [1, 2, 1, 2]
    assert all(len(cell.experiment.arms()) == 6 for cell in found)
    manifest = cells.make_manifest(load_sweep(study, ["arms.0.policy.flow_steps=4"]), study.parent / "out")
    document = plan(manifest).to_json()
    assert document["cells"][0]["overrides"]["baseline"] == ["flow_steps 4"]
    assert document["cells"][0]["overrides"]["long"] == ["replan_steps 10"]


def test_weights_that_arms_have_in_common_are_loaded_once(study, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "ARTIFACTS", tmp_path / "artifacts")
    made = []
    plain = loading.initialize
    monkeypatch.setattr(loading, "initialize", lambda model, seed: made.append(seed) or plain(model, seed))
    experiment = load_experiment(study)
    policies, meta = arms.load_arms(experiment, experiment.arms(), run_dir=tmp_path / "run")
    assert made == [0, 1]
    networks = {name: policy.model for name, policy in policies.items()}
    assert networks["baseline"] is networks["one"] is networks["long"] is not networks["other"]
    assert networks[ONE] is networks["w4.flow_steps-10"]  # one artifact, packed once
    own = [json.dumps(meta[name]["identity"], sort_keys=True) for name in ("baseline", "one", ONE, "w4.flow_steps-10")]
    assert len(set(own)) == 4
    assert len({about["probe"] for about in meta.values()}) == 5 and meta["one"]["policy"]["flow_steps"] == 1
    assert meta["one"]["label"] == "one (float32, flow_steps 1)"
    # together or alone, an arm is the same
    for name in ("one", ONE):
        alone = next(arm for arm in experiment.arms() if arm.name == name)
        again = arms.load_arms(experiment, [alone], run_dir=tmp_path / "run")[1][name]
        assert (again["probe"], again["identity"]) == (meta[name]["probe"], meta[name]["identity"])


def test_a_run_of_unlike_arms_is_paired_resumed_and_told(study, tmp_path, capsys):
    """Real simulators: what pairs share, what is said of them, and that an arm acts as it would in a run of its own."""
    out = tmp_path / "run"
    sets = ("--set", "videos=1")
    assert cli.main(["run", str(study), "--out", str(out), "--set", "episodes_per_task=1", *sets]) == 0
    first = {arm.name: read_ledger(out, arm.name) for arm in load_experiment(study).arms()}
    assert cli.main(["run", str(study), "--out", str(out), *sets]) == 0
    after = {name: read_ledger(out, name) for name in first}
    assert all(len(after[name]) == 2 and after[name][0] == first[name][0] for name in first)
    capsys.readouterr()
    document = compare_runs([out])["arms"]
    assert {name: found["unlike"] for name, found in document.items()} == {
        "one": {"flow_steps": [10, 1]},
        "long": {"replan_steps": [5, 10]},
        "other": {"weights": [document_weights(out, "baseline"), document_weights(out, "other")]},
        ONE: {"flow_steps": [10, 1]},
        "w4.flow_steps-10": {},
    }
    assert all(found["pairs"] == 2 for found in document.values())
    assert "replan_steps 10 instead of 5 (another protocol of the policy)" in document["long"]["sentence"]
    assert [record.replans for record in after["long"]] == [1, 1] and after["one"][0].replans == 2
    alone = tmp_path / "alone"
    own = ["policy.flow_steps=1", "arms=[baseline]", "episodes_per_task=1", "videos=0"]
    assert cli.main(["run", str(study), "--out", str(alone), *(word for set_ in own for word in ("--set", set_))]) == 0
    assert read_ledger(alone, "baseline")[0].action_digest == after["one"][0].action_digest
    assert after["one"][0].action_digest != after["baseline"][0].action_digest
    for command in (
        ["status", str(out)],
        ["videos", str(out), "--episodes", "2"],
        ["export", str(out), "-o", str(tmp_path / "e.jsonl")],
        ["report", str(out), "-o", str(tmp_path / "r.html")],
        ["compare", str(tmp_path / "e.jsonl")],
    ):
        assert cli.main(command) == 0, command
    assert "flow_steps 1 instead of 10" in (tmp_path / "r.html").read_text()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["arms"]["one"]["unlike"] == {"flow_steps": [10, 1]}
    assert len(list((out / ONE / "videos").glob("*.mp4"))) == 2


def document_weights(run: Path, arm: str) -> str:
    about = json.loads((run / arm / "meta.json").read_text())["policy"]
    return f"{about['name']} {about['sha256'][:8]}"
