"""The model card's tables from what `model_card.sh` measured, so that no number is copied by hand.

python examples/libero/card.py logs/model_card
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from qlibero.results.arm_meta import ActionError
from qlibero.results.compare import compare
from qlibero.results.ledger import read_ledger
from qlibero.results.pairing import collect_arms
from qlibero.results.runs import read_run
from qlibero.results.summary import percentiles, policy_calls
from qlibero.stats.proportions import wilson

NOTHING = "–"


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


QUANTIZATION = (
    "arm",
    "success",
    "broken",
    "repaired",
    "Δ (pp)",
    "95 % (Tango)",
    "McNemar p",
    "on demonstrations",
    "first chunk",
    "steps to success",
    "jerk (m/s³)",
)


def quantization(run: Path) -> list[list[str]]:
    """Per arm against the reference, A/A first: success, flips, Δ with its interval, McNemar, action errors, steps,
    jerk."""
    runs = [read_run(run)]
    metas = {name: arm.meta for name, arm in collect_arms(runs).items()}
    rows = []
    for name, arm in sorted(compare(runs).to_json()["arms"].items(), key=lambda item: not item[1]["control"]):
        summary, quality = arm["summary"], arm["quality"]
        first = arm["divergence"]["first_chunk_difference"]
        settings = arm["label"].partition(" (")[2].removesuffix(")")
        rows.append(
            [
                name if arm["control"] or not settings else settings,
                f"{summary['successes']}/{summary['episodes']}",
                str(arm["broken"]),
                str(arm["repaired"]),
                signed(arm["delta"]),
                " to ".join(map(signed, arm["tango95"])),
                f"{arm['mcnemar_p']:.2g}",
                on_demonstrations(metas[name].action_error),
                NOTHING if first is None else f"{first:.2g}",
                changed(quality["steps_to_success"]),
                changed(quality["jerk"]),
            ]
        )
    return rows


def signed(fraction: float) -> str:
    """In percentage points: `−0.5`."""
    return f"{100 * fraction:+.1f}".replace("-", "−")


def on_demonstrations(error: ActionError | None) -> str:
    """`0.0018 [0.0013, 0.0028]`."""
    if error is None:
        return NOTHING
    return f"{error.arm:.2g}" + (f" [{', '.join(f'{end:.2g}' for end in error.arm95)}]" if error.arm95 else "")


def changed(measure: dict | None) -> str:
    """`91.7 → 93.8 (p 0.39)`."""
    if not measure or measure["reference"] is None:
        return NOTHING
    return f"{measure['reference']:.1f} → {measure['arm']:.1f} (p {measure['p']:.2g})"


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
        show("Quantization", QUANTIZATION, quantization(root / "quantization"))
    if (root / "controls.jsonl").exists():
        rows = [json.loads(line) for line in (root / "controls.jsonl").read_text().splitlines()]
        show("Sight", ("suite", "policy", "official states", "targets displaced"), sight(rows))


if __name__ == "__main__":
    main()
