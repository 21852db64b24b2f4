"""Risk: a typo in a YAML file becomes a wrong number, or a traceback, instead of a line that says what to write."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from qlibero.config import arms, inits, quantization, schema
from qlibero.config.config_hash import config_hash
from qlibero.config.dump import dump_resolved, editor_schema
from qlibero.config.load import PATH_KEYS, SUITE_PATHS, ConfigError, known_backends, load_experiment
from qlibero.config.policies import path_keys
from qlibero.config.schema import Experiment, Quant
from qlibero.config.yaml_text import parse
from qlibero.places import REPOSITORY

CONFIGS = REPOSITORY / "configs"
GOOD: dict[str, Any] = {
    "suite": "libero_object",
    "policy": {"type": "pi05", "checkpoint": "weights"},
    "quant": {"method": "rtn", "layout": "llm"},
    "backends": ["baseline", "fake"],
}


def write(directory: Path, text: str | dict[str, Any], name: str = "x.yaml") -> Path:
    path = directory / name
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False))
    return path


def load(path: Path, *sets: str, environ: dict[str, str] | None = None) -> Experiment:
    return load_experiment(path, sets, environ or {}, check_files=False)


def complaints(path: Path, *sets: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, *sets, environ=environ)
    assert caught.value.exit_status == 2
    return [line.removeprefix(f"{path}:").removeprefix(f"{path.parent}/") for line in str(caught.value).splitlines()]


GOOD_TEXT = """\
suite: libero_object
policy: {type: pi05, checkpoint: weights}
quant:
  method: rtn
  layout: llm
