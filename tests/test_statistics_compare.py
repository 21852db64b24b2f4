"""Risk: a verdict from the wrong pairs. Pairing, errors, scenes, families and the contract of `compare`'s dict."""

from __future__ import annotations

import json
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from qlibero.errors import UserError
from qlibero.reporting.html.document import write_report
from qlibero.reporting.terminal import print_comparison, print_run
from qlibero.results.compare import compare, compare_paths, compare_runs
from qlibero.results.declaration import declare, make_declaration
from qlibero.results.ledger import Ledger, write_meta
from qlibero.results.paired_outcomes import plain_word
from qlibero.results.quality import first_divergence, gripper_flips, jerk, path_length_m
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import read_run
from qlibero.results.wording import sequential_text
from qlibero.stats.sampling import Sample
from qlibero.tracking.rows import versus_baseline


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Durability is tested in test_ledger_survives; here thousands of fsyncs would only take time."""
    monkeypatch.setattr("qlibero.results.ledger.os.fsync", lambda descriptor: None)


def record(arm, task, init, outcome, **more):
    fields = dict(
        suite="libero_object",
        task=task,
        init=init,
        seed=7,
        arm=arm,
        outcome=outcome,
        steps=50,
        replans=2,
        success_step=50 if outcome == "success" else None,
        error="hung" if outcome == "error" else None,
        fingerprint=f"{task:02x}{init:02x}",
        action_digest=arm.encode().hex(),
        policy_ms=[10.0, 10.0],
    )
    return EpisodeRecord(**{**fields, **more})


def write(run_dir, arm, outcomes, suite="libero_object", trajectories=None, **more):
    """`outcomes`: {(task, init): "success" | "failure" | "error"}."""
    with Ledger(run_dir, arm, 0, f"hash of {arm}") as ledger:
        for (task, init), outcome in outcomes.items():
            rows = trajectories(task, init) if trajectories else None
            ledger.append(record(arm, task, init, outcome, suite=suite, **more), rows)


def grid(broken=0, repaired=0, n=100, tasks=10):
    """Outcomes of reference and arm over n pairs, flips first, spread over tasks."""
    keys = [(i % tasks, i // tasks) for i in range(n)]
    reference = dict.fromkeys(keys, "success") | dict.fromkeys(keys[broken : broken + repaired], "failure")
    arm = dict.fromkeys(keys, "success") | dict.fromkeys(keys[:broken], "failure")
    return reference, arm


def test_the_contract_of_the_last_line(tmp_path):
    reference, arm = grid(broken=11, repaired=9, n=500)
    write(tmp_path, "baseline", reference)
    write(tmp_path, "fake", arm, policy_ms=[99.0, 5.0, 5.0])
    result = json.loads(json.dumps(compare_runs([tmp_path])))
    fake = result["arms"]["fake"]
    assert result["reference"] == "baseline"
    assert {k: fake[k] for k in ("pairs", "broken", "repaired", "delta", "verdict")} == {
        "pairs": 500,
        "broken": 11,
        "repaired": 9,
        "delta": -0.004,
        "verdict": "inconclusive",
    }
    assert [round(100 * x, 2) for x in fake["tango95"]] == [-2.33, 1.47]
    assert fake["mcnemar_p"] == pytest.approx(0.8238, abs=1e-4)
    assert fake["speedup_p50"] == 2.0 and fake["speed"]["ratio95"] == [2.0, 2.0]
    assert fake["both_succeed"] + fake["broken"] + fake["repaired"] + fake["both_fail"] == 500
    assert fake["sentence"] == (
        "fake against baseline is inconclusive at −2 pp on new initial states of these 10 tasks: "
        "Δ −0.4 pp [−2.3, +1.5], 11 broken, 9 repaired of 500 pairs, 2.00× faster [2.00, 2.00]."
    )
    assert "smallest difference found with 80 % power" in fake["detectable"]["line"]


@pytest.mark.parametrize(
    "broken, repaired, n, verdict, qualifier, opening",
    [
        (10, 10, 500, "non-inferior", None, "fake is non-inferior to baseline at −2 pp"),
        (0, 12, 500, "non-inferior", "better", "fake is better than baseline"),
        (
            20,
            5,
            2000,
            "non-inferior",
            "worse within the margin",
            "fake is non-inferior to baseline at −2 pp on new initial states of these 10 tasks, worse within",
        ),
        (60, 5, 500, "inferior", None, "fake is inferior to baseline by more than 2 pp"),
    ],
)
def test_verdicts_and_sentences(tmp_path, broken, repaired, n, verdict, qualifier, opening):
    reference, arm = grid(broken, repaired, n)
    write(tmp_path, "baseline", reference)
    write(tmp_path, "fake", arm)
    fake = compare_runs([tmp_path])["arms"]["fake"]
    assert (fake["verdict"], fake["qualifier"]) == (verdict, qualifier)
    assert fake["sentence"].startswith(opening)


def test_what_cannot_be_paired_is_listed_with_its_reason(tmp_path):
    reference, arm = grid(n=20)
    del reference[0, 0], arm[1, 0]
    write(tmp_path, "baseline", reference)
    with Ledger(tmp_path, "fake", 0, "h") as ledger:
        for (task, init), outcome in arm.items():
            moved = {"fingerprint": "ffff"} if (task, init) == (2, 0) else {}
            ledger.append(record("fake", task, init, outcome, **moved))
    fake = compare_runs([tmp_path])["arms"]["fake"]
    assert fake["pairs"] == 17
    reasons = {entry["key"]: entry["reason"] for entry in fake["unpaired"]}
    assert reasons["libero_object/0/0/7"] == "not in baseline"
    assert reasons["libero_object/1/0/7"] == "not in fake"
    assert "different scenes" in reasons["libero_object/2/0/7"]


def test_an_error_is_neither_success_nor_failure_and_can_only_cost_certainty(tmp_path):
    reference, arm = grid(broken=10, repaired=10, n=500)
    keys = list(arm)
    arm[keys[100]] = reference[keys[101]] = "error"
    arm[keys[101]] = "failure"
    write(tmp_path, "baseline", reference)
    write(tmp_path, "fake", arm)
    fake = compare_runs([tmp_path])["arms"]["fake"]
    assert fake["pairs"] == 498 and fake["broken"] == 10
    assert fake["errors"]["arm"] == fake["errors"]["reference"] == 1 and fake["errors"]["removed_pairs"] == 2
    assert fake["errors"]["worst_case_verdict"] == "inconclusive"
    assert fake["verdict"] == "inconclusive (errors)"  # would be non-inferior if errors were dropped
    assert "2 pairs lost to errors" in fake["sentence"]
    assert fake["summary"]["errors"] == 1 and fake["summary"]["episodes"] == 499


def test_holm_runs_over_arms_and_suites_but_not_over_the_control(tmp_path):
    reference, arm = grid(broken=9, repaired=1, n=100)  # McNemar p = 0.0215
    for name, outcomes in {"baseline": reference, "aa": reference, "fake": arm, "w4a4": arm}.items():
        with Ledger(tmp_path, name, 0, "h") as ledger:
            for suite in ("libero_goal", "libero_object"):
                for (task, init), outcome in outcomes.items():
                    ledger.append(record(name, task, init, outcome, suite=suite))
    pooled = compare_runs([tmp_path])  # the default: one claim an arm, over all its suites
    assert pooled["holm_family"] == 2 and pooled["arms"]["fake"]["mcnemar_p_holm"] == pytest.approx(
        2 * 0.000402, abs=1e-6
    )
    assert "mcnemar_p_holm" not in pooled["arms"]["fake"]["suites"]["libero_goal"]
    (tmp_path / "experiment.yaml").write_text("primary: per-suite")
    result = compare_runs([tmp_path])
    cells = [cell for name in ("fake", "w4a4") for cell in result["arms"][name]["suites"].values()]
    assert len(cells) == 4
    assert all(cell["mcnemar_p"] == pytest.approx(0.021484, abs=1e-6) for cell in cells)
    assert all(cell["mcnemar_p_holm"] == pytest.approx(4 * 0.021484, abs=1e-5) for cell in cells)
    assert "mcnemar_p_holm" not in result["arms"]["aa"]["suites"]["libero_goal"]
    assert result["arms"]["fake"]["noise_floor"]["pairs"] == 200 and result["arms"]["aa"]["noise_floor"] is None
    assert result["arms"]["fake"]["pairs"] == 200 and result["arms"]["fake"]["clusters"]["tasks"] == 20


def test_cells_of_a_sweep_join_and_the_same_episodes_twice_do_not(tmp_path):
    reference, arm = grid(broken=2, n=40)
    for cell, suite in (("a", "libero_object"), ("b", "libero_goal")):
        write(tmp_path / cell, "baseline", reference, suite=suite)
        write(tmp_path / cell, "fake", arm, suite=suite)
    joined = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert joined["arms"]["fake"]["pairs"] == 80 and set(joined["arms"]) == {"fake"}
    write(tmp_path / "again", "fake", arm)
    beside = compare_runs([tmp_path / "a", tmp_path / "again"])
    assert set(beside["arms"]) == {"fake", "again/fake"}


def test_requests_that_make_no_sense_are_user_errors(tmp_path):
    reference, arm = grid(n=10)
    write(tmp_path, "baseline", reference)
    with pytest.raises(UserError, match="only one arm"):
        compare_runs([tmp_path])
    write(tmp_path, "fake", arm)
    with pytest.raises(UserError, match="0.02 for 2 pp"):
        compare_runs([tmp_path], margin=2)
    with pytest.raises(UserError, match="baseline, fake"):
        compare_runs([tmp_path], reference="bf16")


def test_no_flips_and_no_pairs_are_still_spoken_about(tmp_path):
    reference, arm = grid(n=30)
    write(tmp_path, "baseline", reference)
    write(tmp_path, "fake", arm)
    write(tmp_path, "other", {(0, 99): "success"})
    arms = compare_runs([tmp_path])["arms"]
    assert "upper bound" in arms["fake"]["detectable"]["line"]
    assert arms["fake"]["clusters"]["t95"][0] < -0.1  # no flip in any task is not a certain zero for new tasks
    assert arms["other"]["verdict"] == "no pairs" and "nothing can be said" in arms["other"]["sentence"]


def test_sequential_verdict_is_recomputed_from_the_declared_order(tmp_path):
    reference, arm = grid(n=500)
    write(tmp_path, "baseline", reference)
    keys = [record("x", t, i, "success").key for t, i in reference]
    declaration = make_declaration(keys, margin=0.02, alpha=0.025, arms=["fake"], seed=7)
    declare(tmp_path, declaration)
    ran = {(k.task, k.init): "success" for k in declaration.order[:300]}
    write(tmp_path, "fake", ran)
    sequential = compare_runs([tmp_path])["arms"]["fake"]["sequential"]
    assert (sequential["verdict"], sequential["pairs"], sequential["episodes_saved"]) == (
        "non-inferior",
        272,
        200,
    )
    result = compare_runs([tmp_path])["arms"]["fake"]
    assert result["verdict"] == "non-inferior" and "sequential test over 272 of them" in result["sentence"]
    assert compare_runs([tmp_path], margin=0.05)["arms"]["fake"]["verdict"] == "inconclusive"


def test_an_early_look_at_a_run_under_a_stopping_rule_decides_nothing(tmp_path):
    """250 concordant pairs: a fixed-n interval would say non-inferior, the test that may be looked at does not."""
    reference, arm = grid(n=250)
    write(tmp_path, "baseline", reference)
    write(tmp_path, "fake", arm)
    keys = [record("x", t, i, "success").key for t, i in grid(n=500)[0]]
    declare(tmp_path, make_declaration(keys, margin=0.02, alpha=0.025, arms=["fake"], seed=7))
    result = compare_runs([tmp_path])["arms"]["fake"]
    assert plain_word(Sample(250, 0, 0), 0.02) == "non-inferior" and result["verdict"] == "interim"


def under_a_rule(run_dir, outcomes, reference=None, **rule):
    """A run under a stopping rule whose pairs, in declared order, ended as `outcomes` (of the arm) say."""
    keys = [record("x", t, i, "success").key for t, i in grid(n=500)[0]]
    declaration = make_declaration(keys, **{"margin": 0.02, "alpha": 0.025, "arms": ["fake"], "seed": 7, **rule})
    declare(run_dir, declaration)
    ran = [(k.task, k.init) for k in declaration.order[: len(outcomes)]]
    write(run_dir, "baseline", dict.fromkeys(ran, "success"))
    write(run_dir, "fake", dict(zip(ran, outcomes, strict=True)))
    return compare_runs([run_dir])["arms"]["fake"]


def test_a_sequential_verdict_does_not_look_away_from_errors(tmp_path):
    """70 of 370 pairs lost in the tested arm: the 300 that are left alone would be "non-inferior"."""
    fake = under_a_rule(tmp_path, ["error"] * 70 + ["success"] * 300)
    assert fake["sequential"]["without_errors"] == "non-inferior" and fake["sequential"]["verdict"] is None
    assert fake["verdict"] == "inconclusive (errors)" and fake["errors"]["worst_case_verdict"] == "interim"
    assert "70 pairs lost to errors" in fake["sentence"]
    test = compare([read_run(tmp_path)]).arms["fake"].sequential
    assert "70 pairs ended in errors, which the same command tries again" in sequential_text(test)


def test_few_errors_cost_pairs_and_not_the_verdict(tmp_path):
    fake = under_a_rule(tmp_path, ["error"] + ["success"] * 400)
    assert fake["verdict"] == fake["errors"]["worst_case_verdict"] == "non-inferior"
    assert fake["sequential"]["errors"] == 1 and fake["sequential"]["pairs"] > 272


def test_a_capped_run_says_so_and_has_saved_nothing(tmp_path):
    fake = under_a_rule(tmp_path, ["success"] * 40, max_pairs=40)
    assert fake["verdict"] == "inconclusive" and fake["sequential"]["verdict"] == "undecided"
    assert fake["sequential"]["episodes_saved"] == 0
    assert "undecided at the cap of 40 pairs" in sequential_text(compare([read_run(tmp_path)]).arms["fake"].sequential)


def test_runs_that_stopped_on_what_they_saw_are_not_judged_together(tmp_path):
    (tmp_path / "a").mkdir()
    assert under_a_rule(tmp_path / "a", ["success"] * 300)["verdict"] == "non-inferior"
    for arm in ("baseline", "fake"):
        write(tmp_path / "b", arm, grid(n=300)[0], suite="libero_goal")
    fake = compare_runs([tmp_path / "a", tmp_path / "b"])["arms"]["fake"]
    assert (fake["pairs"], fake["verdict"]) == (600, "inconclusive") and "judge each run by that" in fake["sentence"]
    assert {suite: cell["verdict"] for suite, cell in fake["suites"].items()} == {
        "libero_object": "non-inferior",  # the declared test's
        "libero_goal": "non-inferior",  # a fixed number of pairs
    }
    against_itself = compare_runs([tmp_path / "a"], reference="fake")["arms"]["baseline"]
    assert against_itself["verdict"] == "inconclusive" and "judge each run by that" in against_itself["sentence"]


@pytest.mark.slow
def test_every_reader_of_a_run_uses_the_margin_it_declares(tmp_path, capsys):
    reference, arm = grid(broken=10, repaired=10, n=100)
    write(tmp_path, "baseline", reference)
    write(tmp_path, "fake", arm)
    assert compare_runs([tmp_path])["margin"] == 0.02
    for said in ("margin: 0.15", "stop: {margin: 0.15}", "margin: 0.3\nstop: {margin: 0.15, alpha: 0.025}"):
        (tmp_path / "experiment.yaml").write_text(said)
        found = compare_runs([tmp_path])
        assert (found["margin"], found["arms"]["fake"]["verdict"]) == (0.15, "non-inferior")
        assert write_report([tmp_path])["verdicts"] == {"fake": "non-inferior"}
        assert versus_baseline(tmp_path, "fake")["versus_baseline/verdict"] == "non-inferior"
        print_run(tmp_path)
        assert "non-inferior to baseline at −15 pp" in capsys.readouterr().err
    assert compare_runs([tmp_path], margin=0.02)["arms"]["fake"]["verdict"] == "inconclusive"
    write(tmp_path / "other", "w4a4", arm, suite="libero_goal")
    with pytest.raises(UserError, match="different margins .* choose one with --margin"):
        compare_runs([tmp_path, tmp_path / "other"])


@pytest.mark.slow
def test_non_inferiority_that_does_not_survive_holm_is_said_with_it(tmp_path):
    """Five arms, of which one is non-inferior at p = 0.0185 by itself and none after Holm."""
    reference, close = grid(broken=11, repaired=11, n=600)
    write(tmp_path, "baseline", reference)
    _, poor = grid(broken=60, n=600)
    write(tmp_path, "close", close)
    for name in ("p1", "p2", "p3", "p4"):
        write(tmp_path, name, poor)
    found = compare_runs([tmp_path])
    arm = found["arms"]["close"]
    (cell,) = arm["suites"].values()
    assert arm["verdict"] == "non-inferior" and found["holm_family"] == 5
    assert cell["noninferiority_p"] < 0.025 < cell["noninferiority_p_holm"]
    assert arm["noninferior_after_holm"] is False is cell["noninferior_after_holm"]
    assert ", but not after Holm over 5 arms (p = " in arm["sentence"]
    shown = Console(width=250, file=StringIO())
    print_comparison(compare_paths([tmp_path]), shown)
    assert "(not after Holm)" in shown.file.getvalue() and "after Holm over 5" in shown.file.getvalue()


def test_the_control_reads_as_a_noise_floor_and_is_the_least_that_others_plan_with(tmp_path):
    reference, again = grid(broken=6, repaired=4, n=100)
    _, fake = grid(broken=1, n=100)
    del fake[9, 9], fake[8, 9]
    write(tmp_path, "baseline", reference)
    write(tmp_path, "aa", again, policy_ms=[30.0, 20.0, 20.0])
    write(tmp_path, "fake", fake)
    arms = compare_runs([tmp_path])["arms"]
    assert arms["aa"]["verdict"] == "noise floor" and arms["aa"]["suites"]["libero_object"]["verdict"] == "noise floor"
    assert arms["aa"]["sentence"] == (
        "aa is baseline against itself, the noise floor: "
        "Δ −2.0 pp [−9.2, +4.8], 6 broken, 4 repaired of 100 pairs, 10.0 % flip."
    )
    assert arms["fake"]["detectable"]["discordance_from"] == "the A/A arm's"
    assert "10.0 % flips (the A/A arm's)" in arms["fake"]["detectable"]["line"]
    assert "of 98 pairs, 2 unpaired" in arms["fake"]["sentence"]
    turned = compare_runs([tmp_path], reference="fake")
    assert (
        turned["noise_floor"] is None and turned["arms"]["aa"]["verdict"] == "inconclusive"
    )  # no floor of another arm


def test_a_meta_file_that_is_no_mapping_is_named(tmp_path):
    write(tmp_path, "baseline", grid(n=3)[0])
    (tmp_path / "baseline" / "meta.json").write_text("[]")
    with pytest.raises(UserError, match=r"baseline/meta.json: not a mapping"):
        compare_runs([tmp_path])


# execution quality
# ----------------------------------------------------------------------------------------------------


def straight(steps=40, speed=0.01, gripper=-1.0):
    rows = np.zeros((steps, 10), np.float32)
    rows[:, 6], rows[:, 7] = gripper, speed * np.arange(steps)
    return rows


def test_jerk_is_one_on_a_sixth_of_t_cubed():
    t = np.arange(30) / 20.0
    rows = np.zeros((30, 10))
    rows[:, 7] = t**3 / 6
    assert jerk(rows) == pytest.approx(1, abs=1e-9)
    assert jerk(rows[:3]) is None


def test_path_and_flips():
    assert path_length_m(straight()) == pytest.approx(0.39, abs=1e-6)
    rows = straight(8)
    rows[:, 6] = [-1, -1, 0.01, 1, 1, -0.02, 1, -1]
    assert gripper_flips(rows) == 2
    assert gripper_flips(rows[:0]) == 0


def test_first_divergence_looks_at_common_steps_only():
    left, right = straight(40), straight(30)
    assert first_divergence(left, right, 0.0) is None
    right[12, 3] = 0.5
    assert first_divergence(left, right, 0.1) == 12 and first_divergence(left, right, 0.6) is None


def test_shifts_are_paired_and_noise_sets_the_divergence_threshold(tmp_path):
    reference, arm = grid(n=40)

    def base(task, init):
        return straight()

    def noisy(task, init):
        rows = straight()
        rows[:, 0] += 1e-4
        return rows

    def longer(task, init):
        rows = straight(speed=0.011)
        rows[20:, 0] = 0.5
        return rows

    write(tmp_path, "baseline", reference, trajectories=base)
    write(tmp_path, "aa", reference, trajectories=noisy)
    write(tmp_path, "fake", arm, trajectories=longer, success_step=55)
    fake = compare_runs([tmp_path])["arms"]["fake"]
    assert fake["quality"]["path_length_m"]["shift"] == pytest.approx(0.039, abs=1e-5)
    assert fake["quality"]["steps_to_success"]["shift"] == 5 and fake["quality"]["steps_to_success"]["p"] < 0.001
    assert fake["divergence"]["threshold"] == pytest.approx(1e-4, rel=1e-3)
    assert fake["divergence"]["median_step"] == 20 and fake["divergence"]["diverged"] == 40
    assert fake["divergence"]["steps"]["libero_object/0/0/7"] == 20
    assert fake["divergence"]["visible_steps"]["libero_object/0/0/7"] == 11


def test_what_the_control_does_after_it_parts_is_not_its_noise(tmp_path):
    """An A/A pair may end with opposed grippers and other motions; the noise is what it shows on equal observations."""
    reference, arm = grid(n=20)

    def base(task, init):
        return straight()

    def parts_later(task, init):
        rows = straight()
        rows[:, 0] += 1e-6  # rounding
        rows[30:, :6] += 0.7  # feedback has made another episode of it
        rows[35:, 6] = -rows[35:, 6]
        return rows

    def quantized(task, init):
        rows = straight()
        rows[:, 1] += 0.02
        rows[25:, 6] = -rows[25:, 6]
        return rows

    write(tmp_path, "baseline", reference, trajectories=base)
    write(tmp_path, "aa", reference, trajectories=parts_later)
    write(tmp_path, "fake", arm, trajectories=quantized)
    arms = compare_runs([tmp_path])["arms"]
    assert arms["aa"]["divergence"]["threshold"] == pytest.approx(1e-6, rel=0.1)
    assert arms["aa"]["divergence"]["gripper_steps"]["libero_object/0/0/7"] == 35
    found = arms["fake"]["divergence"]
    assert found["steps"]["libero_object/0/0/7"] == 0  # beyond rounding at once
    assert found["gripper_steps"]["libero_object/0/0/7"] == 25 and found["gripper_diverged"] == 20
    assert found["visible_steps"]["libero_object/0/0/7"] is None and found["visibly_diverged"] == 0
    assert found["first_chunk_difference"] == pytest.approx(0.02, rel=1e-3)


def test_without_a_control_any_difference_counts_and_the_page_can_say_so(tmp_path):
    reference, arm = grid(n=20)
    write(tmp_path, "baseline", reference, trajectories=lambda task, init: straight())
    write(tmp_path, "fake", arm, trajectories=lambda task, init: straight())
    found = compare_runs([tmp_path])["arms"]["fake"]["divergence"]
    assert found["threshold"] == 0.0 and found["diverged"] == 0 and found["median_visible_step"] is None
    assert "any difference at all" in found["threshold_from"]


def test_the_label_and_control_mark_of_meta_are_honoured(tmp_path):
    reference, arm = grid(n=20)
    write(tmp_path, "baseline", reference)
    write(tmp_path, "again", arm)
    write_meta(tmp_path, "again", {"control": True, "label": "A/A"})
    result = compare_runs([tmp_path])
    assert result["noise_floor"]["arm"] == "again" and result["arms"]["again"]["label"] == "A/A"


@pytest.mark.slow
def test_copies_among_aa_arms_count_once_and_are_named(tmp_path):
    """aa-2 is aa-1 to the bit, aa-3 is the baseline: what rounding does was measured once, not three times."""
    reference, flipped = grid(broken=4, repaired=4, n=100)
    arm = grid(broken=6, repaired=4, n=100)[1]
    for at, copies in (("alone", {}), ("copied", {"aa-2": "aa-1", "aa-3": "baseline"})):
        run = tmp_path / at
        write(run, "baseline", reference)
        write(run, "aa-1", flipped)
        write(run, "fake", arm)
        if copies:
            write(run, "aa-2", flipped, action_digest=b"aa-1".hex())
            write(run, "aa-3", reference, action_digest=b"baseline".hex())
        for name in ("aa-1", "aa-2", "aa-3"):
            if (run / name).is_dir():
                write_meta(run, name, {"backend": "aa"})
    alone, copied = (compare_runs([tmp_path / at]) for at in ("alone", "copied"))
    assert (alone["aa_copies"], copied["aa_copies"]) == ({}, {"aa-2": "aa-1", "aa-3": "baseline"})
    assert copied["noise_floor"] == alone["noise_floor"] and copied["noise_floor"]["replicates"] == ["aa-1"]
    for what in ("noise_floor", "band95", "excess_flips", "pooled_reference", "quality"):
        assert copied["arms"]["fake"][what] == alone["arms"]["fake"][what]
    assert copied["arms"]["aa-3"]["verdict"] == copied["arms"]["aa-2"]["verdict"] == "noise floor"
    # one episode that differs, and it is another draw
    write(tmp_path / "more", "baseline", reference)
    write(tmp_path / "more", "aa-1", flipped)
    write(tmp_path / "more", "aa-2", flipped | {(0, 0): "success"}, action_digest=b"aa-1".hex())
    for name in ("aa-1", "aa-2"):
        write_meta(tmp_path / "more", name, {"backend": "aa"})
    more = compare_runs([tmp_path / "more"])
    assert more["aa_copies"] == {} and more["noise_floor"]["replicates"] == ["aa-1", "aa-2"]
    # a control that changed nothing at all measured nothing
    write(tmp_path / "none", "baseline", reference)
    write(tmp_path / "none", "aa", reference, action_digest=b"baseline".hex())
    none = compare_runs([tmp_path / "none"])
    assert none["aa_copies"] == {"aa": "baseline"} and none["noise_floor"] is None
    shown = Console(width=250, file=StringIO())
    print_comparison(compare_paths([tmp_path / "copied"]), shown)
    write_report([tmp_path / "copied"], tmp_path / "copied.html")
    page = (tmp_path / "copied.html").read_text()
    for text in (shown.file.getvalue(), page):
        assert "aa-2 is aa-1, aa-3 is baseline" in text
