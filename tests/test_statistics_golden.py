"""Risk: a formula that is almost right. Every statistic against published or independently checked values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qlibero.episode_key import EpisodeKey
from qlibero.results.paired_outcomes import plain_word
from qlibero.stats import proportions as st
from qlibero.stats.evalues import margin_martingales
from qlibero.stats.sampling import Sample, sample
from qlibero.stats.shifts import mean_t_interval, sign_flip_p


def in_points(interval, digits=2):
    return [round(100 * x, digits) for x in interval]


@pytest.mark.parametrize(
    "k, n, expected",
    [
        (462, 500, [89.7, 94.4]),
        (494, 500, [97.4, 99.4]),
        (1937, 2000, [96.0, 97.5]),
        (100, 100, [96.3, 100]),
        (9, 10, [59.6, 98.2]),
    ],
)
def test_wilson(k, n, expected):
    assert in_points(st.wilson(k, n), 1) == expected


@pytest.mark.parametrize(
    "b, r, p", [(11, 9, 0.824), (8, 14, 0.286), (6, 0, 0.031), (9, 1, 0.021), (5, 0, 0.0625), (0, 0, 1.0)]
)
def test_exact_mcnemar(b, r, p):
    assert st.mcnemar_exact(b, r) == pytest.approx(p, abs=5e-4)


def test_fewer_than_six_discordant_pairs_are_never_significant():
    assert min(st.mcnemar_exact(b, n - b) for n in range(6) for b in range(n + 1)) > 0.05


@pytest.mark.parametrize(
    "r, b, n, expected",
    [
        (5, 0, 41, [2.58, 25.54]),
        (150, 86, 1600, [2.14, 5.90]),
        (9, 11, 500, [-2.33, 1.47]),
        (36, 40, 2000, [-1.08, 0.67]),
        (0, 0, 500, [-0.76, 0.76]),
        (0, 0, 2000, [-0.19, 0.19]),
        (5, 0, 100, [1.12, 11.18]),
    ],
)
def test_tango(r, b, n, expected):
    assert in_points(st.tango(b, r, n)) == expected


@pytest.mark.parametrize("a, b, r, n, expected", [(14, 0, 5, 41, [1.15, 22.65]), (794, 86, 150, 1600, [2.12, 5.87])])
def test_newcombe_published_examples(a, b, r, n, expected):
    assert in_points(st.newcombe(a, b, r, n - a - b - r)) == expected


@pytest.mark.parametrize(
    "b, r, n, expected",
    [
        (11, 9, 500, "inconclusive"),
        (10, 10, 500, "non-inferior"),
        (14, 6, 2000, "non-inferior"),
        (45, 15, 2000, "worse"),  # p = 0.0001, and the interval reaches from −2.3 to −0.8
        (60, 5, 500, "inferior"),
        (0, 0, 0, "no pairs"),
        (0, 5, 5, "inconclusive (few pairs)"),  # wrong in 2.8 % of the worst cases
    ],
)
def test_verdict_at_two_points(b, r, n, expected):
    assert plain_word(Sample(n, b, r), 0.02) == expected


def test_holm_by_hand():
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([]) == []


POWER = {  # n: (minimum detectable difference in pp, non-inferiority power at 2 pp) at ψ = 2, 5, 8, 10, 20 %
    100: ([None, None, 7.9, 8.8, 12.8], None),
    200: ([None, 4.4, 5.7, 6.4, 9.1], [0.34, 0.19, 0.15, 0.13, 0.09]),
    500: ([1.8, 2.9, 3.7, 4.1, 5.7], [0.80, 0.48, 0.34, 0.28, 0.17]),
    1000: ([1.3, 2.0, 2.6, 2.9, 4.0], [0.98, 0.78, 0.60, 0.51, 0.29]),
    2000: ([0.9, 1.4, 1.8, 2.0, 2.8], [1.0, 0.98, 0.88, 0.80, 0.52]),
}


@pytest.mark.parametrize("n", POWER)
def test_power_table(n):
    differences, noninferiority = POWER[n]
    discordances = (0.02, 0.05, 0.08, 0.10, 0.20)
    found = [st.minimum_detectable_difference(n, psi) for psi in discordances]
    assert [None if x is None else round(100 * x, 1) for x in found] == differences
    if noninferiority:
        powers = [st.noninferiority_power(n, psi, 0.02) for psi in discordances]
        assert powers == pytest.approx(noninferiority, abs=0.011)


@pytest.mark.parametrize(
    "p, n, points",
    [(0.97, 100, 11.0), (0.92, 100, 14.1), (0.97, 500, 3.8), (0.92, 500, 5.5), (0.97, 2000, 1.7), (0.92, 2000, 2.6)],
)
def test_detectable_drop_of_independent_samples(p, n, points):
    assert round(100 * st.detectable_drop(p, n, n), 1) == points
    assert st.detectable_drop(0.3, 5, 5) is None


@pytest.mark.parametrize("psi, pairs", [(0.02, 520), (0.05, 1040), (0.08, 1610), (0.10, 2000), (0.20, 3940)])
def test_pairs_for_noninferiority(psi, pairs):
    assert st.pairs_for_noninferiority(psi, 0.02) == pytest.approx(pairs, abs=10)


def test_size_of_noninferiority_at_the_boundary():
    """True Δ = −2 pp: the chance of a false "non-inferior", by enumeration, is about 2.5 %."""
    n, margin = 500, 0.02
    from scipy.stats import multinomial

    for psi in (0.03, 0.05, 0.10):
        p_broken, p_repaired = (psi + margin) / 2, (psi - margin) / 2
        table = multinomial(n, [p_broken, p_repaired, 1 - psi])
        size = 0.0
        for b in range(0, 80):
            for r in range(0, 60):
                weight = table.pmf([b, r, n - b - r])
                if weight > 1e-7 and st.tango_z(b, r, n, -margin) > st.normal_quantile():
                    size += weight
        assert 0.018 < size < 0.026


def test_margin_martingale_decides_after_272_concordant_pairs():
    above, below = margin_martingales([0] * 400, 0.02)
    assert int(np.argmax(above >= math.log(40))) + 1 == 272
    assert (below <= 1e-12).all()


def test_margin_martingale_is_fair_at_the_margin():
    """At Δ = −margin the expected factor of every λ is 1, so the mean over outcomes of E after one pair is 1."""
    margin, p_broken, p_repaired = 0.02, 0.05, 0.03
    for which in (0, 1):
        e = {x: math.exp(margin_martingales([x], margin)[which][0]) for x in (-1, 0, 1)}
        mean = p_broken * e[-1] + p_repaired * e[1] + (1 - p_broken - p_repaired) * e[0]
        assert mean == pytest.approx(1, abs=1e-12)


def test_t_interval_by_hand():
    deltas = [-0.1, 0.0, 0.05, -0.05]
    half = 3.182446 * np.std(deltas, ddof=1) / 2
    assert mean_t_interval(deltas) == pytest.approx((-0.025 - half, -0.025 + half), abs=1e-6)
    assert mean_t_interval([0.1]) is None


def per_task(*steps):
    """A sample for new tasks: `steps` of each task's pairs."""
    return sample([(EpisodeKey("s", t, i, 7), x) for t, of in enumerate(steps) for i, x in enumerate(of)], "new_tasks")