backends: [baseline, fake]
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("suit: libero_goal", "7:1: suit: unknown key; did you mean suite?"),
        ("suite: libero_goal", "7:1: duplicate key suite (first on line 1); keep one of them"),
        ("seed: yes", "7:1: seed: should be a whole number (got 'yes')"),
        ("seed: true", "7:1: seed: should be a whole number (got true)"),
        ("tasks: [0, 10]", "7:12: tasks.1: libero_object has tasks 0 to 9"),
        ("tasks: some", "7:1: tasks: should be 'all' or a list or `key: value` lines (got 'some')"),
        ("workers: -1", "7:1: workers: should be 'auto' or greater than or equal to 1 (got -1)"),
        ("stop: {margin: .nan}", "7:8: stop.margin: should be a finite number (got nan)"),
        ("stop: {margin: 2}", "7:8: stop.margin: should be less than 1 (got 2)"),
        ("launch: {slurm: {tme: 1}}", "7:18: launch.slurm.tme: unknown key; did you mean time?"),
        (
            "launch: {slurm: {time: 12:30:00}}\nvideos: many",
            "8:1: videos: should be 'all' or a whole number (got 'many')",
        ),
        ("tracking: [wandb, trakio]", "7:19: tracking.1: should be 'wandb', 'trackio' or the module"),
        ("retries: [1", "8:1: not valid YAML"),
        ("retries: !!python/name:os.system x", "7:10: tag !!python/name:os.system is not understood here"),
        ("extends: nowhere.yaml", "7:1: cannot read"),
        ("extends: {a: 1}", "7:1: extends: should be a file or a list of files"),
        ("extends: x.yaml", "7:1: extends: goes round in a circle"),
        ("? [a, b]\n: 1", "7:3: a key should be a word"),
        ("launch: &loop {slurm: *loop}", "7:9: an alias contains itself"),
        ("max_steps: 0", "7:1: max_steps: should be greater than or equal to 1 (got 0)"),
    ],
)
def test_one_mistake_one_line_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    lines = complaints(write(tmp_path, GOOD_TEXT + text + "\n"))
    assert any(line.startswith(expected) for line in lines), lines
    assert len(lines) == 1, lines


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        ({"suite": "libero_objct"}, "1:1: suite", "did you mean libero_object?"),
        ({"policy": {"type": "pi5", "checkpoint": "w"}}, "policy", "did you mean pi05?"),
        ({"policy": {"checkpoint": "w"}}, "policy", "say which type"),
        ({"policy": {"type": "pi05"}}, "policy", "give checkpoint: DIRECTORY"),
        ({"policy": {"type": "pi05", "checkpoint": "w", "untrained": {"config": "c"}}}, "policy.untrained", "not both"),
        (
            {"policy": {"type": "pi05", "checkpoint": "w", "chekpoint": "w"}},
            "policy.chekpoint",
            "did you mean checkpoint?",
        ),
        ({"policy": {"type": "pi05", "untrained": {}}}, "policy.untrained.config", "is missing"),
        (
            {"policy": {"type": "remote", "url": "http://x"}, "backends": ["baseline"]},
            "policy.url",
            "does not look right",
        ),
        ({"policy": {"type": "remote", "url": "ws://x"}}, "backends.1", "only baseline and aa"),
        ({"quant": {"method": "duqant", "layout": "llm"}}, "quant.method", "did you mean duquant?"),
        ({"quant": {"method": "rtn"}}, "quant", "say which layers"),
        ({"quant": {"method": "rtn", "layout": "llm", "include": ["q"]}}, "quant.include", "not both"),
        ({"quant": {"method": "rtn", "include": ["q_proj", "("]}}, "quant.include.1", "not a regular expression"),
        ({"quant": {"method": "duquant", "layout": "llm"}}, "quant", "give calibration.path"),
        (
            {
                "quant": {
                    "method": "rtn",
                    "layout": "llm",
                    "number_format": "mxfp4",
                    "weight_bits": 4,
                    "activation_bits": 8,
                }
            },
            "quant.activation_bits",
            "mxfp4 has activation_bits 4 or 16, not 8",
        ),
        (
            {"quant": {"method": "rtn", "layout": "llm", "weight_bits": 7}},
            "quant.weight_bits",
            "should be 2, 3, 4, 5, 6 or 8 (got 7)",
        ),
        (
            {"quant": {"method": "rtn", "layout": "llm", "per_layer_bits": {"down": 7}}},
            "quant.per_layer_bits.down",
            "2, 3, 4, 5, 6, 8 or 16",
        ),
        ({"quant": None}, "backends.1", "needs a quant section"),
        ({"backends": []}, "backends", "no arm is listed"),
        ({"backends": ["baseline", "fke"]}, "backends.1", "did you mean fake?"),
        ({"backends": ["fake", {"backend": "fake"}]}, "backends.1", "two arms are called fake"),
        ({"backends": [{"backend": "baseline", "quant": {}}]}, "backends.0.quant", "baseline is unquantized"),
        ({"backends": [{"backend": "fake", "quant": {"alfa": 1}}]}, "backends.0.quant.alfa", "did you mean alpha?"),
        (
            {"backends": [{"backend": "fake", "quant": {"method": "duquant"}}]},
            "backends.0.quant",
            "give calibration.path",
        ),
        ({"backends": [{"backend": "fake", "quant": {"layout": None}}]}, "backends.0.quant", "say which layers"),
        ({"backends": [{"name": "a/b", "backend": "fake"}]}, "backends.0.name", "does not look right"),
        ({"tasks": []}, "tasks", "no task is listed"),
        ({"tasks": [1, 1]}, "tasks.1", "listed twice"),
        ({"episodes_per_task": 51}, "episodes_per_task", "less than or equal to 50 (got 51)"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], where: str, what: str) -> None:
    lines = complaints(write(tmp_path, GOOD | change))
    assert any(where in line and what in line for line in lines), lines


