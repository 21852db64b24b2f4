"""Risk: a published table is called a gain or a loss that no pairing of its episodes, or not every one, supports."""

from __future__ import annotations

import json

import pytest

from qlibero.cli import main
from qlibero.errors import UserError
from qlibero.results.paired_outcomes import plain_word
from qlibero.results.published import bounds, compare_counts, read_counts
from qlibero.stats.proportions import mcnemar_exact
from qlibero.stats.sampling import Sample


def judged(reference, arm, margin=0.02):
    return compare_counts([f"reference={reference}", f"arm={arm}"], margin).arms["arm"]


def test_quantvla_four_more_of_800_are_never_significant_and_always_non_inferior():
    found = judged("777/800", "781/800")
    assert [round(p, 3) for p in found.p] == [0.125, 0.644] and found.difference == "never significant"
    assert found.words == ("non-inferior",)


def test_oft_97_6_against_93_2_is_a_proven_loss_by_more_than_the_margin_or_not():
    found = judged("488/500", "466/500")
    assert found.p[1] == pytest.approx(0.00164, abs=1e-5) and found.difference == "provably different"
    assert set(found.words) == {"inferior", "worse"}
    assert compare_counts(["a=488/500", "b=466/500"]).words() == {"worse"}  # whatever the pairing


def test_libero_plus_two_runs_that_disagree_in_a_tenth_of_their_episodes_show_nothing():
    """9.2 % of 500 flip, as many each way: the same policy twice. Evidence neither of a difference nor of equality."""
    again = Sample(500, 23, 23)
    assert again.difference_p == 1 and plain_word(again, 0.02) == "inconclusive"
    assert plain_word(Sample(2000, 92, 92), 0.02) == "non-inferior"


@pytest.mark.parametrize("k0, k1, n", [(48, 46, 50), (30, 40, 50), (97, 88, 100), (10, 10, 40)])
def test_the_ends_bound_every_pairing(k0, k1, n):
    found = bounds(read_counts(f"r={k0}/{n}"), read_counts(f"a={k1}/{n}"), 0.1)
    fewest, most = max(0, k0 - k1), min(k0, n - k1)
    every = [Sample(n, b, b + k1 - k0) for b in range(fewest, most + 1)]
    assert set(found.words) == {plain_word(one, 0.1) for one in every}
    p = [mcnemar_exact(b, b + k1 - k0) for b in range(fewest, most + 1)]
    assert found.p == pytest.approx((min(p), max(p)))
    assert found.widest == pytest.approx((min(e.interval[0] for e in every), max(e.interval[1] for e in every)))


@pytest.mark.parametrize("text", ["a", "a=1", "a=5/0", "a=9/8", "a=x/8", "=1/2"])
def test_counts_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="--counts"):
        compare_counts([text, "b=1/2"])


def test_different_numbers_of_episodes_are_not_paired():
    found = judged("777/800", "90/100")
    assert not found.paired and "nothing can be paired" in found.sentence


@pytest.mark.parametrize(
    "fail_on, status", [("inferior,worse", 4), ("inferior", 0), ("inconclusive", 0), ("inferiour", 2)]
)
def test_fail_on_has_a_status_of_its_own(capfd, fail_on, status):
    assert main(["compare", "--counts", "a=488/500", "b=466/500", "--fail-on", fail_on]) == status
    document = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert ("arms" in document) == (status != 2)


def test_results_or_counts_and_not_both(capfd, tmp_path):
    assert main(["compare"]) == 2
    assert main(["compare", str(tmp_path), "--counts", "a=1/2", "b=1/2"]) == 2


def test_mcnemar_of_many_pairs_takes_no_time():
    assert mcnemar_exact(8000, 8000) == 1 and mcnemar_exact(7800, 8200) == pytest.approx(0.0016, abs=2e-4)
