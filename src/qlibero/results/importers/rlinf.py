"""RLinf's evaluation (read in its sources, 2026-08): eval_embodiment.log, metrics.log, or what it printed.

It records no episode, only `eval/success_once` (a rate) and `eval/num_trajectories`. The successes are the whole number
that gives the rate; there is no key, so its results are counts, compared as independent samples.
"""

from __future__ import annotations

import re

from qlibero.console import count_text
from qlibero.results.importers.file import ResultFile
from qlibero.results.imports import ExternalArm
from qlibero.results.records import Outcome

_VALUE = r"\b['\"]?\s*[:=]\s*(?:np\.\w+\(|array\()?"
_RATE = re.compile(rf"\bsuccess_once{_VALUE}([0-9]*\.?[0-9]+(?:e-\d+)?)")
_COUNT = re.compile(rf"\bnum_trajectories{_VALUE}(\d+)")
_SUITE = re.compile(r"\btask_suite_name\b[\"']?\s*[:=]\s*[\"']?(\w+)")
_CAP = re.compile(r"\bmax_episode_steps\b[\"']?\s*[:=]\s*(\d+)")


def read(file: ResultFile) -> ExternalArm | None:
    if file.path.suffix in (".csv", ".json", ".jsonl"):
        return None
    rates, counts = _RATE.findall(file.text), _COUNT.findall(file.text)
    if not rates:
        return None
    if not counts:
        raise ValueError("success_once without num_trajectories: a rate of an unknown number of episodes")
    if len(set(counts)) > 1:
        raise ValueError(f"one log of several evaluations ({', '.join(dict.fromkeys(counts))} trajectories): split it")
    episodes, said = int(counts[0]), max(rates, key=len)  # the table rounds, the dictionary before it does not
    wins, digits = round(float(said) * episodes), len(said.partition(".")[2])
    if not 0 <= float(said) <= 1 or abs(wins - float(said) * episodes) > 0.5 * 10.0**-digits * episodes + 1e-3:
        raise ValueError(f"success_once {said} is no rate of {count_text(episodes, 'trajectory')}")
    if "e" not in said and episodes >= 10**digits:
        raise ValueError(
            f"success_once {said} is too coarse to tell the successes of {count_text(episodes, 'trajectory')}"
        )
    ended: tuple[tuple[None, Outcome], tuple[None, Outcome]] = ((None, "success"), (None, "failure"))
    outcomes = (ended[0],) * wins + (ended[1],) * (episodes - wins)
    suites = sorted(set(_SUITE.findall(file.text)))
    caps = {suite: int(cap) for suite in suites for cap in _CAP.findall(file.text)[:1]} if len(suites) == 1 else {}
    return ExternalArm(
        file.name, "RLinf", outcomes, "RLinf logs totals only", suites=frozenset(suites), constants={"max_steps": caps}
    )
