"""What the A/A arms say: how much is rounding, whether an arm flips more than that, and a sharper reference.

An A/A arm is the reference again, in batches of other sizes or order: its true difference is 0, so what it measures is
a width and no place. Three uses, all over the same scenes:

    band     Δ of an arm that only rounds lies within it in 95 % of reruns: Tango's interval of ψ·n flips of which half
             go each way, symmetric about 0
    excess   does the arm flip more episodes than A/A does? If it does not, arm and replicates are exchangeable on
             every scene: given that m of the K + 1 flipped, the arm is one of them with probability m/(K + 1). Exact;
             McNemar's one-sided test when K = 1
    pooled   Δ against the mean of the reference and its K replicates, whose own luck averages out (power .43 → .54
             at 500 pairs and 6.7 % flips with K = 1, at no further rollout)

An A/A arm whose every episode equals another's to the bit was computed by the same arithmetic: it is one draw shown
twice (`copies`), and counts once in all three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln, xlog1py, xlogy

from qlibero.documents import JsonObject
from qlibero.episode_key import EpisodeKey
from qlibero.results.paired_outcomes import PairTable, rounded, rounded_interval
from qlibero.results.pairing import Arm, Pair, pair_arms
from qlibero.results.records import EpisodeRecord
from qlibero.stats.proportions import Interval, tango
from qlibero.stats.sampling import Step


@dataclass(frozen=True)
class NoiseFloor:
    """The A/A replicates against the reference, counted together: at least one pair."""

    arms: tuple[str, ...]
    table: PairTable

    @property
    def discordance(self) -> float:
        return (self.table.broken + self.table.repaired) / self.table.pairs

    def band(self, pairs: int) -> Interval:
        """Where Δ of that many pairs lies in 95 % of reruns when nothing but rounding differs."""
        flips = self.discordance * pairs
        return tango(flips / 2, flips / 2, pairs)

    def to_json(self) -> JsonObject:
        per_arm = self.table.pairs // len(self.arms)
        return {
            "arm": self.arms[0],
            "replicates": list(self.arms),
            **self.table.to_json(),
            "band95": rounded_interval(self.band(per_arm)),
        }


@dataclass(frozen=True)
class ExcessFlips:
    """On `scenes` that the arm and all replicates finished: shares that flipped, and the one-sided exact p-value of
    "the arm flips no more than A/A"."""

    scenes: int
    arm: float
    floor: float
    p: float

    def to_json(self) -> JsonObject:
        return {"scenes": self.scenes, "arm": rounded(self.arm), "floor": rounded(self.floor), "p": rounded(self.p)}


def copies(base: Arm, controls: Sequence[Arm]) -> dict[str, str]:
    """A/A arms that are another's copies, and whose: of the reference, or of an earlier A/A arm, all finished episodes
    that both have are equal in action digest, outcome and steps."""
    found: dict[str, str] = {}
    distinct = [base]
    for arm in controls:
        other = next((one for one in distinct if _equal(one, arm)), None)
        if other is None:
            distinct.append(arm)
        else:
            found[arm.name] = other.name
    return found


def _equal(one: Arm, other: Arm) -> bool:
    pairs = pair_arms(one, other).pairs
    return bool(pairs) and all(_trace(pair.reference) == _trace(pair.other) for pair in pairs)


def _trace(record: EpisodeRecord) -> tuple[str, str, int]:
    return record.action_digest, record.outcome, record.steps


def noise_floor(base: Arm, replicates: Sequence[Arm]) -> NoiseFloor | None:
    """None without a pair of reference and replicate."""
    outcomes = [pair.outcomes for arm in replicates for pair in pair_arms(base, arm).pairs]
    return NoiseFloor(tuple(arm.name for arm in replicates), PairTable.of(outcomes)) if outcomes else None


def excess_flips(pairs: Sequence[Pair], replicates: Sequence[Mapping[EpisodeKey, Pair]]) -> ExcessFlips | None:
    """`pairs` of the arm, and of every replicate by key. None where they share no scene."""
    shared = [pair for pair in pairs if all(pair.key in of for of in replicates)]
    if not shared or not replicates:
        return None
    own = np.array([pair.step != 0 for pair in shared])
    others = np.array([[of[pair.key].step != 0 for of in replicates] for pair in shared]).sum(axis=1)
    # the arm's flips: a sum of binomials, one for each number m of flips among the K + 1
    ways = len(replicates) + 1
    chances = np.ones(1)
    for m, scenes in enumerate(np.bincount(own + others, minlength=ways + 1)):
        chances = np.convolve(chances, _binomial(int(scenes), m / ways))
    p = min(1.0, float(chances[int(own.sum()) :].sum()))
    return ExcessFlips(len(shared), float(own.mean()), float(others.mean() / len(replicates)), p)


def _binomial(n: int, p: float) -> np.ndarray:
    k = np.arange(n + 1)
    return np.asarray(np.exp(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) + xlogy(k, p) + xlog1py(n - k, -p)))


def pooled_steps(pairs: Sequence[Pair], replicates: Sequence[Arm]) -> list[Step]:
    """Outcome of the arm − mean outcome of the reference and of those replicates that finished the scene."""
    found = []
    for pair in pairs:
        again = (arm.records.get(pair.key) for arm in replicates)
        references = [pair.reference, *(r for r in again if r is not None and r.outcome != "error")]
        found.append((pair.key, pair.other.succeeded - sum(r.succeeded for r in references) / len(references)))
    return found
