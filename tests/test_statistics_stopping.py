"""Risk: stopping early on luck. Error rates of the sequential verdict by simulation, and its order fixed beforehand."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hy

from qlibero.episode_key import EpisodeKey
from qlibero.errors import GuardRefusal, UserError
from qlibero.results.comparison import SequentialTest
from qlibero.results.declaration import declare, declared_order, make_declaration, read_declaration
from qlibero.results.stopping import decide_by_evalues, pair_step
from qlibero.results.wording import sequential_text

KEYS = [EpisodeKey("libero_object", task, init, 7) for task in range(10) for init in range(50)]


def simulate(delta: float, psi: float, n: int, runs: int, seed: int, margin: float = 0.02) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    p = [(psi - delta) / 2, 1 - psi, (psi + delta) / 2]
    verdicts = []
    for _ in range(runs):
        verdicts.append(
            decide_by_evalues(rng.choice([-1, 0, 1], size=n, p=p).tolist(), margin=margin, interval=False).verdict
        )
    return {v: verdicts.count(v) / runs for v in ("non-inferior", "inferior", "undecided")}


@pytest.mark.slow
@pytest.mark.parametrize("psi", [0.02, 0.05, 0.2])
def test_at_the_margin_either_verdict_is_wrong_at_most_alpha_of_the_time(psi):
    """Δ = −margin is the hardest truth for both directions. 800 runs: the Monte-Carlo error at 2.5 % is 0.55 %."""
    rates = simulate(-0.02, psi, n=1000, runs=800, seed=int(1000 * psi))
    assert rates["non-inferior"] <= 0.025 + 3 * 0.0055
    assert rates["inferior"] <= 0.025 + 3 * 0.0055


def test_equal_arms_are_found_non_inferior():
    """88 % within 1,000 pairs at ψ = 2 %, 84 % within 2,000 at ψ = 5 %; never inferior."""
    small = simulate(0.0, 0.02, n=1000, runs=400, seed=1)
    assert small["non-inferior"] == pytest.approx(0.88, abs=0.05) and small["inferior"] <= 0.01
    assert simulate(0.0, 0.05, n=2000, runs=300, seed=2)["non-inferior"] == pytest.approx(0.84, abs=0.06)


def test_a_clear_loss_is_found_inferior_soon():
    rng = np.random.default_rng(0)
    spent = []
    for _ in range(200):
        decision = decide_by_evalues(
            rng.choice([-1, 0, 1], size=500, p=[0.22, 0.75, 0.03]).tolist(), margin=0.02, interval=False
        )
        assert decision.verdict == "inferior"
        spent.append(decision.pairs)
    assert np.median(spent) < 80  # of 500


def test_concordant_pairs_alone_decide_after_272():
    assert decide_by_evalues([0] * 271 + [None] * 9, margin=0.02, interval=False).verdict is None
    decision = decide_by_evalues([0] * 500, margin=0.02, interval=False)
    assert (decision.verdict, decision.pairs, decision.broken) == ("non-inferior", 272, 0)


def test_unfinished_pairs_hold_up_what_comes_after_them():
    steps = [0] * 100 + [None] + [0] * 400
    decision = decide_by_evalues(steps, margin=0.02, interval=False)
    assert not decision.stop and decision.pairs == 100


def test_the_unknown_outcome_of_an_error_is_bounded_by_what_is_known():
    assert [pair_step("success", "failure"), pair_step("failure", "success"), pair_step("failure", "failure")] == [
        -1,
        1,
        0,
    ]
    assert pair_step("success", "error") == (-1, 0) and pair_step("failure", "error") == (0, 1)
    assert pair_step("error", "success") == (0, 1) and pair_step("error", "failure") == (-1, 0)
    assert pair_step("error", "error") == (-1, 1) and pair_step("error", None) is None


def test_errors_count_against_either_verdict_and_cannot_be_skipped():
    """Where 70 of 200 pairs were lost in the tested arm, the pairs that are left say nothing about the arm."""
    lost = [(-1, 0) if i % 3 == 0 else 0 for i in range(600)]
    decision = decide_by_evalues(lost, margin=0.02, interval=False)
    assert decision.verdict is None and not decision.stop, "errors are left to retry"
    assert decision.without_errors == "non-inferior" and decision.errors == 200
    few = decide_by_evalues([(-1, 0)] * 2 + [0] * 500, margin=0.02, interval=False)
    assert few.verdict == "non-inferior" and few.pairs > 272 and few.position == few.pairs + 2
    flattering = decide_by_evalues([(-1, 1)] * 200 + [-1, 0] * 20, margin=0.02, interval=False)
    assert flattering.verdict is None and flattering.without_errors == "inferior"


@settings(max_examples=60, deadline=None)
@given(hy.lists(hy.sampled_from([-1, 0, 0, 0, 1, (-1, 0), (0, 1)]), max_size=200), hy.randoms())
def test_a_retried_error_only_adds_evidence(steps, random):
    """Whatever the errors turn out to be, both e-values grow at every pair, so no decision is withdrawn."""
    known = [random.choice(s) if isinstance(s, tuple) else s for s in steps]
    before, after = (
        decide_by_evalues(steps, margin=0.1, alpha=1e-9, interval=False),
        decide_by_evalues(known, margin=0.1, alpha=1e-9, interval=False),
    )
    if before.position == after.position:
        assert before.noninferior <= after.noninferior * (1 + 1e-9)
        assert before.inferior <= after.inferior * (1 + 1e-9)
    if decide_by_evalues(steps, margin=0.1, alpha=0.2, interval=False).stop:
        assert decide_by_evalues(known, margin=0.1, alpha=0.2, interval=False).stop


def test_errors_that_depend_on_the_outcome_keep_the_error_rates():
    """The arm crashes in half of the episodes it would fail: Δ = −δ, and leaving errors out looks like Δ > −δ."""
    rng, wrong, fooled = np.random.default_rng(3), 0, 0
    for _ in range(200):
        truth = rng.choice([-1, 0, 1], size=800, p=[0.11, 0.88, 0.01])
        steps = [(-1, 0) if x == -1 and rng.random() < 0.5 else int(x) for x in truth]
        decision = decide_by_evalues(steps, margin=0.1, interval=False)
        wrong += decision.verdict == "non-inferior"
        fooled += decision.without_errors == "non-inferior"
    assert wrong / 200 <= 0.025 + 3 * 0.011 and fooled / 200 > 0.2


def test_spent_without_an_answer_is_undecided():
    assert decide_by_evalues([0, 1, -1] * 20, margin=0.02, interval=False).verdict == "undecided"
    assert decide_by_evalues([], margin=0.02, interval=False).pairs == 0


def test_four_arms_that_share_alpha_need_four_times_the_evidence():
    one, four = (
        decide_by_evalues([0] * 600, margin=0.02, interval=False),
        decide_by_evalues([0] * 600, margin=0.02, alpha=0.025 / 4, interval=False),
    )
    assert four.pairs > one.pairs and four.threshold == 160


@settings(max_examples=40, deadline=None)
@given(hy.lists(hy.sampled_from([-1, 0, 0, 0, 1, (-1, 0)]), max_size=300), hy.integers(0, 300))
def test_more_pairs_never_change_a_decision(steps, cut):
    """Prefix stability: what was decided stays decided whatever comes later, so a resumed run agrees with itself."""
    early = decide_by_evalues(steps[:cut] + [None] * len(steps[cut:]), margin=0.1, alpha=0.2, interval=False)
    late = decide_by_evalues(steps, margin=0.1, alpha=0.2, interval=False)
    if early.stop and None in (steps[:cut] + [None] * len(steps[cut:])):
        assert late == early


def test_order_depends_on_the_seed_and_on_nothing_else():
    shuffled = random.sample(KEYS, len(KEYS))
    assert declared_order(KEYS, 7) == declared_order(shuffled, 7) != declared_order(KEYS, 8)
    first_tasks = {key.task for key in declared_order(KEYS, 7)[:100]}
    assert len(first_tasks) == 10, "the order must run over all tasks"
    some = set(random.sample(KEYS, 100))
    assert [k for k in declared_order(KEYS, 7) if k in some] == list(declared_order(some, 7))


RULE = {"margin": 0.02, "alpha": 0.025, "arms": ["fake"], "seed": 7}


def test_declaration_is_written_once_and_guarded(tmp_path):
    assert read_declaration(tmp_path) is None
    declaration = make_declaration(KEYS, **RULE)
    assert list(tmp_path.iterdir()) == [], "only declare writes"
    declare(tmp_path, declaration)
    assert make_declaration(reversed(KEYS), **RULE) == declaration == read_declaration(tmp_path)
    assert not declaration.decide([0] * 100).stop
    for change in ({"margin": 0.05}, {"alpha": 0.05}, {"seed": 8}, {"arms": ["fake", "w4a4"]}):
        with pytest.raises(GuardRefusal, match="declares another"):
            declare(tmp_path, make_declaration(KEYS, **{**RULE, **change}))


def test_the_cap_ends_the_question_undecided_and_may_be_raised(tmp_path):
    capped = make_declaration(KEYS, **RULE, max_pairs=100)
    assert capped.decide([0] * 99).verdict is None
    decision = capped.decide([0] * 300)
    assert (decision.verdict, decision.pairs, decision.stop) == ("undecided", 100, True)
    shown = SequentialTest(decision, margin=0.02, max_pairs=100, declared_pairs=500, episodes_saved=0)
    assert sequential_text(shown).startswith("undecided at the cap of 100 pairs") and "saved" not in sequential_text(
        shown
    )
    declare(tmp_path, capped)
    declare(
        tmp_path, make_declaration(KEYS, **RULE, max_pairs=300)
    )  # evidence may be looked at whenever: no new question
    assert read_declaration(tmp_path).decide([0] * 300).verdict == "non-inferior"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"margin": 0.02, "alpha": 0.025, "arms": ["fake"], "order": ["x"]}',
        '{"margin": 0.02, "alpha": 0.025, "arms": ["fake"], "order": []}',
    ],
)
def test_a_broken_declaration_is_named(tmp_path, text):
    (tmp_path / "stopping.json").write_text(text)
    with pytest.raises(UserError, match="stopping.json: not a stopping declaration"):
        read_declaration(tmp_path)


def test_a_declaration_of_an_earlier_version_is_one_of_e_values(tmp_path):
    """As runs wrote it before there was a choice of methods."""
    order = [str(key) for key in declared_order(KEYS, 7)]
    old = {"margin": 0.02, "alpha": 0.025, "arms": ["fake"], "order": order, "max_pairs": None}
    (tmp_path / "stopping.json").write_text(json.dumps(old))
    found = read_declaration(tmp_path)
    assert found.method == "evalues" and found.decide([0] * 500).pairs == 272
    declare(tmp_path, make_declaration(KEYS, **RULE))
    with pytest.raises(GuardRefusal, match="method 'evalues' there and 'group_sequential' here"):
        declare(tmp_path, make_declaration(KEYS, **RULE, method="group_sequential"))
    assert json.loads((tmp_path / "stopping.json").read_text())["max_pairs"] is None


def test_the_interval_of_e_values_is_the_one_of_the_verdict():
    rng = np.random.default_rng(8)
    for shares in ([0.01, 0.98, 0.01], [0.25, 0.72, 0.03], [0.1, 0.8, 0.1]):
        steps = rng.choice([-1, 0, 1], size=300, p=shares).tolist()
        decision = decide_by_evalues(steps, margin=0.05)
        low, high = decision.interval
        assert low < (decision.repaired - decision.broken) / decision.pairs < high
        assert (decision.verdict == "non-inferior") == (low >= -0.05 - 1e-6)
        assert (decision.verdict == "inferior") == (high <= -0.05 + 1e-6)
