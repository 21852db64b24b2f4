"""Risk: what A/A arms, clusters and call times are made to say is not what they say.

Expected values are literals, direct enumeration or simulation with a bound of its own.
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student

from qlibero.episode_key import FRESH, EpisodeKey
from qlibero.results.arm_meta import ArmMeta
from qlibero.results.controls import NoiseFloor, excess_flips, pooled_steps
from qlibero.results.execution import Shift
from qlibero.results.paired_outcomes import PairTable
from qlibero.results.pairing import Arm, Pair
from qlibero.results.records import EpisodeRecord
from qlibero.results.speed import speed
from qlibero.stats.proportions import tango, tango_z
from qlibero.stats.sampling import sample
from qlibero.stats.scores import score_zs

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import estimands


def record(i: int, outcome: str = "success", ms: tuple = (), sizes: tuple = (), arm: str = "baseline") -> EpisodeRecord:
    return EpisodeRecord(
        suite="libero_goal",
        task=0,
        init=i,
        seed=7,
        arm=arm,
        outcome=outcome,
        steps=50,
        replans=2,
        success_step=50 if outcome == "success" else None,
        error="hung" if outcome == "error" else None,
        fingerprint="ab",
        action_digest="cd",
        policy_ms=list(ms),
        batch_sizes=list(sizes),
    )


def pairs(flips) -> list[Pair]:
    """The reference always succeeds; a flip is a failure."""
    ends = ["failure" if flip else "success" for flip in flips]
    return [Pair(record(i).key, record(i), record(i, end)) for i, end in enumerate(ends)]


def arm(outcomes, name: str = "aa") -> Arm:
    found = {record(i).key: record(i, outcome, arm=name) for i, outcome in enumerate(outcomes) if outcome}
    return Arm(name, found, {})


@pytest.mark.parametrize(
    "own, others",
    [
        ([1, 1, 1, 0], [[0, 0, 0, 0]]),  # McNemar's one-sided 1/8
        ([1, 0, 1, 0, 1], [[1, 1, 0, 0, 0]]),
        ([1, 1, 1, 0, 1], [[0, 1, 0, 0, 0], [0, 0, 1, 1, 0]]),
        ([1, 0, 0, 1], [[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 1]]),
        ([0, 0, 0], [[0, 0, 0]]),
    ],
)
def test_excess_flips_is_the_enumeration_of_who_flipped(own, others):
    """If arm and replicates are exchangeable, every choice of who flipped on a scene is as likely as the one seen."""
    scenes = list(zip(own, *others, strict=True))
    ways = [sorted(set(itertools.permutations(scene))) for scene in scenes]
    drawn = [sum(way[0] for way in choice) for choice in itertools.product(*ways)]
    expected = np.mean(np.array(drawn) >= sum(own))
    found = excess_flips(pairs(own), [{pair.key: pair for pair in pairs(flips)} for flips in others])
    assert found.p == pytest.approx(expected, abs=1e-12)
    assert (found.scenes, found.arm, found.floor) == (len(own), np.mean(own), pytest.approx(np.mean(others)))


def test_excess_flips_needs_common_scenes():
    assert excess_flips(pairs([1, 0]), []) is None
    assert excess_flips(pairs([1, 0]), [{}]) is None


def test_the_band_of_rounding_is_symmetric_whatever_the_luck_of_the_replicate():
    floor = NoiseFloor(("aa",), PairTable(184, 16, 0, 0))  # 8 % flips, all of them losses
    low, high = floor.band(200)
    assert low == pytest.approx(-high) and (low, high) == pytest.approx(tango(8, 8, 200))


def test_pooled_steps_by_hand():
    """Outcomes of the reference and two replicates; an error and a scene that never ran are no outcome."""
    of = [Pair(record(i).key, record(i, left), record(i, right)) for i, (left, right) in enumerate(ROWS)]
    replicates = [arm(["success", "failure", "error", None]), arm(["failure", "failure", "success", None])]
    assert [step for _, step in pooled_steps(of, replicates)] == pytest.approx([1 / 3, -1 / 3, 1.0 - 0.5, -1.0])


ROWS = (("success", "success"), ("success", "failure"), ("failure", "success"), ("success", "failure"))


def test_speed_by_hand():
    """Scene 0: at batch 1 medians 20 and 10, at batch 2 equal, weights 1 and 1: √2. Scene 1: 10 and 20 ms: ½."""
    of = [
        Pair(
            record(0).key,
            record(0, ms=(10, 20, 30, 8, 99), sizes=(1, 1, 1, 2, 4)),
            record(0, ms=(10, 8, 8), sizes=(1, 2, 2)),
        ),
        Pair(record(1).key, record(1, ms=(10,), sizes=(1,)), record(1, ms=(20,), sizes=(1,))),
        Pair(record(2).key, record(2, ms=(10,), sizes=(1,)), record(2, ms=(1,), sizes=(8,))),  # no common batch size
    ]
    found = speed(of, Arm("w4a8", {}, {}))
    assert found.ratio == pytest.approx(math.sqrt(math.sqrt(2) / 2)) and found.scenes == 2
    assert found.interval is None and found.claim == "unclear"
    assert speed(of[2:], Arm("w4a8", {}, {})).claim == ""
    fake = Arm("fake", {}, {}, ArmMeta.model_validate({"kernels": {"q_proj": {"kernel": "fake"}}}))
    assert speed(of, fake).claim == "simulation"


def timed(ratios) -> list[Pair]:
    return [
        Pair(record(i).key, record(i, ms=(100.0,), sizes=(1,)), record(i, ms=(100.0 / r,), sizes=(1,)))
        for i, r in enumerate(ratios)
    ]


@pytest.mark.parametrize(
    "centre, spread, claim", [(1.0, 0.02, "as fast"), (1.0, 0.5, "unclear"), (1.3, 0.1, "faster"), (0.8, 0.1, "slower")]
)
def test_a_speed_claim_has_the_t_interval_of_its_scenes(centre, spread, claim):
    logs = np.random.default_rng(3).normal(math.log(centre), spread, 40)
    found = speed(timed(np.exp(logs)), Arm("w4a8", {}, {}))
    half = student.ppf(0.975, 39) * logs.std(ddof=1) / math.sqrt(40)
    assert np.log(found.interval) == pytest.approx([logs.mean() - half, logs.mean() + half], abs=0.12 * half)
    assert found.claim == claim


def test_two_arms_of_one_latency_are_seldom_told_apart():
    """Drift of 8 % an episode, the arm's own 4 %: told apart in 5 % of runs, within the bound of 300 of them."""
    random, wrong = np.random.default_rng(5), 0
    for _ in range(300):
        ratios = np.exp(random.normal(0, 0.04, 12))
        wrong += speed(timed(ratios), Arm("w4a8", {}, {})).claim in ("faster", "slower")
    assert wrong <= 15 + 4 * math.sqrt(300 * 0.05 * 0.95)


