"""Size and power of ways to stop: a fixed number of pairs, e-values, group-sequential looks without and with futility.

    python benchmarks/sequential_tests.py            the tables of docs/statistics.md, in a few minutes on one core

Fixed numbers and looks are enumerated exactly (`qlibero.stats.sequential_power`), e-values simulated in `--runs` runs
each with standard errors. All at margin 2 pp and one-sided α = 2.5 % in each direction.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.special import gammaln, xlogy

from qlibero.results.declaration import BLOCK_PAIRS
from qlibero.stats.evalues import margin_martingales
from qlibero.stats.group_sequential import declared_looks
from qlibero.stats.proportions import normal_quantile, pairs_for_noninferiority, tango_zs
from qlibero.stats.sequential_power import pairs_needed, prospect

MARGIN, ALPHA, LOOKS, FUTILITY = 0.02, 0.025, 20, 0.1
HORIZON = {0.03: 2500, 0.08: 6000, 0.22: 16000}  # pairs followed to find where e-values reach 80 % power


def first_crossings(psi: float, delta: float, pairs: int, runs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pair at which each run's e-values decide for non-inferior and for inferior, (runs,) each; `pairs` + 1: never."""
    rng = np.random.default_rng(seed)
    crossed = np.full((2, runs), pairs + 1)
    for run in range(runs):
        steps = rng.choice([-1, 1, 0], size=pairs, p=[(psi - delta) / 2, (psi + delta) / 2, 1 - psi])
        for side, log in enumerate(margin_martingales(steps, MARGIN)):
            above = np.flatnonzero(log >= np.log(1 / ALPHA))
            if len(above):
                crossed[side, run] = above[0] + 1
    return crossed[0], crossed[1]


def fixed(pairs: int, psi: float, delta: float) -> tuple[float, float]:
    """Exact chances of non-inferior and of inferior by Tango's interval on a fixed number of pairs."""
    most = min(pairs, int(pairs * psi + 7 * np.sqrt(pairs * psi) + 7))
    broken, repaired = (axis.astype(np.float64) for axis in np.indices((most + 1, most + 1)))
    z = tango_zs(broken, repaired, pairs, -MARGIN)
    logs = gammaln(pairs + 1) - gammaln(broken + 1) - gammaln(repaired + 1)
    rest = pairs - broken - repaired
    logs += xlogy(broken, (psi - delta) / 2) + xlogy(repaired, (psi + delta) / 2) + xlogy(rest, 1 - psi)
    chance = np.where(rest >= 0, np.exp(logs - gammaln(np.maximum(rest, 0) + 1)), 0.0)
    bar = normal_quantile()
    return float(chance[z > bar].sum()), float(chance[z < -bar].sum())


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def pairs_for_power(runs: int) -> None:
    print("\nPairs for 80 % power at truly equal arms: declared (most) / on average\n")
    row("flips", "fixed", "e-values", f"{LOOKS} looks", f"{LOOKS} looks, futility {FUTILITY:g}")
    row("--", "--", "--", "--", "--")
    for psi, horizon in HORIZON.items():
        design = {"margin": MARGIN, "discordance": psi, "block": BLOCK_PAIRS, "alpha": ALPHA}
        fixed = pairs_for_noninferiority(psi, MARGIN)
        above, _ = first_crossings(psi, 0.0, horizon, runs, seed=1)
        most = int(np.sort(above)[int(0.8 * runs)])
        average = np.minimum(above, most)
        error = average.std() / np.sqrt(runs)
        e_values = f"{most:,} / {average.mean():,.0f} ± {error:.0f}" if most <= horizon else f"> {horizon:,}"
        cells = []
        for futility in (None, FUTILITY):
            needed = pairs_needed(**design, looks=LOOKS, futility=futility)
            found = prospect(
                declared_looks(needed, LOOKS, BLOCK_PAIRS), margin=MARGIN, discordance=psi, futility=futility
            )
            cells.append(f"{needed:,} / {found.expected_pairs:,.0f}")
        row(f"{100 * psi:g} %", f"{fixed:,}", e_values, *cells)


def chances(pairs: int, runs: int) -> None:
    print(f"\n{pairs:,} pairs: non-inferior % / inferior % / futile % / pairs on average\n")
    row("flips", "true Δ (pp)", "fixed", "e-values", f"{LOOKS} looks", f"{LOOKS} looks, futility {FUTILITY:g}")
    row(*["--"] * 6)
    for psi in (0.03, 0.08, 0.22):
        for delta in (0.0, -0.02, -0.06):
            if abs(delta) > psi:
                continue
            above, below = first_crossings(psi, delta, pairs, runs, seed=2)
            passed, failed = above < np.minimum(below, pairs + 1), below < np.minimum(above, pairs + 1)
            spent = np.minimum(np.minimum(above, below), pairs).mean()
            cells = [f"{100 * passed.mean():.1f} / {100 * failed.mean():.1f} / – / {spent:,.0f}"]
            cells.append(" / ".join(f"{100 * share:.1f}" for share in fixed(pairs, psi, delta)) + f" / – / {pairs:,}")
            for futility in (None, FUTILITY):
                declared = declared_looks(pairs, LOOKS, BLOCK_PAIRS)
                found = prospect(declared, margin=MARGIN, discordance=psi, delta=delta, futility=futility)
                futile = f"{100 * found.futile:.1f}" if futility else "–"
                verdicts = f"{100 * found.noninferior:.1f} / {100 * found.inferior:.1f}"
                cells.append(f"{verdicts} / {futile} / {found.expected_pairs:,.0f}")
            row(f"{100 * psi:g} %", f"{100 * delta:g}".replace("-", "−"), cells[1], cells[0], *cells[2:])


def sizes() -> None:
    print(f"\nWrong verdicts at Δ = −margin, {LOOKS} looks without futility, exact: non-inferior % / inferior %\n")
    shares = (0.0201, 0.025, 0.03, 0.05, 0.08, 0.12, 0.22, 0.4)
    row("pairs", *(f"ψ = {100 * psi:.3g} %" for psi in shares))
    row(*["--"] * (1 + len(shares)))
    for pairs in (60, 100, 200, 500, 1000, 2000):
        looks = declared_looks(pairs, LOOKS, BLOCK_PAIRS)
        found = [prospect(looks, margin=MARGIN, discordance=psi, delta=-MARGIN, futility=None) for psi in shares]
        row(f"{pairs:,}", *(f"{100 * f.noninferior:.2f} / {100 * f.inferior:.2f}" for f in found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="simulated runs for e-values (default 1000)")
    runs = parser.parse_args().runs
    sizes()
    chances(500, runs)
    chances(2000, runs)
    pairs_for_power(runs)


if __name__ == "__main__":
    main()