def test_everything_wrong_is_told_at_once_through_extends_and_set(tmp_path: Path) -> None:
    write(tmp_path, "quant:\n  weight_bits: four\n", "base.yaml")
    path = write(tmp_path, "extends: base.yaml\n" + GOOD_TEXT + "sede: 3\n")
    lines = complaints(path, "seed=abc", "policy.checkpoint.x=3", "backends.7=fake", "nonsense")
    text = "\n".join(lines)
    assert "base.yaml:2:3: quant.weight_bits: should be 2, 3, 4, 5, 6 or 8 (got 'four')" in text
    assert "8:1: sede: unknown key; did you mean seed?" in text
    assert "--set seed=abc: seed: should be a whole number (got 'abc')" in text
    assert "--set policy.checkpoint.x=3: policy.checkpoint is 'weights', which has no keys of its own" in text
    assert "--set backends.7=fake: backends is a list of 2" in text
    assert "--set nonsense: should look like a.b=value" in text
    assert len(lines) == 6


def test_files_that_are_no_yaml_are_refused_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00suite: x")
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 5000)
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    (tmp_path / "bomb.yaml").write_text(bomb)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    for name in ("bytes", "deep", "bomb", "empty", "list", "absent"):
        assert len(complaints(tmp_path / f"{name}.yaml")) == 1
    assert len(complaints(tmp_path)) == 1


def test_missing_files_are_named_with_the_line_that_asks_for_them(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD_TEXT)
    with pytest.raises(ConfigError, match=r"x.yaml:2:22: policy.checkpoint: no such file or directory: .*weights"):
        load_experiment(path, environ={})
    (tmp_path / "weights").mkdir()
    assert load_experiment(path, environ={}).policy.checkpoint == tmp_path / "weights"


def test_a_path_belongs_to_the_file_that_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "policies").mkdir()
    write(tmp_path, {"policy": {"type": "pi05", "checkpoint": "../weights"}}, "policies/p.yaml")
    path = write(tmp_path, {"extends": "policies/p.yaml", **{k: v for k, v in GOOD.items() if k != "policy"}})
    assert load(path).policy.checkpoint == tmp_path / "weights"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load(path, "policy.checkpoint=other").policy.checkpoint == elsewhere / "other"


def test_extends_merges_deeply_and_a_policy_of_another_type_inherits_nothing(tmp_path: Path) -> None:
    write(tmp_path, GOOD | {"quant": {"method": "rtn", "layout": "llm", "alpha": 0.25}}, "a.yaml")
    write(tmp_path, {"quant": {"alpha": 0.75, "weight_bits": 8}, "backends": ["baseline"]}, "b.yaml")
    merged = load(write(tmp_path, {"extends": ["a.yaml", "b.yaml"], "quant": {"weight_bits": 4}}))
    assert (merged.quant.alpha, merged.quant.weight_bits, merged.quant.layout) == (0.75, 4, "llm")
    assert [arm.name for arm in merged.arms()] == ["baseline"]
    other = load(
        write(
            tmp_path, {"extends": "a.yaml", "policy": {"type": "remote", "url": "ws://h:1"}, "backends": ["baseline"]}
        )
    )
    assert other.policy.type == "remote"


def test_a_hash_stays_with_the_checkpoint_it_was_written_for(tmp_path: Path) -> None:
    hashed = GOOD | {"policy": {"type": "pi05", "checkpoint": "weights", "sha256": "a" * 64}}
    path = write(tmp_path, hashed, "a.yaml")
    assert load(path).policy.sha256 == "a" * 64
    assert load(path, "policy.checkpoint=mine").policy.sha256 is None
    assert load(path, f"policy.sha256={'b' * 64}", "policy.checkpoint=mine").policy.sha256 == "b" * 64
    assert load(write(tmp_path, {"extends": "a.yaml", "policy": {"checkpoint": "mine"}})).policy.sha256 is None
    assert load(write(tmp_path, {"extends": "a.yaml", "policy": {"replan_steps": 3}})).policy.sha256 == "a" * 64


