"""How two arms move differently on the same episodes: paired shifts of execution quality, and where they part.

Steps to success, path length and gripper flips are compared where both arms succeed (whole episodes); jerk on
every pair up to the earlier end, since a longer episode would otherwise count its idle tail. The restricted mean time
to success takes every pair: a failure has not succeeded by the horizon, so it counts the horizon (Royston and Parmar,
BMC Med. Res. Methodol. 13 (2013) 152).

A shift is no news until the reference, run again, moves less: each is judged beside A/A on the same measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from qlibero.documents import JsonObject
from qlibero.episode_key import EpisodeKey
from qlibero.results.ledger import read_trajectory
from qlibero.results.pairing import Arm, Pair
from qlibero.results.quality import first_apart, first_divergence, first_opposed_grip, jerk, motion_difference
from qlibero.results.records import EpisodeRecord
from qlibero.stats.proportions import Interval
from qlibero.stats.ranks import auc
from qlibero.stats.shifts import mean_t_interval, sign_flip_p

VISIBLE_M = 0.01  # grippers this far apart are apart to the eye


MEASURES = ("time_to_success", "steps_to_success", "path_length_m", "gripper_flips", "jerk")


@dataclass(frozen=True)
class Shift:
    """Of one measure over `pairs`: the means, their difference (arm − reference) with its 95 % t interval, and p of the
    paired sign-flip test, unadjusted. `against_floor95` is the interval of the arm's value − the mean of the A/A arms'
    on the same scenes, None without one."""

    pairs: int
    reference: float
    arm: float
    shift: float
    interval95: tuple[float, float] | None
    p: float
    against_floor95: tuple[float, float] | None = None

    @property
    def beyond_floor(self) -> bool | None:
        """Whether the arm differs from the reference and, in the same direction, from the reference run again."""
        if self.interval95 is None or self.against_floor95 is None:
            return None
        ends = (*self.interval95, *self.against_floor95)
        return min(ends) > 0 or max(ends) < 0

    def to_json(self) -> JsonObject:
        return {
            "pairs": self.pairs,
            "reference": round(self.reference, 6),
            "arm": round(self.arm, 6),
            "shift": round(self.shift, 6),
            "shift95": self.interval95 and [round(x, 6) for x in self.interval95],
            "p": self.p,
            "beyond_floor": self.beyond_floor,
        }


Values = dict[EpisodeKey, tuple[float, float]]  # of the reference and of the arm


def measured(pairs: Sequence[Pair], reference: Arm, other: Arm) -> dict[str, Values]:
    """Every measure of every pair that has it."""
    horizon: dict[str, int] = {}
    for pair in pairs:
        suite = pair.key.suite
        horizon[suite] = max(horizon.get(suite, 0), pair.reference.steps, pair.other.steps)

    def time(record: EpisodeRecord) -> float:
        return record.success_step if record.success_step is not None else horizon[record.suite]

    both = [p for p in pairs if p.reference.succeeded and p.other.succeeded]
    return {
        "time_to_success": _values(pairs, time),
        "steps_to_success": _values(both, lambda r: r.success_step),
        "path_length_m": _values(both, lambda r: r.path_length_m),
        "gripper_flips": _values(both, lambda r: r.gripper_flips),
        "jerk": _jerks(pairs, reference, other),
    }


def execution_quality(found: dict[str, Values], floors: Sequence[dict[str, Values]]) -> dict[str, Shift | None]:
    """`found` is what `measured` says of the arm, `floors` of each A/A arm."""
    return {name: _shift(found[name], [floor[name] for floor in floors]) for name in MEASURES}


def _jerks(pairs: Sequence[Pair], reference: Arm, other: Arm) -> Values:
    jerks: Values = {}
    for pair in pairs:
        left, right = _trajectories(pair, reference, other)
        if left is not None and right is not None:
            end = min(len(left), len(right))
            if end >= 4:
                x, y = jerk(left[:end]), jerk(right[:end])
                if x is not None and y is not None:
                    jerks[pair.key] = x, y
    return jerks


def _values(pairs: Sequence[Pair], value: Callable[[EpisodeRecord], float | None]) -> Values:
    values = {p.key: (value(p.reference), value(p.other)) for p in pairs}
    return {key: (x, y) for key, (x, y) in values.items() if x is not None and y is not None}


def _shift(found: Values, floors: Sequence[Values]) -> Shift | None:
    if not found:
        return None
    left, right = np.array(list(found.values()), dtype=np.float64).T
    shared = [key for key in found if floors and all(key in floor for floor in floors)]
    # both differences are taken from the reference's own value, so that jerk is cut at the pair's own end in each
    beyond = [float(found[k][1] - found[k][0] - np.mean([f[k][1] - f[k][0] for f in floors])) for k in shared]
    return Shift(
        pairs=len(found),
        reference=float(left.mean()),
        arm=float(right.mean()),
        shift=float((right - left).mean()),
        interval95=mean_t_interval(right - left),
        p=sign_flip_p(right - left),
        against_floor95=mean_t_interval(beyond),
    )


def action_noise(pairs: Sequence[Pair], reference: Arm, control: Arm) -> float:
    """What the reference's own actions differ by when it runs again: 99th percentile of ‖a_control − a_reference‖∞
    over the arm's six action values in the first executed chunk of every A/A pair. 0 without trajectories.

    Only that chunk: both runs answer the very same observation there, so nothing but rounding makes them differ.
    One chunk later the rounding has moved the robot, feedback multiplies it, and within some forty steps the two
    runs may do different things altogether (opposite grippers: a difference of 2), which is no measure of noise.
    """
    differences = []
    for pair in pairs:
        left, right = _trajectories(pair, reference, control)
        if left is not None and right is not None:
            differences.append(motion_difference(left, right)[_first_chunk(pair)])
    return float(np.percentile(np.concatenate(differences), 99)) if differences else 0.0


@dataclass(frozen=True)
class Divergence:
    """Where the two arms of each episode part, in three ways that come one after the other:

    `steps`: arm motions differ by more than `threshold` (`action_noise`; 0 without an A/A arm, so any difference
    at all); `visible_steps`: the grippers are 1 cm apart; `gripper_steps`: one opens and the other closes. Each
    maps an episode to its first such step or None. A quantized policy exceeds rounding noise in its first action, so
    the first says little about success; the others say when the robots did different things.

    `first_chunk_difference` is the median over episodes of the largest difference of an arm action in the first
    executed chunk: the arm's error on observations that both saw, in units of the action. `flip_auc` says whether it
    foretells flips: the probability that it is greater in an episode that flipped than in one that did not (0.5: it
    tells nothing), with its 95 % interval; None with fewer than 5 of either.
    """

    threshold: float
    threshold_from: str
    first_chunk_difference: float | None = None
    flip_auc: float | None = None
    flip_auc95: Interval | None = None
    steps: dict[str, int | None] = field(default_factory=dict)
    visible_steps: dict[str, int | None] = field(default_factory=dict)
    gripper_steps: dict[str, int | None] = field(default_factory=dict)

    @property
    def compared(self) -> int:
        return len(self.steps)

    @property
    def diverged(self) -> int:
        return _parted(self.steps)

    @property
    def visibly_diverged(self) -> int:
        return _parted(self.visible_steps)

    @property
    def gripper_diverged(self) -> int:
        return _parted(self.gripper_steps)

    @property
    def median_step(self) -> float | None:
        """Medians are over the episodes that part."""
        return _median(self.steps)

    @property
    def median_visible_step(self) -> float | None:
        return _median(self.visible_steps)

    @property
    def median_gripper_step(self) -> float | None:
        return _median(self.gripper_steps)

    def to_json(self) -> JsonObject:
        counted = (
            "compared",
            "diverged",
            "median_step",
            "visibly_diverged",
            "median_visible_step",
            "gripper_diverged",
            "median_gripper_step",
        )
        return asdict(self) | {name: getattr(self, name) for name in counted}


def divergences(
    pairs: Sequence[Pair], reference: Arm, other: Arm, threshold: float, threshold_from: str = ""
) -> Divergence:
    """Where the arms of `pairs` part; empty without trajectories."""
    steps: dict[str, int | None] = {}
    visible: dict[str, int | None] = {}
    gripper: dict[str, int | None] = {}
    first_chunks, flipped = [], []
    for pair in pairs:
        left, right = _trajectories(pair, reference, other)
        if left is None or right is None:
            continue
        key = str(pair.key)
        steps[key] = first_divergence(left, right, threshold)
        visible[key] = first_apart(left, right, VISIBLE_M)
        gripper[key] = first_opposed_grip(left, right)
        first_chunks.append(float(motion_difference(left, right)[_first_chunk(pair)].max(initial=0.0)))
        flipped.append(pair.step != 0)
    chunk = float(f"{np.median(first_chunks):.6g}") if first_chunks else None
    of_flipped, of_others = (
        [x for x, flip in zip(first_chunks, flipped, strict=True) if flip == which] for which in (True, False)
    )
    area, area95 = auc(of_flipped, of_others) or (None, None)
    return Divergence(threshold, threshold_from, chunk, area, area95, steps, visible, gripper)


def _first_chunk(pair: Pair) -> slice:
    """Steps surely in both arms' first chunk: ⌈steps / policy calls⌉ never exceeds its length. Before its answer is
    there an arm that nobody waits for stands still."""
    both = (pair.reference, pair.other)
    late = max(record.latency_steps or 0 for record in both)
    return slice(late, late + min(-(-record.steps // max(record.replans, 1)) for record in both))


def _parted(steps: dict[str, int | None]) -> int:
    return sum(step is not None for step in steps.values())


def _median(steps: dict[str, int | None]) -> float | None:
    found = [step for step in steps.values() if step is not None]
    return float(np.median(found)) if found else None


def _trajectories(pair: Pair, reference: Arm, other: Arm) -> tuple[np.ndarray | None, np.ndarray | None]:
    return (
        read_trajectory(reference.run_dirs[pair.key], pair.reference),
        read_trajectory(other.run_dirs[pair.key], pair.other),
    )
