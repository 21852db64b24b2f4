"""Risk: own code drifting from the libraries. Agreement with scipy and statsmodels over random counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as hy
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from qlibero.stats import proportions as st
from qlibero.stats.shifts import sign_flip_p

pytestmark = pytest.mark.slow

proportions = hy.integers(1, 3000).flatmap(lambda n: hy.tuples(hy.integers(0, n), hy.just(n)))
tables = hy.tuples(hy.integers(0, 300), hy.integers(0, 60), hy.integers(0, 60), hy.integers(0, 300)).filter(any)


@settings(max_examples=150, deadline=None)
@given(proportions)
def test_one_proportion(kn):
    k, n = kn
    assert st.wilson(k, n) == pytest.approx(proportion_confint(k, n, method="wilson"), abs=1e-12)
    exact = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    assert st.wilson(k, n) == pytest.approx((exact.low, exact.high), abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(tables)
def test_mcnemar(table):
    a, b, r, d = table
    if b + r:
        assert st.mcnemar_exact(b, r) == pytest.approx(scipy.stats.binomtest(b, b + r, 0.5).pvalue, abs=1e-12)
    assert st.mcnemar_exact(b, r) == pytest.approx(min(1, mcnemar([[a, b], [r, d]], exact=True).pvalue), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(hy.lists(hy.floats(0, 1), min_size=1, max_size=20))
def test_holm(p):
    assert st.holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist(), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(tables)
def test_tango_is_symmetric_nested_and_holds_the_estimate(table):
    a, b, r, d = table
    n = a + b + r + d
    low, high = st.tango(b, r, n)
    assert -1 <= low <= (r - b) / n <= high <= 1
    assert st.tango(r, b, n) == pytest.approx((-high, -low), abs=1e-9)
    narrow = st.tango(b, r, n, 0.8)
    assert low <= narrow[0] <= narrow[1] <= high
    if -1 < low and high < 1:
        z = st.normal_quantile()
        assert st.tango_z(b, r, n, low) == pytest.approx(z, abs=1e-6)
        assert st.tango_z(b, r, n, high) == pytest.approx(-z, abs=1e-6)
    newcombe = st.newcombe(a, b, r, d)
    assert newcombe[0] <= (r - b) / n <= newcombe[1]


def test_tango_nuisance_is_the_maximum_likelihood_estimate():
    """z from a numerical maximiser of the constrained likelihood equals the closed form."""
    from scipy.optimize import minimize_scalar

    rng = np.random.default_rng(1)
    for _ in range(60):
        n = int(rng.integers(20, 500))
        b, r = rng.integers(1, 10, size=2)
        delta = float(rng.uniform(-0.1, 0.1))

        def minus_log_likelihood(q, b=b, r=r, n=n, delta=delta):
            return -(b * math.log(q) + r * math.log(q + delta) + (n - b - r) * math.log(1 - 2 * q - delta))

        low, high = max(0.0, -delta) + 1e-12, (1 - delta) / 2 - 1e-12
        q = minimize_scalar(minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
        z = (r - b - n * delta) / math.sqrt(n * (2 * q + delta - delta**2))
        assert st.tango_z(b, r, n, delta) == pytest.approx(z, abs=1e-4)


@pytest.mark.parametrize("n, psi, delta, nominal", [(100, 0.05, 0, 95.3), (500, 0.02, 0, 95.7), (500, 0.05, 0, 94.7)])
def test_tango_coverage_by_enumeration(n, psi, delta, nominal):
    p_broken, p_repaired = (psi - delta) / 2, (psi + delta) / 2
    table = scipy.stats.multinomial(n, [p_broken, p_repaired, 1 - psi])
    covered, z = 0.0, st.normal_quantile()
    for b in range(0, 45):
        for r in range(0, 45):
            if b + r <= n and (weight := table.pmf([b, r, n - b - r])) > 1e-8:
                covered += weight * (abs(st.tango_z(b, r, n, delta)) <= z)
    assert 100 * covered == pytest.approx(nominal, abs=0.06)


def test_mcnemar_power_against_simulation():
    n, psi, delta = 500, 0.05, 0.03
    rng = np.random.default_rng(3)
    draws = rng.multinomial(n, [(psi + delta) / 2, (psi - delta) / 2, 1 - psi], size=4000)
    rejected = np.mean([st.mcnemar_exact(int(b), int(r)) <= 0.05 for b, r, _ in draws])
    assert st.mcnemar_power(n, psi, delta) == pytest.approx(rejected, abs=0.025)


def test_sign_flip_against_scipy():
    rng = np.random.default_rng(0)
    small, large = rng.normal(0.3, 1, 11), rng.normal(0.2, 1, 60)
    for x, tolerance in ((small, 1e-12), (large, 0.01)):
        oracle = scipy.stats.permutation_test(
            (x,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(5)
        ).pvalue
        assert sign_flip_p(x) == pytest.approx(oracle, abs=tolerance)
