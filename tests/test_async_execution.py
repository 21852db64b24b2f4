"""Risk: asynchronous episodes execute other actions than a robot would that goes on while its policy thinks, or depend
on a clock."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import arm_meta, episode

from qlibero import cli
from qlibero.config.config_hash import config_hash
from qlibero.config.load import ConfigError, load_experiment
from qlibero.policies import load_policy
from qlibero.results.compare import compare_runs
from qlibero.results.ledger import Ledger, read_ledger, read_trajectory, write_meta
from qlibero.results.meta import read_meta
from qlibero.results.quality import control_steps
from qlibero.run.episode import action_digest
from qlibero.run.latency import fixed_execution
from qlibero.run.pace import Chunks, Pace
from qlibero.run.replay import replay_all
from qlibero.sim.pool import Finished, Observed
from qlibero.sim.scene import SimObservation

HORIZON = 10


def chunk(call: int) -> np.ndarray:
    """Action k of call c is (c, k, 0, …) with a gripper of its own, so that every row tells where it is from."""
    rows = np.zeros((HORIZON, 7), np.float32)
    rows[:, 0], rows[:, 1], rows[:, 6] = call, np.arange(HORIZON), 1 - 0.01 * (call * HORIZON + np.arange(HORIZON))
    return rows


def by_the_clock(replan: int, late: int, steps: int) -> list[list[float]]:
    """What a robot executes, step by step: calls in flight, arrivals, and the action that is due at every moment."""
    executed: list[list[float]] = []
    in_flight: tuple[int, int, np.ndarray] | None = None  # observed at, there at, the chunk
    current: tuple[int, np.ndarray] | None = None  # the moment of its action 0, the chunk
    following, calls, gripper = 0, 0, -1.0
    for now in range(steps):
        if now == following:
            in_flight = (now, now + late, chunk(calls))
            calls, following = calls + 1, now + max(replan, late)
        if in_flight is not None and in_flight[1] == now:
            current = (now if current is None else in_flight[0], in_flight[2])
            in_flight = None
            if now == following:  # it arrives just as the next call begins
                raise AssertionError("late ≤ the time between calls")
        due = -1 if current is None else now - current[0]
        row = current[1][due].tolist() if current is not None and due < HORIZON else [0.0] * 6 + [gripper]
        gripper = row[6]
        executed.append(row)
    return executed


@pytest.mark.parametrize("replan", [1, 3, 5, 10])
@pytest.mark.parametrize("late", [0, 1, 2, 4, 5, 8, 12, 30])
def test_what_is_executed_is_what_the_clock_says(replan, late):
    chunks, rows = Chunks(Pace(replan, late)), []
    for call in range(12):
        rows.append(chunks.next(chunk(call)))
        assert rows[-1].shape == (max(replan, late), 7) and rows[-1].dtype == np.float32
    together = np.concatenate(rows)
    if late < max(replan, late):
        assert together.tolist() == by_the_clock(replan, late, len(together))
    else:  # a policy that is always thinking: each chunk is executed from its action `late` on while the next is made
        still = together[:late]
        assert not still[:, :6].any() and (still[:, 6] == -1).all()
        for call in range(1, 12):
            came = together[call * late : (call + 1) * late]
            first = 0 if call == 1 else late  # of call - 1, which has just arrived
            there = max(0, min(late, HORIZON - first))
            assert np.array_equal(came[:there], chunk(call - 1)[first : first + there])
            assert not came[there:, :6].any() and len(set(came[there:, 6])) <= 1


def test_without_latency_nothing_differs_from_waiting():
    waits, goes_on = Chunks(Pace(5)), Chunks(Pace(5, 0))
    for call in range(3):
        assert np.array_equal(waits.next(chunk(call)), goes_on.next(chunk(call)))


def test_latency_is_counted_in_whole_control_steps():
    assert [control_steps(ms) for ms in (0, 0.1, 50, 50.1, 100, 200, 400)] == [0, 1, 1, 2, 2, 4, 8]


class Steps:
    """A simulator's side of a replay that notes when it was seen, and what it was made to do."""

    workers = 1

    def __init__(self):
        self.seen, self.done, self.events = [], [], []

    def start(self, worker, assignment):
        self.limit = assignment.max_steps
        self._look()

    def _look(self):
        self.seen.append(len(self.done))
        blank = SimObservation(*np.zeros((2, 2, 2, 3), np.uint8), np.zeros(8, np.float32))
        self.events.append(Observed(0, blank, "go", len(self.done), 1.0, 1.0))

    def act(self, worker, actions):
        self.done += actions.tolist()
        if len(self.done) < self.limit:
            self._look()
        else:
            self.events.append(Finished(0, False, self.limit, "scene", np.zeros((1, 10), np.float32), 1.0, 1.0))

    def wait(self, timeout):
        events, self.events = self.events, []
        return events


