"""The model card's tables from what `model_card.sh` measured, so that no number is copied by hand.

python examples/libero/card.py logs/model_card
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from qlibero.results.compare import compare_runs
from qlibero.results.ledger import read_ledger
from qlibero.results.summary import percentiles, policy_calls
from qlibero.stats.proportions import wilson


def success(runs: Iterable[Path]) -> list[list[str]]:
    """Per suite: successes of episodes, Wilson interval, every task, latency of a policy call."""
    rows = []
    for run in runs:
        records = [record for record in read_ledger(run, "baseline") if record.outcome != "error"]
        tasks = defaultdict(list)
        for record in records:
            tasks[record.task].append(record.succeeded)
        won = sum(map(sum, tasks.values()))
        calls = percentiles(policy_calls(records))
        assert calls is not None, "finished episodes have called their policy"
        rows.append(
            [
                records[0].suite,
                f"{won}/{len(records)}",
                f"**{percent(won, len(records))}**",
                interval(wilson(won, len(records))),
                ", ".join(f"{sum(tasks[task])}/{len(tasks[task])}" for task in sorted(tasks)),
                " / ".join(f"{ms:.1f}" for ms in calls),
            ]
        )
    return rows


def quantization(run: Path) -> list[list[str]]:
    """Per arm against the reference: success, flips, Δ with its interval, McNemar, action error, steps, jerk."""
    arms = compare_runs([run])["arms"]
    rows = []
    for arm in sorted(arms.values(), key=lambda arm: not arm["control"]):
        summary, quality = arm["summary"], arm["quality"]
        rows.append(
            [
                arm["label"],
                f"{summary['successes']}/{summary['episodes']}",
                str(arm["pairs"]),
                str(arm["broken"]),
                str(arm["repaired"]),
                f"{100 * arm['delta']:+.1f}",
                f"{100 * arm['tango95'][0]:+.1f} to {100 * arm['tango95'][1]:+.1f}",
                f"{arm['mcnemar_p']:.2g}",
                f"{arm['divergence']['first_chunk_difference']:.2g}",
                changed(quality["steps_to_success"], 1),
                changed(quality["jerk"], 1),
            ]
        )
    return rows


def changed(measure: dict | None, digits: int) -> str:
    """ "91.7 → 93.8 (p 0.39)"."""
    if not measure or measure["reference"] is None:
        return ""
    return f"{measure['reference']:.{digits}f} → {measure['arm']:.{digits}f} (p {measure['p']:.2g})"


def sight(rows: Sequence[dict]) -> list[list[str]]:
    """Per suite and policy: success where targets stand as LIBERO puts them, and displaced."""
    totals: dict[tuple, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        key = (row["suite"], row["blind"], tuple(row["displaced"] or ()))
        totals[key][0] += row["successes"]
        totals[key][1] += row["episodes"]
    table = []
    for suite, blind in dict.fromkeys((suite, blind) for suite, blind, _ in sorted(totals)):
        cells = [cell(totals[key]) for key in sorted(totals) if key[:2] == (suite, blind)]
        table.append([suite, "blind twin" if blind else "this one", *cells])
    return table


def cell(total: Sequence[int]) -> str:
    won, run = total
    return f"{won}/{run} ({percent(won, run)}, {interval(wilson(won, run))})"


def percent(won: int, run: int) -> str:
    return f"{100 * won / run:.1f} %"


def interval(bounds: tuple[float, float]) -> str:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    root = parser.parse_args().directory
    runs = sorted(path.parent for path in root.glob("success/*/experiment.yaml"))
    if runs:
        columns = ("suite", "episodes", "success", "95 %", "task 0 to 9", "ms per chunk p50 / p95 / p99")
        show("Success", columns, success(runs))
    if (root / "quantization" / "experiment.yaml").exists():
        columns = (
            "arm",
            "success",
            "pairs",
            "broken",
            "repaired",
            "Δ (pp)",
            "95 % (Tango)",
            "McNemar p",
            "action error",
            "steps to success",
            "jerk (m/s³)",
        )
        show("Quantization", columns, quantization(root / "quantization"))
    if (root / "controls.jsonl").exists():
        rows = [json.loads(line) for line in (root / "controls.jsonl").read_text().splitlines()]
        show("Sight", ("suite", "policy", "official states", "targets displaced"), sight(rows))


if __name__ == "__main__":
    main()
