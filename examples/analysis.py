"""Your own questions to a run: ledger, pairs of arms, trajectories. `python examples/analysis.py RUN_DIR`

Everything the report shows comes from the few functions used here, so a notebook can go on from any of them. The same
episodes as a flat table: `qlibero export RUN_DIR -o episodes.csv` (or .parquet), then
`pandas.read_csv("episodes.csv")`.
"""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np

from qlibero.results.compare import compare_runs
from qlibero.results.ledger import read_trajectory
from qlibero.results.pairing import collect_arms, pair_arms
from qlibero.results.quality import EEF
from qlibero.results.runs import read_run
from qlibero.results.summary import counts, percentiles, policy_calls
from qlibero.stats.proportions import wilson


def main(run_dir: str, reference: str = "baseline") -> None:
    run = read_run(run_dir)
    print(f"{run.name}: arms {', '.join(run.arms)}\n")

    print("success, with the interval that its n allows")
    for name, arm in run.arms.items():
        k, n, errors = counts(arm.records)
        low, high = wilson(k, n) if n else (0.0, 1.0)
        print(f"  {name:12} {k}/{n} [{low:.3f}, {high:.3f}], {errors} errors")

    print("\nlatency of a policy call, ms")
    for name, arm in run.arms.items():
        print(f"  {name:12} {percentiles(policy_calls(arm.records))}")

    arms = collect_arms([run])
    for name in [name for name in arms if name != reference and reference in arms]:
        pairs = pair_arms(arms[reference], arms[name]).pairs
        flips = [p for p in pairs if p.step]
        print(f"\n{name} against {reference}: {len(flips)} of {len(pairs)} pairs flip")
        print("  by task:", dict(sorted(Counter(p.key.task for p in flips).items())))

        # how far apart the grippers are, step by step, in pairs that end differently and in pairs that do not
        for title, group in (("flipped", flips), ("not flipped", [p for p in pairs if not p.step])):
            distances = []
            for pair in group:
                left, right = read_trajectory(run_dir, pair.reference), read_trajectory(run_dir, pair.other)
                if left is not None and right is not None:
                    end = min(len(left), len(right))
                    distances.append(np.linalg.norm(left[:end, EEF] - right[:end, EEF], axis=1).max())
            if distances:
                print(f"  {title}: largest distance of the grippers, median {1000 * np.median(distances):.1f} mm")

    if len(arms) > 1 and reference in arms:
        print("\nverdicts")
        for result in compare_runs([run_dir], reference)["arms"].values():
            print(f"  {result['sentence']}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