@pytest.mark.parametrize("late, seen", [(None, [0, 5, 10, 15]), (2, [0, 5, 10, 15]), (8, [0, 8, 16])])
def test_a_replay_shows_what_the_policy_was_shown_before_each_call(late, seen):
    record, _ = episode("libero_object", 0, 0, "baseline", True, False, 0)
    record = replace(
        record, steps=20, outcome="failure", fingerprint="scene", replan_steps=5, latency_steps=late, success_step=None
    )
    rows, pool = np.arange(200, dtype=np.float32).reshape(20, 10), Steps()
    replay_all([(record, rows, None)], pool, "pure", lambda record, path: None)
    assert pool.seen == seen and pool.done == rows[:, :7].tolist()


def test_a_first_chunk_begins_where_its_answer_is_there(tmp_path):
    """Before, both arms stand still, and equal zeros are no agreement."""
    for arm, error in (("baseline", 0.0), ("aa", 0.01), ("w4a8", 0.25)):
        with Ledger(tmp_path, arm, 0, f"hash of {arm}") as ledger:
            for init in range(3):
                record, rows = episode("libero_object", 0, init, "baseline", False, False, 0)
                rows[:8, :6], rows[8:16, 0] = 0, error
                late = {"replan_steps": 5, "latency_steps": 8, "replans": -(-record.steps // 8)}
                ledger.append(replace(record, arm=arm, action_digest=action_digest(rows[:, :7]), **late), rows)
        write_meta(tmp_path, arm, arm_meta(arm, arm))
    found = compare_runs([tmp_path])["arms"]
    assert [found[arm]["divergence"]["first_chunk_difference"] for arm in ("aa", "w4a8")] == [0.01, 0.25]
    assert found["w4a8"]["divergence"]["threshold"] == pytest.approx(0.01)


@pytest.fixture
def study(tiny_experiment: Path, tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(
        f"extends: {tiny_experiment}\ntasks: [0]\nepisodes_per_task: 2\nmax_steps: 12\narms:\n  - baseline\n"
        "  - {name: async, execution: {mode: async}, grid: {execution.latency_ms: [0, 100]}}\n"
        "  - {name: measured, execution: {mode: async}}\n"
    )
    return path


def test_execution_is_part_of_an_arm_and_of_its_hash(study, tiny_experiment):
    experiment = load_experiment(study)
    assert [arm.name for arm in experiment.arms()] == [
        "baseline",
        "async.latency_ms-0",
        "async.latency_ms-100",
        "measured",
    ]
    assert len({config_hash(experiment, arm) for arm in experiment.arms()}) == 4
    waiting = load_experiment(study, ["execution.mode=sync"])
    assert config_hash(waiting, waiting.arms()[0]) == config_hash(experiment, experiment.arms()[0])
    late = ["execution={mode: async, latency_ms: 100}", "arms=[baseline, {name: wait, execution: {mode: sync}}, fake]"]
    assert [arm.execution.label for arm in load_experiment(study, late).arms()] == [
        "async 100 ms",
        "sync",
        "async 100 ms",
    ]
    for sets, told in (
        (["execution.latency_ms=100"], "execution.latency_ms: belongs to mode: async"),
        (["execution={mode: async, latency_ms: -1}"], "execution.latency_ms"),
        (["execution={mode: async}", "arms=[baseline, aa]"], "execution.latency_ms: measured: aa"),
        (["execution={mode: asynchronous}"], "execution.mode: should be 'sync' or 'async'"),
        (["arms=[{name: x, latency_ms: 5}]"], "arms.0.latency_ms: unknown key; write execution: {latency_ms: …}"),
        (["arms=[baseline, {backend: aa, execution: {mode: async}}]"], "arms.1.execution: aa is the baseline again"),
    ):
        with pytest.raises(ConfigError, match=told.replace("{", r"\{").replace("}", r"\}").replace("(", r"\(")):
            load_experiment(study, sets)


def test_shards_that_begin_together_share_one_measured_latency(study, tmp_path):
    """Four at once, on machines of two kinds; then one whose code has changed, before and after an episode."""
    experiment = load_experiment(study)
    arm = next(arm for arm in experiment.arms() if arm.name == "measured")
    policy = load_policy(arm.policy)
    told = ["pick up the cream cheese and place it in the basket"]

    def begin(kind: str, identity: str = "a") -> dict:
        meta = {"identity": {"code": identity}, "probes": {"p": {"kind": kind}}}
        found = fixed_execution(tmp_path, arm, policy, told, meta, "hash")
        assert found is not None
        return found

    with ThreadPoolExecutor(4) as shards:
        found = list(shards.map(begin, ["fast", "slow", "fast", "slow"]))
    kept = (tmp_path / "measured/latency.json").read_text()
    assert {one["latency_ms"] for one in found} == {json.loads(kept)["ms"]} and begin("slow") == found[0]
    with Ledger(tmp_path, "measured", 0, "hash") as ledger:
        ledger.bind({"execution": found[0], "identity": {"code": "a"}})
        ledger.append(*episode("libero_object", 0, 0, "measured", False, False, 0))
    assert begin("slow", identity="b") == found[0]  # refused later, for its code; nothing is measured again
    assert (tmp_path / "measured/latency.json").read_text() == kept


def test_late_answers_in_real_simulators(study, tmp_path):
    """No latency is bit for bit the waiting arm; a late one holds still first; what was measured is kept."""
    out = tmp_path / "run"
    assert cli.main(["run", str(study), "--out", str(out), "--set", "episodes_per_task=1"]) == 0
    measured = read_meta(out, "measured").execution
    assert measured is not None and measured.latency_steps == control_steps(measured.latency_ms) >= 1
    kept = json.loads((out / "measured/latency.json").read_text())
    assert kept["ms"] == measured.latency_ms and kept["calls"] == 20
    assert cli.main(["run", str(study), "--out", str(out)]) == 0
    assert read_meta(out, "measured").execution == measured
    records = {
        arm: read_ledger(out, arm) for arm in ("baseline", "async.latency_ms-0", "async.latency_ms-100", "measured")
    }
    digests = {arm: [record.action_digest for record in found] for arm, found in records.items()}
    assert digests["async.latency_ms-0"] == digests["baseline"] != digests["async.latency_ms-100"]
    late = records["async.latency_ms-100"][0]
    assert (late.latency_steps, late.replan_steps, late.replans) == (2, 5, 3)
    assert records["baseline"][0].latency_steps is None
    rows, plain = (read_trajectory(out, found[0]) for found in (records["async.latency_ms-100"], records["baseline"]))
    assert rows is not None and plain is not None
    assert rows[:2, :7].tolist() == [[0, 0, 0, 0, 0, 0, -1]] * 2
    assert np.array_equal(rows[2:5, :7], plain[:3, :7])  # the first answer, from its first action on
    arms = compare_runs([out])["arms"]
    assert arms["async.latency_ms-100"]["unlike"] == {"latency_steps": [None, 2]}
    assert arms["async.latency_ms-100"]["pairs"] == 2
    assert cli.main(["videos", str(out), "--episodes", "1", "--arm", "async.latency_ms-100"]) == 0  # replayed and equal