def test_yaml_means_what_it_looks_like() -> None:
    text = "{a: no, b: on, c: 1e-3, d: 010, e: 12:30:00, f: 0x10, g: ~, h: 1.5, i: true, j: 2026-11-23, k: '7', l: .5}"
    assert parse(text) == {
        "a": "no",
        "b": "on",
        "c": 0.001,
        "d": 10,
        "e": "12:30:00",
        "f": 16,
        "g": None,
        "h": 1.5,
        "i": True,
        "j": "2026-11-23",
        "k": "7",
        "l": 0.5,
    }


def test_merge_keys_keep_the_place_of_what_they_bring(tmp_path: Path) -> None:
    path = write(tmp_path, "launch:\n  slurm: &s\n    tiem: 3\n  ray:\n    <<: *s\n    cpus: 1\n" + GOOD_TEXT)
    lines = complaints(path)
    assert lines[0].startswith("3:5: launch.slurm.tiem: unknown key; did you mean time?")
    assert lines[1].startswith("3:5: launch.ray.tiem: unknown key")


# ------------------------------------------------------------------------------------------- properties, not examples
words = st.text(string.ascii_letters + string.digits + "._+-", min_size=1, max_size=12).filter(lambda s: s[0].isalnum())
texts = st.sampled_from(
    ["no", "on", "1e-3", "010", "~", "null", "true", "12:30:00", "0x1f", ".inf", "<<", "", " x", "a: b"]
) | st.text(max_size=8)
lines = texts.filter(lambda text: text.strip() and text.isprintable())
scalars = st.none() | st.booleans() | st.integers(-5, 60) | st.floats(allow_nan=False, width=32) | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)
quants = st.fixed_dictionaries(
    {"method": st.sampled_from(["rtn", "hadamard"]), "layout": st.sampled_from(["llm", "expert", "llm+expert"])},
    optional={
        "alpha": st.floats(0, 1),
        "weight_clip": st.floats(0.01, 1),
        "group_size": st.none() | st.sampled_from([64, 128]),
        "per_layer_bits": st.dictionaries(
            st.sampled_from(["down", "q_proj", "no", "1"]), st.sampled_from([4, 8, 16]), max_size=2
        ),
        "exclude": st.lists(st.sampled_from(["lm_head", "^x$", "~"]), max_size=2),
    },
)
experiments = st.fixed_dictionaries(
    {
        "name": words,
        "suite": st.sampled_from(["libero_object", "libero_goal"]),
        "policy": st.fixed_dictionaries(
            {"type": st.just("pi05"), "checkpoint": st.sampled_from(["/a/b", "/1e3", "/x y"])},
            optional={
                "sha256": st.text("0123456789abcdef", min_size=64, max_size=64),
                "replan_steps": st.integers(1, 9),
            },
        ),
        "quant": quants,
        "backends": st.lists(
            st.sampled_from(
                [
                    "baseline",
                    "fake",
                    {"name": "010", "backend": "fake", "quant": {"activation_bits": 4}},
                    {"name": "w8", "backend": "w8a8", "quant": {"weight_bits": 8, "include": ["q"]}},
                ]
            ),
            min_size=1,
            max_size=3,
            unique_by=str,
        ),
    },
    optional={
        "tasks": st.just("all") | st.lists(st.integers(0, 9), min_size=1, unique=True),
        "seed": st.integers(0, 2**32 - 1),
        "videos": st.just("all") | st.integers(0, 3),
        "tracking": st.sampled_from([["wandb", "trackio"], [], "wandb", {"mode": "online", "entity": "no"}]),
        "stop": st.none() | st.fixed_dictionaries({"margin": st.floats(0.001, 0.5)}),
        "launch": st.fixed_dictionaries(
            {
                "slurm": st.fixed_dictionaries(
                    {"time": st.sampled_from(["12:30:00", "1-00:00:00"]), "setup": st.lists(lines, max_size=2)}
                )
            }
        ),
    },
)
relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(experiments)
def test_resolved_yaml_loads_to_an_equal_experiment(tmp_path: Path, data: dict[str, Any]) -> None:
    experiment = Experiment.model_validate(data)
    again = load(write(tmp_path, dump_resolved(experiment)))
    assert again == experiment
    assert again.arms() == experiment.arms()
    assert [config_hash(again, arm) for arm in again.arms()] == [
        config_hash(experiment, arm) for arm in experiment.arms()
    ]
    assert dump_resolved(again) == dump_resolved(experiment)


