"""Risk: action errors are said to foretell flips where they do not, or where nobody could know."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import mannwhitneyu
from synthetic_run import episode, make_run

from qlibero.config.quantization import Quant
from qlibero.reporting.html.document import write_report
from qlibero.results.compare import compare_runs
from qlibero.results.ledger import Ledger, write_meta
from qlibero.results.pairing import collect_arms
from qlibero.results.runs import read_run
from qlibero.stats.ranks import auc, rank_correlation


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr("qlibero.results.ledger.os.fsync", lambda descriptor: None)


def test_the_area_is_the_share_of_pairs_in_order():
    x, y = np.random.default_rng(0).normal(0.8, 1, 30), np.random.default_rng(1).normal(0, 1, 40)
    area, (low, high) = auc(x, y)
    assert area == pytest.approx(mannwhitneyu(x, y).statistic / 1200) and low < area < high
    assert auc([2, 2, 2, 2, 2], [1, 2, 2, 2, 3])[0] == 0.5
    assert auc([5, 6, 7, 8, 9], [0, 1, 2, 3, 4]) == (1.0, (1.0, 1.0))
    assert auc([5, 6, 7, 8], [0] * 40) is None and auc([], []) is None


def test_the_area_s_interval_covers_as_often_as_it_says():
    """Two normals one apart: the true area is Φ(1/√2) = 0.7602."""
    draws = np.random.default_rng(2).normal(size=(1000, 60)) + np.repeat([1.0, 0.0], [20, 40])
    found = [auc(row[:20], row[20:])[1] for row in draws]
    assert 0.91 <= np.mean([low <= 0.7602 <= high for low, high in found]) <= 0.975


def test_a_correlation_of_ranks_needs_something_to_order():
    assert rank_correlation([1, 2, 3, 4], [10, 100, 1000, 9]) == pytest.approx(-0.2)
    assert rank_correlation([1, 2], [1, 2]) is None and rank_correlation([1, 2, 3], [5, 5, 5]) is None


def test_a_run_says_whether_first_errors_foretold_its_flips(tmp_path):
    """`told` errs more in the episodes that it flips, `blind` in others; the report says it as the comparison does."""
    run = make_run(tmp_path / "run", {"baseline": 0.0, "aa": 0.0}, tasks=2, inits=20)
    arms = {"told": 0.04, "blind": 0.02, "wild": 0.3}
    for number, (arm, error) in enumerate(arms.items()):
        with Ledger(run, arm, 0, f"hash of {arm}") as ledger:
            for i in range(40):
                flipped = i % 4 == 0 if number < 2 else i % 2 == 0
                record, rows = episode("libero_object", i // 20, i % 20, arm, flipped, False, 0)
                rows[:5, 0] += error * (1 + (flipped if arm == "told" else i % 3 == 0))
                ledger.append(record, rows)
        measured = {"observations": 32, "arm": error, "arm95": [0.01, 0.4]}
        quant = Quant(layout="llm", method="rtn", rounding="nearest", weight_bits=8 - 2 * number).identity()
        write_meta(run, arm, {"label": f"{arm} (rtn of {arm})", "action_error": measured, "quant": quant})
    found = {name: arm["divergence"] for name, arm in compare_runs([run])["arms"].items()}
    assert (found["told"]["flip_auc"], found["told"]["flip_auc95"]) == (1.0, (1.0, 1.0))
    low, high = found["blind"]["flip_auc95"]
    assert low < 0.5 < high and found["aa"]["flip_auc"] is None
    write_report([run])
    page = (run / "report.html").read_text().replace("\u00a0", " ")
    assert "the order of 3 arms by their error on demonstrations, before any rollout" in page
    assert "rank correlation +0.87" in page  # flips of 10, 10 and 20: ranks 1.5, 1.5, 3 against 2, 1, 3
    assert "better than chance in 1 of 3 arms" in page
    assert "0.04 [0.01, 0.4]" in page and "20 of 40" in page
    cliff = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "cliff.py"))
    points = {name: cliff["point"](arm) for name, arm in collect_arms([read_run(run)]).items()}
    assert points.pop("baseline") is None and points.pop("aa") is None
    seen = {name: (p.formats, p.recipe, p.error.arm) for name, p in points.items()}
    assert seen == {"told": ("W8A8", "rtn", 0.04), "blind": ("W6A8", "rtn", 0.02), "wild": ("W4A8", "rtn", 0.3)}
    cliff["draw"](run, tmp_path / "cliff.png")
    assert (tmp_path / "cliff.png").read_bytes().startswith(b"\x89PNG")
    examples = Path(__file__).parents[1] / "examples" / "libero"
    card = runpy.run_path(str(examples / "card.py"))
    assert f"| {' | '.join(card['QUANTIZATION'])} |" in (examples / "embedded/MODEL_CARD.md").read_text()
    rows = [dict(zip(card["QUANTIZATION"], row, strict=True)) for row in card["quantization"](run)]
    assert rows[0]["arm"] == "aa" and rows[0]["on demonstrations"] == "–"
    assert [rows[0][column] for column in ("broken", "repaired", "Δ (pp)", "McNemar p")] == ["0", "0", "+0.0", "1"]
    told = next(row for row in rows if row["arm"] == "rtn of told")
    assert told["on demonstrations"] == "0.04 [0.01, 0.4]" and told["first chunk"] == "0.04"


def test_a_run_without_trajectories_or_errors_says_nothing_of_it(tmp_path):
    run = make_run(tmp_path / "run", {"baseline": 0.0, "w4a8": 0.2}, trajectories=False)
    write_report([run])
    assert 'id="prediction"' not in (run / "report.html").read_text()
