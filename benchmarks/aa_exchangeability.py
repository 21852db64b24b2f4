"""Does the baseline differ from itself? An exact test over A/A replicates: in each scene, which arm is the baseline?

    python benchmarks/aa_exchangeability.py RUN_DIR|EPISODES.csv …
    python benchmarks/aa_exchangeability.py examples/analysis_data/aa_official.csv examples/analysis_data/aa_fresh.csv

Baseline and A/A arms compute one function with other rounding. If nothing favours the baseline, then in every scene
each arithmetic is as likely as any other to have given the baseline's episode. The statistic is the mean over scenes
of (mean of the others − baseline); its null distribution exchanges the label "baseline" in every scene on its own. A/A
arms whose episodes of a task are all equal are one arithmetic there. Only scenes that every arm finished count. A CSV
is what `qlibero export` writes; an episode that fails counts with all the steps it took.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from qlibero.errors import UserError
from qlibero.results.export import episode_rows
from qlibero.results.runs import read_run

Scene = dict[str, dict[str, str]]  # arm → row
MEASURES = {"steps": "steps", "success": "outcome", "path (m)": "path_length_m", "jerk (m/s³)": "jerk"}


def scenes(path: Path) -> tuple[dict[tuple[str, str], Scene], int]:
    """Complete scenes by (task, init), and how many are not complete."""
    if path.is_dir():
        rows = [{name: str(value) for name, value in row.items()} for row in episode_rows(read_run(path))]
    else:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    missing = {"arm", "task", "init", "action_digest", *MEASURES.values()} - set(rows[0] if rows else {})
    if missing:
        raise UserError(f"{path}: no column {', '.join(sorted(missing))}; write it with `qlibero export`")
    found: dict[tuple[str, str], Scene] = defaultdict(dict)
    for row in rows:
        if row["outcome"] != "error" and (row["arm"] == "baseline" or row["arm"].startswith("aa")):
            found[row["task"], row["init"]][row["arm"]] = row
    arms = {arm for scene in found.values() for arm in scene}
    if "baseline" not in arms or len(arms) < 2:
        raise UserError(f"{path}: needs the arms baseline and aa…, found {', '.join(sorted(arms)) or 'none'}")
    complete = {key: scene for key, scene in found.items() if len(scene) == len(arms)}
    return complete, len(found) - len(complete)


def distinct(of_task: list[Scene]) -> list[str]:
    """Arms of which no two are equal in all these scenes, the baseline first."""
    traces: dict[tuple[str, ...], str] = {}
    for arm in sorted(of_task[0], key=lambda arm: (arm != "baseline", arm)):
        traces.setdefault(tuple(scene[arm]["action_digest"] for scene in of_task), arm)
    return list(traces.values())


def value(row: dict[str, str], column: str) -> float:
    return float(row[column] == "success") if column == "outcome" else float(row[column])


def test(groups: list[np.ndarray], draws: int, seed: int) -> tuple[float, float]:
    """Mean of others − baseline, and its two-sided p. `groups`: (scenes, arithmetics), baseline in column 0."""
    rng = np.random.default_rng(seed)
    total = sum(len(group) for group in groups)
    observed, null = 0.0, np.zeros(draws)
    for group in groups:
        for values in group:
            # the others' mean − x is (sum − x)/(k − 1) − x
            shifts = (values.sum() - values) / (len(values) - 1) - values
            observed += shifts[0] / total
            null += shifts[rng.integers(len(values), size=draws)] / total
    extreme = int((np.abs(null) >= abs(observed) - 1e-12).sum())
    return observed, (extreme + 1) / (draws + 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="See the head of this file for what is tested."
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN_DIR|CSV")
    parser.add_argument("--draws", type=int, default=100_000, help="of the null distribution (default 100000)")
    parser.add_argument("--seed", type=int, default=0, help="of those draws (default 0)")
    options = parser.parse_args()
    for path in options.paths:
        try:
            complete, incomplete = scenes(path)
        except (OSError, UserError) as problem:
            parser.error(str(problem))
        by_task: dict[str, list[Scene]] = defaultdict(list)
        for (task, _), scene in complete.items():
            by_task[task].append(scene)
        kept = {task: distinct(of_task) for task, of_task in by_task.items()}
        kept = {task: arms for task, arms in kept.items() if len(arms) > 1}
        sizes = sorted({len(arms) - 1 for arms in kept.values()})
        print(f"{path}: {len(complete)} complete scenes, {incomplete} begun and not complete")
        print(f"  distinct arithmetics beside the baseline's: {' or '.join(map(str, sizes))}, by task")
        for name, column in MEASURES.items():
            groups = [
                np.array([[value(scene[arm], column) for arm in arms] for scene in by_task[task]])
                for task, arms in kept.items()
            ]
            shift, p = test(groups, options.draws, options.seed)
            base = np.concatenate([group[:, 0] for group in groups]).mean()
            print(f"  {name:12} baseline {base:9.4f}   others − baseline {shift:+.4f}   p = {p:.3f}")


if __name__ == "__main__":
    main()
