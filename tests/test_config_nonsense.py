"""Risk: a value that cannot be meant is accepted, and ends as a wrong number, a lost file or a leaked password."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlibero.config.load import ConfigError, load_experiment
from qlibero.config.sweep import load_sweep

GOOD = """\
suite: libero_object
policy: {type: pi05, checkpoint: weights}
quant: {method: duquant, layout: llm, calibration: {path: data.npz}}
backends: [baseline, fake]
stop: {}
"""
REMOTE = "suite: libero_object\npolicy: {type: remote, url: 'ws://h:1'}\nbackends: [baseline]\n"


def write(directory: Path, text: str) -> Path:
    path = directory / "x.yaml"
    path.write_text(text)
    return path


def load(directory: Path, text: str, *sets: str):
    return load_experiment(write(directory, text), sets, {}, check_files=False)


def refused(directory: Path, text: str, *sets: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(directory, text, *sets)
    return str(caught.value)


@pytest.mark.parametrize("value", ["null", "true", "[a]", "{a: b}", "../x", "a/b", "'a\\n'", "é", "-a", "''"])
def test_what_is_no_name_names_no_experiment(tmp_path: Path, value: str) -> None:
    assert "name: " in refused(tmp_path, GOOD + f"name: {value}\n")


def test_a_number_is_a_name_as_it_is_written(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD + "name: 7\n").name == "7"


@pytest.mark.parametrize(
    "names",
    ["experiment.yaml", "environment.json", "Report.HTML", "x.lock", "wandb-mirror.log", "trackio", "sweep", "videos"],
)
def test_an_arm_is_not_called_as_a_file_of_the_run(tmp_path: Path, names: str) -> None:
    assert "rename the arm" in refused(tmp_path, GOOD, f"backends=[{{name: {names}, backend: baseline}}]")


def test_arms_and_cells_differ_by_more_than_case(tmp_path: Path) -> None:
    two = "backends=[{name: Base, backend: baseline}, {name: base, backend: baseline}]"
    assert "Base and base differ by case only" in refused(tmp_path, GOOD, two)
    path = write(tmp_path, GOOD + "cells: {con: {seed: 1}, CON: {seed: 2}}\n")
    with pytest.raises(ConfigError, match=r"two cells are called CON \(con\)"):
        load_sweep(path, environ={}, check_files=False)


@pytest.mark.parametrize("axis", ["grid: {name: [a, b]}", "cells: {a: {name: b}}"])
def test_a_cell_has_one_name(tmp_path: Path, axis: str) -> None:
    with pytest.raises(ConfigError, match="leave this"):
        load_sweep(write(tmp_path, GOOD + axis + "\n"), environ={}, check_files=False)


@pytest.mark.parametrize(
    "url",
    [
        "ws://",
        "http://h:1",
        "localhost:8000",
        "ws://a b",
        "ws://h:0",
        "ws://h:99999",
        "wss://h\\x01",
        "ws:h",
        "ws://:80",
    ],
)
def test_an_address_looks_like_one(tmp_path: Path, url: str) -> None:
    message = refused(tmp_path, REMOTE, f'policy.url="{url}"')
    assert "policy.url: does not look right; write e.g. ws://127.0.0.1:8000" in message


def test_a_password_in_an_address_is_refused_and_not_repeated(tmp_path: Path) -> None:
    message = refused(tmp_path, REMOTE, "policy.url=ws://user:hunter2@h:1")
    assert "hunter2" not in message and "api_key_env" in message
    assert "hunter2" not in refused(tmp_path, REMOTE.replace("ws://h:1", "ws://user:hunter2@h:1"))


COUNTS = (
    "max_steps workers retries videos policy.replan_steps policy.flow_steps policy.batch_size quant.block_size "
    "quant.group_size quant.rotation_steps quant.calibration.samples quant.calibration.seed launch.shard_episodes "
    "launch.processes launch.slurm.cpus_per_task launch.slurm.array_limit launch.slurm.signal_s launch.ray.cpus "
    "launch.ray.gpus stop.max_episodes seed episodes_per_task"
).split()


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("value", [10**12, 10**30, -1])
def test_every_count_has_bounds(tmp_path: Path, key: str, value: int) -> None:
    assert f"{key}: should be" in refused(tmp_path, GOOD, f"{key}={value}")


@pytest.mark.parametrize("key", ["quant.weight_clip", "quant.activation_clip", "margin", "stop.margin", "stop.alpha"])
@pytest.mark.parametrize("value", ["1e-300", "5e-324", "0", "-0.5", "1e300", ".inf", ".nan", "2"])
def test_every_share_has_bounds(tmp_path: Path, key: str, value: str) -> None:
    assert f"{key}: should be" in refused(tmp_path, GOOD, f"{key}={value}")


@pytest.mark.parametrize(
    "key",
    [
        *(f"launch.slurm.{key}" for key in ("partition", "account", "qos", "gres", "time", "mem", "container")),
        "launch.ray.address",
        "tracking.entity",
        "tracking.project",
        "policy.device",
    ],
)
@pytest.mark.parametrize("value", [r'"a\nb"', r'"a\u2028b"', r'" "', '""', r'"a\x1b[31m"', r'"a\n"'])
def test_a_word_that_enters_another_program_has_no_line_ends(tmp_path: Path, key: str, value: str) -> None:
    assert f"{key}: " in refused(tmp_path, GOOD, f"{key}={value}")


@pytest.mark.parametrize("key", ["launch.slurm.setup", "launch.slurm.extra"])
def test_a_line_is_one_line(tmp_path: Path, key: str) -> None:
    assert f"{key}.0: should be one line" in refused(tmp_path, GOOD, rf'{key}=["a\nb"]')


@pytest.mark.parametrize(
    ("text", "setting", "example"),
    [
        (GOOD, "policy.device=gpu", "cuda:0"),
        (GOOD, "policy.device=cuda:٣", "cuda:0"),
        (REMOTE, "policy.url=localhost:8000", "ws://127.0.0.1:8000"),
        (GOOD, "launch.slurm.time=UNLIMITED", "04:00:00"),
        (GOOD, "launch.slurm.mem=48GB", "48G"),
        (GOOD, "name=a/b", "pi05_w4a8"),
        (GOOD, "policy.sha256=abc", "sha256sum"),
        (GOOD, "tracking.project=a/b", "qlibero"),
        (GOOD, "tracking.entity=a b", "my-team"),
        (GOOD, "backends=[{name: a b, backend: fake}]", "pi05_w4a8"),
    ],
)
def test_what_does_not_look_right_comes_with_an_example(tmp_path: Path, text: str, setting: str, example: str) -> None:
    assert example in refused(tmp_path, text, setting)


@pytest.mark.parametrize(
    "key",
    ["policy.checkpoint", "policy.tokenizer", "policy.norm_stats", "quant.artifact", "quant.artifact_dir"]
    + ["quant.calibration.path", "arms.1.quant.artifact", "arms.1.policy.norm_stats"],
)
def test_an_empty_path_is_not_the_directory_that_somebody_stands_in(tmp_path: Path, key: str) -> None:
    text = GOOD.replace("[baseline, fake]", "[baseline, {backend: fake, quant: {}, policy: {}}]")
    told = refused(tmp_path, text.replace("backends", "arms"), f"{key}=''")
    assert f": {key}: is empty: write a path, or null for none" in told


@pytest.mark.parametrize("value", ["false", "null"])
def test_no_tracking_is_an_empty_list(tmp_path: Path, value: str) -> None:
    assert "tracking: write [] for no tracker" in refused(tmp_path, GOOD + f"tracking: {value}\n")
    assert load(tmp_path, GOOD + "tracking: []\n").tracking.trackers == ()


@pytest.mark.parametrize("word", ["bf16", "fp16", "none", "fp32", "BF16", "float32", "bfloat16", "unquantized", "full"])
def test_the_unquantized_arm_is_called_baseline(tmp_path: Path, word: str) -> None:
    assert "the unquantized arm is called baseline" in refused(tmp_path, GOOD, f"backends=[{word}]")
    plain = "\n".join(line for line in GOOD.splitlines() if not line.startswith(("quant", "backends")))
    message = refused(tmp_path, f"{plain}\nbackends: [{word}]\n")
    assert "the unquantized arm is called baseline" in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("word", ["w4a8", "W4A4", "w8a16", "int4", "int8", "4bit", "8-bits", "w4a16_g128"])
def test_an_arm_is_called_after_what_computes_it(tmp_path: Path, word: str) -> None:
    message = refused(tmp_path, GOOD, f"backends=[{word}]")
    assert "quant.weight_bits" in message and "did you mean" not in message


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("libero_90_swap", "LIBERO-PRO"),
        ("libero_object_with_red_box", "LIBERO-PRO"),
        ("libero_10_env", "not supported"),
        ("libero_pro", "not supported"),
        ("LIBERO-plus", "libero_plus_{spatial,object,goal,10}_{camera,robot,noise,language,level}"),
        ("libero_plus_goal_light", "not supported"),
        ("libero_spatial_camera", "libero_plus_{"),
        ("libero_100", "libero_10 and libero_90"),
        ("libero_goal_no_noops", "training set; the suite is libero_goal"),
        ("libero_objct", "did you mean libero_object?"),
        ("LIBERO-Spatial", "did you mean libero_spatial?"),
        ("long", "did you mean libero_10?"),
    ],
)
def test_a_suite_of_another_meaning_is_not_taken_for_a_misspelt_one(tmp_path: Path, word: str, says: str) -> None:
    message = refused(tmp_path, GOOD, f"suite={word}")
    assert says in message and ("did you mean" in says or "did you mean" not in message)


def test_libero_long_is_libero_10_also_in_names(tmp_path: Path) -> None:
    long, ten = load(tmp_path, GOOD, "suite=libero_long"), load(tmp_path, GOOD, "suite=libero_10")
    assert long == ten and long.name == "x.suite-libero_10"
    path = write(tmp_path, GOOD + "grid: {suite: [libero_10, libero_long]}\n")
    with pytest.raises(ConfigError, match="two cells are called suite-libero_10"):
        load_sweep(path, environ={}, check_files=False)


def test_variables_in_paths_are_the_shells_business(tmp_path: Path) -> None:
    message = refused(tmp_path, GOOD.replace("weights", "$CKPT/pi05"))
    assert "variables are not expanded here" in message and "--set policy.checkpoint=" in message
    (tmp_path / "$CKPT").mkdir()
    assert load(tmp_path, GOOD.replace("weights", "$CKPT")).policy.checkpoint == tmp_path / "$CKPT"
