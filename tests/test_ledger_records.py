"""Risk: a record that comes back different from what was written, or a foreign line read as if it were ours."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as hy

from qlibero.errors import UserError
from qlibero.results.records import SCHEMA, EpisodeRecord, TrajectorySlice, record_from_json

ms = hy.floats(0, 1e6, allow_nan=False).map(lambda x: round(x, 6))
text = hy.text(max_size=30)


@hy.composite
def records(draw, arm=text):
    outcome = draw(hy.sampled_from(["success", "failure", "error"]))
    return EpisodeRecord(
        suite=draw(text),
        task=draw(hy.integers(0, 89)),
        init=draw(hy.integers(0, 49)),
        seed=draw(hy.integers(0, 2**63)),
        arm=draw(arm),
        outcome=outcome,
        steps=draw(hy.integers(0, 530)),
        replans=draw(hy.integers(0, 110)),
        fingerprint="" if outcome == "error" else "ab12",
        action_digest="" if outcome == "error" else "cd34",
        error=draw(text) if outcome == "error" else None,
        success_step=draw(hy.integers(0, 520)) if outcome == "success" else None,
        policy_ms=draw(hy.lists(ms, max_size=5)),
        phases_ms=draw(hy.dictionaries(text, hy.lists(ms, max_size=3), max_size=3)),
        sim_ms=draw(ms),
        jerk=draw(hy.none() | ms),
        batch_sizes=draw(hy.lists(hy.integers(1, 64), max_size=5)),
        wall_s=draw(ms),
        trajectory=draw(
            hy.none()
            | hy.builds(TrajectorySlice, hy.just("trajectory-0-1.f32"), hy.integers(0, 2**40), hy.integers(0, 530))
        ),
        versions=draw(hy.dictionaries(text, text, max_size=2)),
    )


@settings(max_examples=80, deadline=None)
@given(records())
def test_round_trip_is_exact_and_one_line(record):
    line = record.to_json()
    assert "\n" not in line and record_from_json(line) == record
    assert record_from_json(line).to_json() == line


EXAMPLE = EpisodeRecord(
    suite="libero_object",
    task=3,
    init=17,
    seed=7,
    arm="fake",
    outcome="success",
    success_step=99,
    steps=99,
    replans=20,
    fingerprint="ab",
    action_digest="cd",
)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schema": SCHEMA + 1}, "update qlibero"),
        ({"schema": 0}, "older"),
        ({"schema": None}, "not an episode record"),
        ({"colour": "red"}, "unknown field(s) colour"),
        ({"outcome": "maybe"}, "'success', 'failure' or 'error'"),
        ({"outcome": "failure"}, "success_step"),
        ({"fingerprint": ""}, "fingerprint"),
        ({"trajectory": {"file": "trajectory-0-1.f32"}}, "offset"),
    ],
)
def test_foreign_lines_are_refused_with_their_place(change, message):
    line = json.dumps({**json.loads(EXAMPLE.to_json()), **change})
    with pytest.raises(UserError) as refusal:
        record_from_json(line, "runs/fake/episodes-0-1.jsonl:12")
    assert str(refusal.value).startswith("runs/fake/episodes-0-1.jsonl:12: ") and message in str(refusal.value)


def test_lines_of_earlier_versions_with_fields_that_are_gone_still_read():
    line = json.dumps({**json.loads(EXAMPLE.to_json()), "video": None, "warmup_calls": 0})
    assert record_from_json(line) == EXAMPLE


def test_missing_field_is_refused():
    data = json.loads(EXAMPLE.to_json())
    del data["arm"]
    with pytest.raises(UserError, match="arm"):
        record_from_json(json.dumps(data))


def test_non_finite_numbers_never_reach_the_ledger():
    with pytest.raises(ValueError, match="not finite"):
        replace(EXAMPLE, policy_ms=[1.0, float("nan")])


def test_key_reads_as_in_the_ledger_of_the_design():
    assert str(EXAMPLE.key) == "libero_object/3/17/7"