@pytest.mark.parametrize(
    "own, against, beyond",
    [
        ((1.0, 5.0), (0.5, 4.0), True),
        ((-5.0, -1.0), (-4.0, -0.5), True),
        ((1.0, 5.0), (-0.5, 4.0), False),  # no further from the reference than the reference itself
        ((-1.0, 5.0), (0.5, 4.0), False),
        ((1.0, 5.0), (-4.0, -0.5), False),
        ((1.0, 5.0), None, None),
        (None, (0.5, 4.0), None),
    ],
)
def test_a_shift_counts_beyond_both_runs_of_the_reference(own, against, beyond):
    assert Shift(9, 100.0, 103.0, 3.0, own, 0.01, against).beyond_floor is beyond


@pytest.mark.parametrize("b, r, n, delta", [(11, 9, 500, -0.02), (0, 0, 200, -0.02), (0, 12, 60, 0.05), (9, 0, 40, 0)])
def test_the_score_of_whole_flips_is_tangos_but_for_its_skewness(b, r, n, delta):
    z = tango_z(b, r, n, delta)
    variance = ((r - b - n * delta) / z) ** 2 / n
    q = (variance - delta * (1 - delta)) / 2  # P(broken) that Tango's variance supposes
    third = q * (-1 - delta) ** 3 + (q + delta) * (1 - delta) ** 3 + (1 - 2 * q - delta) * (-delta) ** 3
    k = third / variance**1.5 / math.sqrt(n)
    found = score_zs(np.array([-1.0, 0.0, 1.0]), np.array([[b, n - b - r, r]], float), delta)[0]
    assert found == pytest.approx(z - k * (z * z - 1) / 6 + k * k * z**3 / 108, abs=1e-5)


