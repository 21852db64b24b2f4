"""What the pairs of a cell can find before they are run: at one look at the end, and under its declared rule."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from qlibero.config.schema import Experiment, Stop
from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.launch.cells import Cell
from qlibero.results.declaration import BLOCK_PAIRS
from qlibero.results.ledger import read_ledger
from qlibero.results.paired_outcomes import Power, power
from qlibero.results.runs import REFERENCE, declared_margin
from qlibero.results.wording import detectable_line
from qlibero.run.planned import stopping_rule
from qlibero.stats.sequential_power import Prospect, pairs_needed, prospect

DISCORDANCE = 0.05  # share of pairs that flip, for planning, while none has been observed


@dataclass(frozen=True)
class Looks:
    """What a group-sequential test costs and finds if the arms are truly equal; `needed`: pairs for 80 % power."""

    looks: int
    chances: Prospect
    needed: int

    def to_json(self) -> JsonObject:
        chances = {key: float(f"{value:.6g}") for key, value in asdict(self.chances).items()}
        return {"looks": self.looks, **chances, "pairs_for_noninferiority": self.needed}


@dataclass(frozen=True)
class Detectable:
    """What so many pairs can find, at one look at the end and, in `line`, under the declared rule."""

    power: Power
    margin: float
    ruled: bool
    looks: Looks | None
    line: str

    @property
    def sentence(self) -> str:
        return f"{detectable_line(self.power)} {self.line}".rstrip()

    def to_json(self) -> JsonObject:
        rule = {**(self.looks.to_json() if self.looks else {}), "line": self.line}
        return {
            "discordance": f"{self.power.discordance:.1%} {self.power.discordance_from}",
            "detectable_difference": self.power.difference,
            "one_way_difference": self.power.one_way_difference,
            "margin": self.margin,
            "noninferiority_power": self.power.noninferiority_power,
            "pairs_for_noninferiority": self.power.pairs_for_noninferiority,
            "sequential": rule if self.ruled else None,
            "detectable": self.sentence,
        }


def detectable(cell: Cell, pairs: int) -> Detectable:
    margin = declared_margin(cell.experiment.model_dump(mode="json"))
    found = power(pairs, *_discordance(cell), margin)
    stop = cell.experiment.stop
    looks, line = _prospects(cell.experiment, stop, found.discordance, margin) if stop else (None, "")
    return Detectable(found, margin, stop is not None, looks, line)


def _prospects(experiment: Experiment, stop: Stop, discordance: float, margin: float) -> tuple[Looks | None, str]:
    """What `stop` will cost and find, for one arm, and in words."""
    declared = stopping_rule(experiment)
    if declared.method == "evalues":
        return None, (
            "All for one look at the end; e-values may be looked at after every pair and take up to 1.7 times as many "
            "(docs/statistics.md)."
        )
    share = declared.alpha / len(declared.arms)
    chances = prospect(declared.looks, margin=margin, discordance=discordance, alpha=share, futility=declared.futility)
    needed = pairs_needed(
        margin=margin,
        discordance=discordance,
        looks=stop.looks,
        block=BLOCK_PAIRS,
        alpha=share,
        futility=declared.futility,
    )
    return Looks(len(declared.looks), chances, needed), (
        f"With {count_text(len(declared.looks), 'look')} (α {share:g} an arm) an equal arm is shown "
        "non-inferior with "
        f"{100 * chances.noninferior:.0f} % chance and takes {chances.expected_pairs:,.0f} of "
        f"{count_text(declared.looks[-1], 'pair')} on average, {100 * chances.futile:.0f} % end as futile; 80 % takes "
        f"{count_text(needed, 'pair')} declared."
    )


def _discordance(cell: Cell) -> tuple[float, str]:
    """Share of pairs that flip, the largest over the arms and never below that of the A/A arm: observed where an arm
    has at least 20 pairs and a flip, else assumed."""
    arms = cell.experiment.arms()
    first = next((arm for arm in arms if arm.name == REFERENCE), arms[0])
    reference = {r.key: r.outcome for r in read_ledger(cell.run_dir, first.name) if r.outcome != "error"}
    found = []
    for arm in arms:
        if arm is first:
            continue
        outcomes = {
            r.key: r.outcome for r in read_ledger(cell.run_dir, arm.name) if r.outcome != "error" and r.key in reference
        }
        flips = sum(outcome != reference[key] for key, outcome in outcomes.items())
        if len(outcomes) >= 20 and flips:
            found.append((flips / len(outcomes), f"observed in {arm.name}"))
    return max(found, default=(DISCORDANCE, "assumed"))
