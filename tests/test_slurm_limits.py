"""Risk: a cluster's limits, a site's shell or an odd path turn a sweep into half a sweep, and nobody is told."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import light_shard
import pytest
import slurm_cluster
from slurm_cluster import queue, wait_for
from test_slurm_sweeps import SMALL, assert_all_once, content, light, qlibero

from qlibero.config.launch import Launch
from qlibero.config.sweep import load_sweep
from qlibero.errors import UserError, WorkFailed
from qlibero.launch import cells, engine, slurm
from qlibero.launch.plan import plan
from qlibero.quoting import sbatch_option, slurm_file, visible

pytestmark = pytest.mark.slow

LIMITS = """MaxArraySize=4
EnforcePartLimits=ALL
PartitionName=short Nodes=n[1-2] MaxTime=10 State=UP PriorityTier=1
"""
ODD = ["a b", "100%", "%j %A_%a %%", "it's", 'so "called"', "Größe 模型", "#hash", "$HOME `id`", "a;b&c", "[x]{y}*?"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    assert not slurm_cluster.missing_programs(), "no Slurm here: scripts/setup.sh --test installs it"
    with slurm_cluster.slurm(tmp_path_factory.mktemp("slurm"), LIMITS) as directory:
        yield directory


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(light_shard, "ROWS", 2)
    monkeypatch.setenv("LIGHT_ROWS", "2")


def test_more_shards_than_an_array_holds_are_several_arrays(cluster, quick, tmp_path, monkeypatch):
    assert slurm.max_array_size() == 4
    submission = light(tmp_path, monkeypatch, "submission-001", 10)
    said = slurm.describe(submission)
    assert "# 10 shards in 3 arrays: MaxArraySize is 4" in said and said.count("--array=0-3\n") == 2
    jobs = slurm.submit(submission).jobs
    assert len(jobs) == 4 and set(slurm.live_shards(tmp_path)) <= {cells.Shard("cell", i, 10) for i in range(10)}
    wait_for(lambda: not queue(), 120)
    assert_all_once(submission)
    assert (submission.directory / "merged").exists()
    assert "shard 9 on" in (submission.directory / "logs" / "shard-8+1.log").read_text()


@pytest.mark.parametrize(
    ("chosen", "asked", "arrays", "expected"),
    [
        ("slurm", True, 3, "on Slurm: 10 tasks in 3 job arrays (MaxArraySize 4), and a merge job after them"),
        ("local", True, 3, "on Slurm: 10 tasks in 3 job arrays (MaxArraySize 4), and a merge job after them"),
        ("slurm", False, 1, "on Slurm: 10 tasks in 1 job array (MaxArraySize 1001, Slurm's default, for there is no"),
        ("local", False, None, ""),
    ],
)
def test_plan_says_how_many_arrays_a_sweep_becomes(
    cluster, tmp_path, monkeypatch, chosen, asked, arrays, expected, said
):
    config = tmp_path / "ten.yaml"
    untrained = Path(__file__).parents[1] / "configs/policies/untrained.yaml"
    config.write_text(SMALL.format(untrained=untrained).replace("episodes_per_task: 2", "episodes_per_task: 10"))
    manifest = cells.make_manifest(load_sweep(config, [f"launch.engine={chosen}"]), tmp_path / "out")
    if not asked:
        monkeypatch.setenv("PATH", str(tmp_path))
    jobs = plan(manifest).queued_as.get("slurm")
    assert "\n".join(said).startswith(expected) and len(said) == bool(expected)
    assert (jobs or {}).get("arrays") == arrays
    assert jobs is None or (jobs["tasks"], jobs["max_array_size"]) == (10, 4 if asked else 1001)


def test_what_is_queued_of_a_later_array_is_known_by_its_shard(cluster, tmp_path, monkeypatch):
    submission = light(tmp_path, monkeypatch, "submission-001", 10, array_limit=1)
    submission = engine.Submission("sparse", submission.directory, (2, 5, 9), submission.launch)
    first, second, third, _ = slurm.submit(submission).jobs
    assert set(slurm.live_shards(tmp_path)) == {cells.Shard("cell", i, 10) for i in (2, 5, 9)}
    shown = subprocess.check_output(["scontrol", "show", "job", third], text=True)
    assert f"afterany:{second}" in shown  # one array after the other, or the limit would hold for each
    subprocess.run(["scancel", first, second, third], check=True)
    wait_for(lambda: not queue(), 60)


def test_a_refused_merge_leaves_the_shards_queued_and_says_so(cluster, quick, tmp_path, monkeypatch, said):
    submission = light(tmp_path, monkeypatch, "submission-001", 2, partition="short", time="5")
    found = slurm.submit(submission)
    assert found.merge_status == 1 and len(found.jobs) == 1 and not found.finished
    assert (
        "2 shards queued" in said[-1]
        and "NOT" in said[-1]
        and "launch.slurm.merge" in said[-1]
        and "limit" in said[-1].lower()
    )
    assert not slurm.merge_is_queued(tmp_path)
    wait_for(lambda: not queue(), 60)
    assert_all_once(submission)
    for merge in ({"time": "5"}, {"partition": "gpu", "gres": "gpu:1"}):
        own = light(tmp_path, monkeypatch, f"with-{len(merge)}", 1, partition="short", time="5", merge=merge)
        assert slurm.submit(own).merge_status == 0
        wait_for(lambda: not queue(), 60)
        assert (own.directory / "merged").exists()


def test_a_refused_array_says_what_is_queued_already(cluster, tmp_path, monkeypatch):
    submission = light(tmp_path, monkeypatch, "submission-001", 2, partition="nowhere")
    with pytest.raises(WorkFailed, match="(?s)sbatch refused .*nothing is queued"):
        slurm.submit(submission)
    assert not submission.directory.exists(), "a refused submission is none"
    submission = light(tmp_path, monkeypatch, "submission-002", 6)
    honest, calls = slurm._sbatch, []

    def second_is_refused(script, *options):
        calls.append(script)
        if len(calls) == 2:
            options = (*options, "--partition=nowhere")
        return honest(script, *options)

    monkeypatch.setattr(slurm, "_sbatch", second_is_refused)
    with pytest.raises(WorkFailed, match=r"(?s)sbatch refused .*queued already, and kept: job \d+"):
        slurm.submit(submission)
    assert set(slurm.live_shards(tmp_path)) == {cells.Shard("cell", i, 6) for i in range(4)}
    subprocess.run(["scancel", "--user", subprocess.check_output(["id", "-un"], text=True).strip()], check=True)
    wait_for(lambda: not queue(), 60)


SETUP = {
    "an unset variable": ["echo ${NOBODY_SETS_THIS}here"],
    "a test that fails inside": ["if false; then echo no; fi", "A=$(false; echo 1)"],
    "a comment, a pipe": ["true # a comment", "false | true"],
    "a loop": ["for i in 1 2; do export LAB_$i=yes; done", 'test "$LAB_2" = yes'],
    "quotes": ['echo "it\'s" \'a "line"\''],
}


@pytest.mark.parametrize("what", SETUP)
def test_setup_lines_run_as_in_ones_own_shell(what, cluster, quick, tmp_path, monkeypatch):
    submission = light(tmp_path, monkeypatch, "submission-001", 1, setup=SETUP[what], login_shell=what == "quotes")
    slurm.submit(submission)
    wait_for(lambda: not queue(), 60)
    assert_all_once(submission)


@pytest.mark.parametrize("bad", ["module-of-nowhere load cuda", "false", "source /no/such/file", "(exit 7)"])
def test_the_first_setup_line_that_fails_ends_the_shard_and_is_named(bad, cluster, quick, tmp_path, monkeypatch):
    setup = ["echo first", bad, "echo never"]
    submission = light(tmp_path, monkeypatch, "submission-001", 1, setup=setup)
    slurm.submit(submission)
    wait_for(lambda: not queue(), 60)
    log = submission.log(0).read_text()
    assert f"launch.slurm.setup failed: {bad}" in log and "first" in log and "never" not in log
    assert light_shard.rows(submission.directory, 0) == [] and not (submission.directory / "merged").exists()


@pytest.mark.parametrize("bad", ["if true; then", "echo 'open", "done"])
def test_half_a_command_as_a_setup_line_is_refused_before_anything_is_queued(bad, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="launch.slurm.setup: .* is no whole shell command"):
        slurm.describe(light(tmp_path, monkeypatch, "submission-001", 1, setup=[bad]))


@pytest.mark.parametrize("name", ODD)
def test_shards_run_and_log_below_any_path(name, cluster, quick, tmp_path, monkeypatch):
    submission = light(tmp_path / name, monkeypatch, "submission-001", 1)
    assert slurm.submit(submission).merge_status == 0
    wait_for(lambda: not queue(), 60)
    assert_all_once(submission)
    assert (submission.directory / "merged").exists() and "shard 0 on" in submission.log(0).read_text()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["two\nlines", "tab\there", "back\\slash", "bell\a"])
def test_paths_that_slurm_cannot_write_are_refused(name, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="control character|backslash"):
        slurm.describe(light(tmp_path / name, monkeypatch, "submission-001", 1))


def test_a_whole_sweep_below_an_odd_path(cluster, tmp_path):
    """Config, run directory, manifest, logs and merge; on both daemons, and then the same locally."""
    odd = tmp_path / "Größe 100% of 'it' \"%j\" #1"
    odd.mkdir()
    config = odd / "my config %A.yaml"
    untrained = Path(__file__).parents[1] / "configs/policies/untrained.yaml"
    config.write_text(SMALL.format(untrained=json.dumps(str(untrained))) + "name: odd\n")
    qlibero("sweep", config, "--out", odd / "out", "--engine", "slurm")
    wait_for(lambda: not queue(), 400)
    logs = odd / "out" / "sweep" / "submission-001" / "logs"
    log = "".join(path.read_text() for path in sorted(logs.iterdir()))
    assert qlibero("status", odd / "out")["complete"], log
    assert json.loads((odd / "out" / "sweep" / "result.json").read_text())["complete"], log
    assert qlibero("sweep", config, "--out", odd / "here", "--engine", "local")["complete"]
    assert content(odd / "out") == content(odd / "here")
    qlibero("report", odd / "here", "-o", odd / "a report.html")
    assert sorted(path.name for path in odd.iterdir()) == ["a report.html", "here", config.name, "out"]


def test_2500_shards_on_a_default_cluster_are_three_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)  # no scontrol to ask: Slurm's default
    submission = engine.Submission("big", tmp_path, tuple(range(2500)), Launch())
    parts = slurm.arrays(submission)
    assert [(part.offset, part.tasks[0], part.tasks[-1]) for part in parts] == [
        (0, 0, 1000), (1001, 0, 1000), (2002, 0, 497)
    ]  # fmt: skip
    assert sorted(part.offset + task for part in parts for task in part.tasks) == list(range(2500))


@pytest.mark.parametrize(
    "value, line",
    [
        ("gpu:1", "--gres=gpu:1"),
        ("a b", '--gres="a b"'),
        ('a"b', '--gres="a\\"b"'),
        ("it's", '--gres="it\'s"'),
        ("a#b", '--gres="a#b"'),
        ("a\\b", '--gres="a\\\\b"'),
        ("größe", "--gres=größe"),
    ],
)
def test_sbatch_options_are_quoted(value, line):
    assert sbatch_option("gres", value) == line


@pytest.mark.parametrize("value", ["a\nb", "a\r", "\0", "a\x1b[31m", "a\x85b"])
def test_control_characters_are_no_option(value):
    with pytest.raises(UserError, match="control character"):
        sbatch_option("gres", value)
    assert slurm_file("50%/%j") == "50%%/%%j"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("evil\u202egpj", "evil\\u202egpj"),
        ("\u2066a\u2069", "\\u2066a\\u2069"),
        ("\x1b[31mred", "\\u001b[31mred"),
        ("a\u200bb", "a\\u200bb"),
        ("line\nand\ttab", "line\nand\ttab"),
        ("Größe 模型 👩\u200d🔬 −…", "Größe 模型 👩\u200d🔬 −…"),
        ("half \ud800", "half \\ud800"),
        ("\u2028", "\\u2028"),
    ],
)
def test_controls_are_shown_not_obeyed(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize("extra", ["no option", "x--y=z"])
def test_an_extra_that_is_no_option_is_refused(extra, tmp_path):
    submission = engine.Submission("x", tmp_path, (0,), Launch(slurm={"extra": [extra]}))
    with pytest.raises(UserError, match="launch.slurm: extra holds"):
        slurm.describe(submission)