def test_the_interval_of_fractions_agrees_with_its_p_value():
    steps = [(EpisodeKey("s", 0, i, 7), d) for i, d in enumerate([-1] * 4 + [-0.5] * 6 + [0.5] * 9 + [0] * 281)]
    found = sample(steps)
    low, high = found.interval
    assert low < found.delta < high and found.delta == pytest.approx(-2.5 / 300)
    assert found.noninferiority_p(-low) == pytest.approx(0.025, abs=1e-6)
    assert high - low < np.diff(tango(10, 9, 300))[0]  # halves of flips vary less than whole ones


def test_fresh_states_of_another_seed_are_other_states():
    """Two seeds of 30 official states are 30 units, of 30 fresh ones 60."""
    for kind, clusters in (("official", 30), (FRESH, None)):
        steps = [(EpisodeKey("s", 0, i, seed, kind), -1.0 if i < 3 else 0.0) for i in range(30) for seed in (7, 8)]
        assert sample(steps).clusters == clusters


# wrong verdicts at Δ = −margin; 2,000 runs leave a standard error of 0.35 points, and three of them are allowed
RUNS, ALLOWED = 2_000, 0.025 + 3 * math.sqrt(0.025 * 0.975 / 2_000)


@pytest.mark.parametrize("seeds, psi", [(2, 0.025), (2, 0.03), (5, 0.08), (10, 0.22)])
def test_several_seeds_of_an_initial_state_are_no_independent_pairs(seeds, psi):
    found = estimands.several_seeds(np.random.default_rng(1), RUNS, 200, seeds, psi, -0.02)
    assert max(found.noninferior, found.inferior) <= ALLOWED and found.covered >= 0.935
    assert found.naive.noninferior > (ALLOWED if seeds > 2 else 0)


@pytest.mark.parametrize("tasks, psi, spread", [(10, 0.03, 0.03), (10, 0.08, 0.06), (10, 0.22, 0), (40, 0.08, 0.03)])
def test_new_tasks_are_judged_by_tasks(tasks, psi, spread):
    found = estimands.new_tasks(np.random.default_rng(2), RUNS, tasks, 50, psi, -0.02, spread)
    assert max(found.noninferior, found.inferior) <= ALLOWED and found.covered >= 0.935
    assert found.naive.noninferior > (ALLOWED if spread == 0.06 else 0)


@pytest.mark.parametrize("replicates", [1, 5])
@pytest.mark.parametrize("pairs, icc", [(100, 0.001), (500, 0.3)])
def test_a_pooled_reference_gains_power_and_not_by_being_wrong(pairs, icc, replicates):
    random = np.random.default_rng(3)
    wrong = estimands.pooled(random, RUNS, pairs, replicates, -0.02, icc)
    assert wrong.noninferior <= ALLOWED and wrong.covered >= 0.93
    if pairs == 500:
        alone, pooled = (estimands.pooled(random, RUNS, 500, k, 0.0, icc).noninferior for k in (0, replicates))
        assert pooled > alone + 0.05
