"""Size, coverage and power of what a fixed number of pairs is judged by: several seeds, new tasks, pooled references.

    python benchmarks/estimands.py            the tables of docs/statistics.md, in under a minute on one core

Every truth is exact by construction. "Wrong" verdicts are at Δ = −margin, the hardest truth: `non-inferior` above it,
`inferior` below it; `covered`: the 95 % interval holds the truth. Standard error at 8,000 runs: 0.17 points.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from qlibero.stats.proportions import favoured, tango_zs
from qlibero.stats.sampling import AGAINST, IN_FAVOUR, design_effect
from qlibero.stats.scores import score_zs

MARGIN = 0.02
RUNS = 8_000


@dataclass(frozen=True)
class Shares:
    """Of runs: found non-inferior, found inferior, interval holds the truth. Those of independent pairs in `naive`."""

    noninferior: float
    inferior: float
    covered: float
    naive: Shares | None = None


Scores = tuple[np.ndarray, np.ndarray]  # at the lower and at the upper end of the interval


def shares(at_margin: Scores, at_truth: Scores, quantile: float, naive: Shares | None = None) -> Shares:
    covered = (at_truth[0] <= quantile) & (at_truth[1] >= -quantile)
    return Shares(*(float(np.mean(x)) for x in (at_margin[0] > quantile, at_margin[1] < -quantile, covered)), naive)


def clustered(broken: np.ndarray, repaired: np.ndarray, size: int, truth: float) -> Shares:
    """Verdicts of runs (…, clusters) of `size` pairs a cluster, by the design effect and as if pairs were units."""
    clusters = broken.shape[1]
    b, r, n = broken.sum(axis=1).astype(float), repaired.sum(axis=1).astype(float), clusters * size
    d = design_effect((repaired - broken).astype(float), np.full(broken.shape, size), b + r)

    def scores(delta: float, design: np.ndarray | float, *corrections: float) -> Scores:
        ends = (favoured(b / design, r / design, n / design, pairs) for pairs in corrections)
        low, high = (tango_zs(*counts, n / design, delta) for counts in ends)
        return low, high

    naive = shares(scores(-MARGIN, 1.0, 0, 0), scores(truth, 1.0, 0, 0), float(ndtri(0.975)))
    ends = [scores(delta, d, -AGAINST, IN_FAVOUR) for delta in (-MARGIN, truth)]
    return shares(*ends, float(stdtrit(clusters - 1, 0.975)), naive)


def several_seeds(
    random: np.random.Generator, runs: int, states: int, seeds: int, psi: float, delta: float, icc: float = 0.3
) -> Shares:
    """Flips concentrated by initial state: Dirichlet probabilities of each, intraclass correlation `icc`."""
    weights = np.array([(psi - delta) / 2, (psi + delta) / 2, 1 - psi]) * (1 - icc) / icc
    p = random.gamma(weights, size=(runs, states, 3))
    flips = random.multinomial(seeds, p / p.sum(axis=2, keepdims=True))
    return clustered(flips[..., 0], flips[..., 1], seeds, delta)


def new_tasks(
    random: np.random.Generator, runs: int, tasks: int, pairs: int, psi: float, delta: float, spread: float
) -> Shares:
    """Tasks whose own Δ is normal about `delta`, with standard deviation `spread`; a task flips at least its |Δ|."""
    own = delta + spread * random.standard_normal((runs, tasks))
    flips = np.maximum(psi, np.abs(own))
    broken = random.binomial(pairs, (flips - own) / 2)
    repaired = random.binomial(pairs - broken, np.clip((flips + own) / (2 - flips + own), 0, 1))
    return clustered(broken, repaired, pairs, delta)


def pooled(
    random: np.random.Generator, runs: int, pairs: int, replicates: int, delta: float, icc: float, rate: float = 0.95
) -> Shares:
    """An arm against the mean of a reference and its `replicates`: each succeeds on a scene with that scene's own
    probability, which is beta distributed with mean `rate` and intraclass correlation `icc`."""
    ratio, references = (1 - icc) / icc, 1 + replicates
    p = random.beta(rate * ratio, (1 - rate) * ratio, size=(runs, pairs))
    kind = random.binomial(references, p) + (references + 1) * (random.random(p.shape) < p * (rate + delta) / rate)
    of = np.arange(references + 1) / references
    values = np.concatenate([-of, 1 - of])
    counts = np.stack([(kind == k).sum(axis=1) for k in range(len(values))], axis=1).astype(float)
    at_margin, at_truth = score_zs(values, counts, -MARGIN), score_zs(values, counts, delta)
    return shares((at_margin, at_margin), (at_truth, at_truth), float(ndtri(0.975)))


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def head(*cells: str) -> None:
    row(*cells)
    row(*["--"] * len(cells))


def said(found: Shares) -> str:
    return f"{100 * found.noninferior:.1f} / {100 * found.inferior:.1f} / {100 * found.covered:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=RUNS)
    runs, random = parser.parse_args().runs, np.random.default_rng(1)
    print("\nSeveral seeds, 10 tasks × 20 initial states, Δ = −2 pp: non-inferior / inferior / covered, %\n")
    head("seeds", "flips", "by initial state", "as independent pairs")
    for seeds in (2, 5, 10):
        for psi in (0.03, 0.08, 0.22):
            found = several_seeds(random, runs, 200, seeds, psi, -MARGIN)
            row(seeds, f"{100 * psi:g} %", said(found), said(found.naive))
    print("\nNew tasks, 50 pairs a task, Δ = −2 pp: non-inferior / inferior / covered, %\n")
    head("tasks", "flips", "spread of tasks", "by task", "as independent pairs")
    for tasks in (10, 40):
        for psi in (0.03, 0.08, 0.22):
            for spread in (0.0, 0.03, 0.06):
                found = new_tasks(random, runs, tasks, 50, psi, -MARGIN, spread)
                row(tasks, f"{100 * psi:g} %", f"{100 * spread:g} pp", said(found), said(found.naive))
    print("\nPooled reference: wrong at Δ = −2 pp (non-inferior / inferior / covered, %), and power at Δ = 0, %\n")
    head("pairs", "flips", *(f"{k} A/A: wrong" for k in (0, 1, 5)), *(f"{k} A/A: power" for k in (0, 1, 5)))
    for pairs in (100, 500):
        for icc in (0.001, 0.3, 0.6):
            wrong = [pooled(random, runs, pairs, k, -MARGIN, icc) for k in (0, 1, 5)]
            power = [pooled(random, runs, pairs, k, 0.0, icc) for k in (0, 1, 5)]
            flips = f"{100 * 2 * 0.95 * 0.05 * (1 - icc):.1f} %"
            row(pairs, flips, *map(said, wrong), *(f"{100 * p.noninferior:.0f}" for p in power))


if __name__ == "__main__":
    main()
