"""Risk: the chart of success against latency shows an arm at another latency than the one it was executed with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from synthetic_run import make_run

from qlibero.reporting.html.document import write_report
from qlibero.results.ledger import write_meta
from qlibero.results.runs import read_run
from qlibero.results.summary import summarize_arm


def page_of(run: Path) -> str:
    write_report([run], run / "r.html")
    return (run / "r.html").read_text()


@pytest.mark.parametrize("flow_steps,joined", [((10, 10, 10), 1), ((10, 1, 1), 1), ((10, 1, 2), 0)])
def test_a_line_joins_arms_that_differ_in_latency_alone(tmp_path, flow_steps, joined):
    run = make_run(tmp_path / "run", {"baseline": 0.0, "late-100": 0.1, "late-50": 0.1})
    for arm, ms, steps in zip(("baseline", "late-100", "late-50"), (0, 100, 50), flow_steps, strict=True):
        late = {"execution": {"mode": "async", "latency_ms": ms, "latency_steps": ms // 50}} if ms else {}
        write_meta(run, arm, late | {"policy": {"type": "pi05", "flow_steps": steps}, "kernels": {}})
    page = re.search(r'<section id="delay".*?</section>', page_of(run), re.DOTALL)
    assert page is not None and page[0].count('class="line front"') == joined


def test_every_late_arm_stands_at_its_latency_with_the_measured_calls_beside_it(tmp_path):
    run = make_run(tmp_path / "run", {"baseline": 0.0, "late-100": 0.1, "late-50": 0.1})
    assert 'id="delay"' not in page_of(run)
    for arm, ms, steps in (("late-100", 100.0, 2), ("late-50", 50.0, 1)):
        write_meta(run, arm, {"execution": {"mode": "async", "latency_ms": ms, "latency_steps": steps}, "kernels": {}})
    found = read_run(run).arms["baseline"]
    p50 = summarize_arm(found.records).latency_ms.p50
    page = re.search(r'<section id="delay".*?</section>', page_of(run), re.DOTALL)
    assert page is not None
    text = re.sub(r"<[^>]+>", " ", page[0])
    order = [text.index(word) for word in ("waited for", "50 ms late, 1 control steps", "100 ms late, 2 control steps")]
    assert order == sorted(order)
    assert f"{p50:.1f} ms, {-(-p50 // 50):.0f} steps" in text