def test_design_effect_by_hand():
    """Two tasks of four pairs, −2 and 0: Δ = −1/4; between 2·(1 + 1) = 4, within 2 − 8/16 = 1.5. So 3/4 of 3 effective
    pairs are broken; the ends are those of 1.25 broken, and of 0.75 broken and 1 repaired, by numerical maximisation of
    the likelihood and t = 12.7062."""
    found = per_task([-1, -1, 0, 0], [0, 0, 0, 0])
    assert (found.clusters, found.design_effect) == (2, pytest.approx(4 / 1.5))
    assert found.interval == pytest.approx((-0.9937725, 0.9888341), abs=1e-6)
    assert found.noninferiority_p(-found.interval[0]) == pytest.approx(0.025, abs=1e-6)


def test_many_tasks_of_many_pairs_give_the_t_interval():
    """Far from the edges Tango at effective counts is the t interval of the tasks' own differences."""
    random = np.random.default_rng(1)
    tasks = [random.choice([-1, 0, 1], p=[0.2 + e, 0.6, 0.2 - e], size=400) for e in random.normal(0, 0.05, 40)]
    low, high = mean_t_interval([np.mean(task) for task in tasks])
    assert per_task(*tasks).interval == pytest.approx((low, high), abs=0.002)


def test_a_cluster_interval_is_never_of_no_width_and_never_narrower_than_that_of_pairs():
    equal = per_task(*[[-1] + [0] * 49] * 10)  # every task −2 pp
    low, high = equal.interval
    pairs_low, pairs_high = st.tango(10, 0, 500)
    assert low <= pairs_low < -0.02 < pairs_high <= high
    assert per_task([0] * 50, [0] * 50).interval[0] < -0.01  # no flip at all is not a certain zero for new tasks
    assert per_task([0] * 50).interval == (-1, 1)  # one task says nothing of others


def test_sign_flip_exact_small_case():
    assert sign_flip_p([1, 1, 1, 1, 1]) == 2 / 32
    assert sign_flip_p([]) == sign_flip_p([0.0, 0.0]) == 1


def test_impossible_counts_are_refused():
    for k, n in [(-1, 5), (6, 5), (0, 0)]:
        with pytest.raises(ValueError):
            st.wilson(k, n)
