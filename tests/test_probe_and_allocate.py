"""Risk: a number from a few observations is taken for more than it is, or bits go where they do not matter."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import yaml
from pi05_small import observations

from qlibero.config.load import load_experiment
from qlibero.errors import UserError
from qlibero.quant.action_error import action_error, arm_error, median_interval
from qlibero.quant.allocate import Linear, allocate, bits_of, spend
from qlibero.quant.held_out import phase_of
from qlibero.quant.probe import Ratio, probe, ratio


def test_the_interval_of_a_median_is_that_of_the_tables():
    """Ranks of the 95 % interval for n = 6, 10, 25, 50 (Conover 1999, table A3 by the binomial): 1, 2, 8, 18."""
    for n, rank in ((6, 1), (10, 2), (25, 8), (50, 18)):
        values = np.random.default_rng(n).permutation(n) + 1.0
        assert median_interval(values) == (rank, n + 1 - rank)
    assert median_interval([1.0] * 5) is None


def test_the_interval_of_a_median_covers_it_as_often_as_it_says():
    draws = np.random.default_rng(0).lognormal(size=(2000, 32))
    found = np.array([median_interval(row) for row in draws])
    assert 0.94 <= np.mean((found[:, 0] <= 1.0) & (found[:, 1] >= 1.0)) <= 0.985


def test_a_gripper_that_changes_its_mind_is_no_error_of_the_arm():
    exact = np.zeros((8, 10, 7))
    exact[..., 6] = -1.0
    found = exact.copy()
    found[0, 0, 6] = 1.0  # within the executed steps
    found[1, 7, 6] = 1.0  # beyond them
    found[:, :, 2] = 0.06
    error = action_error(exact, found, steps=5)
    assert (error.gripper_changed, error.gripper_actions, error.largest) == (1, 40, 2.0)
    assert error.arm == pytest.approx(0.06 / 6**0.5) and error.arm95 == pytest.approx((error.arm, error.arm))
    found[:, 5:, :] = 9.0
    assert arm_error(exact, found, 5) == pytest.approx([error.arm] * 8)


def test_a_ratio_is_paired():
    """Errors vary tenfold between observations, one arm is 20 % above the other in each: the interval is a point."""
    first = np.exp(np.random.default_rng(0).normal(size=40))
    said = ratio(first * 1.2, first)
    assert said.mean == pytest.approx(1.2) and said.interval95 == pytest.approx((1.2, 1.2))
    low, high = ratio(first * np.exp(np.random.default_rng(1).normal(size=40)), first).interval95
    assert low < 1 < high
    assert ratio(np.zeros(4), first[:4]) == Ratio(None, None)


def test_phases_are_thirds_of_a_demonstration():
    made = [replace(o, prompt=prompt) for o, prompt in zip(observations(9), "aaaabbbcc", strict=True)]
    assert phase_of(made) == "start start middle end start middle end start middle".split()


def test_bits_are_spent_as_well_as_any_choice_can():
    """Against all 3^6 choices: greedy by gain per bit is as good where all steps cost the same."""
    random = np.random.default_rng(3)
    levels = [2, 4, 8]
    linears = [
        Linear(f"l{i}", 10, {b: float(e) * 4.0**-b for b in levels}) for i, e in enumerate(random.lognormal(size=6))
    ]
    budget = 10 * (2 * 2 + 4 * 3 + 8)
    chosen = spend(linears, levels, budget)
    assert sum(10 * b for b in chosen.values()) <= budget
    left = sum(x.effect[chosen[x.name]] for x in linears)
    best = min(
        sum(x.effect[b] for x, b in zip(linears, choice, strict=True))
        for choice in itertools.product(levels, repeat=6)
        if 10 * sum(choice) <= budget
    )
    # no choice leaves a tenth less: steps are of two sizes, so greedy is near the best and not always it
    assert left <= 1.1 * best
    order = sorted(linears, key=lambda x: -x.effect[2])
    assert [chosen[x.name] for x in order] == sorted(chosen.values(), reverse=True)


def test_a_budget_that_nothing_keeps_is_refused():
    with pytest.raises(UserError, match=r"4 bits everywhere take .* MB .* the budget is .* write more, or fewer bits"):
        spend([Linear("a", 8, {4: 1.0, 8: 0.1})], [4, 8], 31)
    for text in ("", "4,", "7", "4;8", "16"):
        with pytest.raises(UserError, match="write some of 2, 3, 4, 5, 6, 8"):
            bits_of(text)
    assert bits_of("8,4,4") == [4, 8]


@pytest.fixture(scope="module")
def experiment(tiny_experiment, tmp_path_factory):
    sets = [
        "backends=[baseline,aa,{name: w2, backend: fake, quant: {weight_bits: 2}},{name: w8, backend: fake, quant: "
        "{weight_bits: 8}}]",
        "quant.method=rtn",
        f"quant.artifact_dir={tmp_path_factory.mktemp('artifacts')}",
    ]
    return load_experiment(tiny_experiment, sets)


def test_a_probe_orders_arms_by_their_bits(experiment):
    document = probe(experiment).to_json()
    aa, w2, w8 = document["arms"]
    assert document["observations"] == 8 and not document["unseen"]  # the tiny file has no 32 to spare, and it is said
    assert aa["arm_error"] < 1e-4 < w8["arm_error"] < w2["arm_error"] / 4
    assert w2["ratio"] == 1.0 and w8["ratio95"][1] < 0.5
    assert set(w2["phases"]) == {"start", "middle", "end"} and w2["gripper_actions"] == 8 * document["steps"]


def test_allocated_bits_keep_their_budget_and_can_be_used(experiment, tiny_experiment, tmp_path):
    out = tmp_path / "bits.yaml"
    document = allocate(experiment, budget_mb=None, mean_bits=4.0, bits=[2, 8], out=out)
    assert document["mean_bits"] <= 4.0 and document["evenly"]["bits"] == 2
    assert {row["bits"] for row in document["layers"]} == {2, 8}
    assert document["together"]["arm"] < document["evenly"]["arm"]
    written = yaml.safe_load(out.read_text())
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"extends": [str(tiny_experiment), str(out)]}))
    again = load_experiment(own, ["quant.method=rtn"])
    assert again.quant.per_layer_bits == written["quant"]["per_layer_bits"]
    with pytest.raises(UserError, match="--budget-mb or --mean-bits"):
        allocate(experiment, budget_mb=1.0, mean_bits=4.0, bits=[4, 8], out=None)