@relaxed
@given(
    st.dictionaries(st.sampled_from([*Experiment.model_fields, "extends", "x"]), values, max_size=6),
    st.lists(texts, max_size=2),
)
def test_whatever_is_written_the_answer_is_an_experiment_or_a_config_error(
    tmp_path: Path, data: dict[str, Any], sets: list[str]
) -> None:
    try:
        load(write(tmp_path, GOOD | data), *sets)
    except ConfigError as error:
        assert error.problems and all(problem.message for problem in error.problems)


@relaxed
@given(st.text(max_size=60))
def test_whatever_bytes_a_file_holds_it_is_read_or_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError):
        load(path)


# ----------------------------------------------------------------------------------------------------- the hash
def test_the_hash_covers_what_decides_an_episode_and_nothing_else(tmp_path: Path) -> None:
    base = load(write(tmp_path, GOOD))
    baseline, fake = base.arms()

    def hashes(**changes: Any) -> tuple[str, str]:
        other = Experiment.model_validate(base.model_dump(mode="json") | changes)
        return config_hash(other, other.arms()[0]), config_hash(other, other.arms()[1])

    same = (config_hash(base, baseline), config_hash(base, fake))
    for free in (
        {"workers": 7},
        {"videos": "all"},
        {"retries": 0},
        {"name": "other"},
        {"tracking": []},
        {"tasks": [1]},
        {"episodes_per_task": 3},
        {"launch": {"processes": 4}},
        {"stop": {}},
        {"mixed_machines": True},
    ):
        assert hashes(**free) == same
    for decides in ({"seed": 8}, {"protocol": "openpi"}, {"max_steps": 9}, {"suite": "libero_goal"}):
        assert all(new != old for new, old in zip(hashes(**decides), same, strict=True))
    of_quant = hashes(quant={"method": "rtn", "layout": "expert"})
    assert of_quant[0] == same[0] and of_quant[1] != same[1]
    here, there = ({"type": "pi05", "checkpoint": place} for place in ("/here", "/there"))
    assert hashes(policy=here) == hashes(policy=there | {"sha256": "0" * 64}), "what lies there counts, by content"
    assert hashes(policy=here | {"replan_steps": 3}) != hashes(policy=here)


# ------------------------------------------------------------------------------------ the fork's variables, the files
def test_the_forks_variables_override_and_are_announced(tmp_path: Path, said: list[str]) -> None:
    environ = {
        "OPENPI_DUQUANT_WBITS_DEFAULT": "8",
        "OPENPI_DUQUANT_ABITS": "0",
        "OPENPI_DUQUANT_BLOCK": "16",
        "OPENPI_DUQUANT_SCOPE": "paligemma_with_expert.gemma_expert.model.",
        "OPENPI_DUQUANT_LS": "0.15",
        "OPENPI_DUQUANT_WBITS": "a.b.q_proj:8, a.b.k_proj:0",
        "OPENPI_DUQUANT_ABIT": "8",
        "OPENPI_DUQUANT_PACKDIR": "/p",
    }
    quant = load(write(tmp_path, GOOD), "quant.block_size=32", environ=environ).quant
    assert (quant.weight_bits, quant.activation_bits, quant.layout) == (8, 16, None)
    assert quant.block_size == 32, "--set wins over the environment"
    assert quant.per_layer_bits == {r"^a\.b\.q_proj$": 8, r"^a\.b\.k_proj$": 16}
    text = "\n".join(said)
    for variable in environ:
        assert variable in text, f"{variable} was not announced"
    assert "OPENPI_DUQUANT_ABIT is not known and ignored; did you mean OPENPI_DUQUANT_ABITS?" in text
    import re

    (include,) = quant.include
    assert re.search(include, "paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj")
    assert not re.search(include, "paligemma_with_expert.paligemma.model.language_model.layers.0.mlp.up_proj")
    assert not re.search(include, "x.paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj")
    assert load(write(tmp_path, GOOD | {"quant": None, "backends": ["baseline"]}), environ=environ).quant is None


@pytest.mark.parametrize(
    "value", [{"ABITS": "eight"}, {"WBITS": "x"}, {"ROW_ROT": "none"}, {"ABITS": "5"}, {"INCLUDE": "("}]
)
def test_an_unreadable_variable_is_an_error_that_names_it(tmp_path: Path, value: dict[str, str]) -> None:
    environ = {f"OPENPI_DUQUANT_{key}": text for key, text in value.items()}
    assert any(next(iter(environ)) in line for line in complaints(write(tmp_path, GOOD), environ=environ))


def test_every_file_under_configs_loads_and_says_what_it_is_for() -> None:
    from qlibero.cli.catalogue import about
    from qlibero.config.sweep import load_sweep

    for path in [*(CONFIGS / "experiments").glob("*.yaml"), *(CONFIGS / "sweeps").glob("*.yaml")]:
        assert load_sweep(path, environ={}, check_files=False).cells, path
    for path in CONFIGS.rglob("*.yaml"):
        assert len(about(path)) > 20, f"{path} should open with a comment that says what it is for"


def test_every_path_of_the_schema_is_resolved_against_its_file() -> None:
    def names(model: type[BaseModel]) -> set[str]:
        return {name for name, field in model.model_fields.items() if "Path" in str(field.annotation)}

    rooms = {**vars(quantization), **vars(schema)}
    models = [m for m in rooms.values() if isinstance(m, type) and issubclass(m, BaseModel)]
    assert set().union(*map(names, models)) == {*PATH_KEYS, *SUITE_PATHS}
    assert path_keys("pi05") == {"checkpoint", "tokenizer", "norm_stats", "config"}
    assert path_keys("remote") == path_keys("nothing") == set()


def test_settings_have_the_hash_under_which_artifacts_on_disk_lie(tmp_path: Path) -> None:
    """Of configs/quant/duquant_w4a8.yaml, since weights are rounded by the weighted search unless asked otherwise."""
    duquant = Quant(method="duquant", layout="llm", calibration={"path": tmp_path / "any.npz"})
    assert duquant.hash == "df55b46b49a9c4ca275d6062df85b916c59978cf3241bf28b3aa7419f08737c4"
    elsewhere = Quant.model_validate(duquant.model_dump() | {"artifact_dir": tmp_path, "artifact": tmp_path / "a"})
    assert elsewhere.hash == duquant.hash


def test_the_reference_page_is_what_the_schema_says() -> None:
    from qlibero.config.legacy_env import HONOURED
    from qlibero.config.reference import PAGE, SECTIONS, renewed

    page = PAGE.read_text()
    assert page == renewed(page), "run `python -m qlibero.config.reference`"
    models = {
        m
        for m in (*vars(schema).values(), *vars(arms).values(), *vars(quantization).values(), *vars(inits).values())
        if isinstance(m, type) and issubclass(m, BaseModel)
    }
    assert models - {BaseModel, arms.StrictModel, arms.QuantOverrides, arms.PolicySettings} <= set(SECTIONS.values())
    for variable in HONOURED:
        assert f"`OPENPI_DUQUANT_{variable}`" in page or f"`_{variable}`" in page, variable


def test_editors_get_a_schema_that_describes_every_key() -> None:
    document = editor_schema()
    assert document["$defs"]["ArmEntry"]["properties"]["backend"]["enum"] == list(known_backends())
    undescribed = [
        f"{name}.{key}"
        for name, model in {"Experiment": document, **document["$defs"]}.items()
        for key, value in model.get("properties", {}).items()
        if not value.get("description") and key != "type"
    ]
    assert undescribed == []
