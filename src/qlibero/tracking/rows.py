"""What trackers show of a run: a row for each finished episode, a summary of each arm, its verdict. All flat."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from qlibero.results.arm_equality import arithmetic
from qlibero.results.axes import axis_of, task_name
from qlibero.results.ledger import ArmLedger, arms_of, read_arm
from qlibero.results.machines import mix_in_words
from qlibero.results.records import EpisodeRecord
from qlibero.results.runs import REFERENCE, read_run
from qlibero.results.summary import counts, summarize_arm
from qlibero.stats.proportions import wilson

Row = dict[str, str | float]
"""Flat: what a tracker draws or lists."""


def episode_row(record: EpisodeRecord, place: int, number: int, wins: int) -> Row:
    """A finished episode as a flat row of numbers and short texts.

    `place` is the x axis, the same for the episode in every arm; `number` counts the arm's rows from 1, `wins` the
    successes among them, this one included.
    """
    low, high = wilson(wins, number)
    row: Row = {
        "episode": place,
        "key": str(record.key),
        "suite": record.suite,
        "task": record.task,
        "init": record.init,
        "inits": record.inits,
        "seed": record.seed,
        "outcome": record.outcome,
        "success": int(record.succeeded),
        "success_rate": wins / number,
        "success_rate_low95": low,
        "success_rate_high95": high,
        "steps": record.steps,
        "replans": record.replans,
        "time/sim_s": round(record.sim_ms / 1e3, 3),
        "time/render_s": round(record.render_ms / 1e3, 3),
    }
    timed = sorted(record.policy_ms)
    if timed:
        row["latency_ms/episode_median"] = timed[len(timed) // 2]
    for name in ("path_length_m", "jerk", "gripper_flips"):
        if getattr(record, name) is not None:
            row[f"quality/{name}"] = getattr(record, name)
    return row


def arm_summary(ledger: ArmLedger) -> Row:
    """What a runs table compares: success with Wilson interval, latency percentiles in ms, kernels, per-task counts,
    and the machines where they answer differently."""
    numbers = summarize_arm(ledger.records)
    summary: Row = {"arm": ledger.arm, "successes": numbers.successes, "episodes": numbers.episodes}
    summary["errors"] = numbers.errors
    if numbers.wilson95:
        low, high = numbers.wilson95
        rate = numbers.successes / numbers.episodes
        summary |= {"success_rate": rate, "success_rate_low95": low, "success_rate_high95": high}
    if numbers.latency_ms:
        summary |= {f"latency_ms/{percentile}": ms for percentile, ms in numbers.latency_ms._asdict().items()}
    tasks = sorted({(record.suite, record.task) for record in ledger.records})
    suites = {suite for suite, _ in tasks}
    for suite, task in tasks:
        k, n, _ = counts(record for record in ledger.records if (record.suite, record.task) == (suite, task))
        name = task_name(suite, task, suites)
        summary |= {f"task/{name}/successes": k, f"task/{name}/episodes": n}
    axes = sorted({axis_of(suite) for suite in suites})
    for axis in axes if len(axes) > 1 else ():
        k, n, _ = counts(record for record in ledger.records if axis_of(record.suite) == axis)
        summary |= {f"axis/{axis}/successes": k, f"axis/{axis}/episodes": n}
    if mix := mix_in_words(ledger.records):
        summary["machines"] = mix
    for kernel, layers in sorted(Counter(ledger.meta.executed).items()):
        summary[f"kernels/{kernel}"] = layers
    return summary


def versus_baseline(run_dir: Path, arm: str) -> Row:
    """The paired comparison with the baseline, as `qlibero compare` says it; {} for the baseline and without one."""
    if arm == REFERENCE or REFERENCE not in arms_of(run_dir):
        return {}
    from qlibero.results.compare import compare  # scipy takes a second to import

    found = compare([read_run(run_dir)], REFERENCE).arms[arm]
    low, high = found.interval or (None, None)
    numbers = {
        "pairs": found.table.pairs,
        "broken": found.table.broken,
        "repaired": found.table.repaired,
        "delta": found.delta,
        "low95": low,
        "high95": high,
        "mcnemar_p": found.table.mcnemar_p,
        "verdict": str(found.verdict.word),
        "sentence": found.sentence,
        "missing_pairs": found.missing,
        "speedup": found.speed.ratio if found.speed.claim in ("faster", "slower", "as fast") else None,
    }
    for axis, row in found.axes.items():
        low, high = row.interval or (None, None)
        at = f"axis/{axis}"
        numbers |= {f"{at}/pairs": row.table.pairs, f"{at}/delta": row.delta, f"{at}/verdict": str(row.verdict.word)}
        numbers |= {f"{at}/low95": low, f"{at}/high95": high}
    return {f"versus_{REFERENCE}/{name}": value for name, value in numbers.items() if value is not None}


def arithmetic_summary(run_dir: Path, arm: str) -> Row:
    """Whether the arm's kernels were found to compute what they claim: "arithmetic/ok", and what there is to say."""
    found = arithmetic(run_dir, {name: read_arm(run_dir, name) for name in arms_of(run_dir)})
    pairs = [pair for pair in found.same if arm in (pair.arm, pair.other)]
    tried = found.rechecks.get(arm)
    problems = [*(tried.wrong if tried else ()), *(str(pair) for pair in pairs if not pair.ok)]
    summary: Row = {"arithmetic/ok": not problems, "arithmetic/problems": "; ".join(problems)}
    if tried:
        summary |= {"arithmetic/repeated": tried.repeated, "arithmetic/products": tried.products}
    if pairs:
        summary["arithmetic/equal"] = sum(pair.equal for pair in pairs)
        summary["arithmetic/episodes"] = sum(pair.episodes for pair in pairs)
    return summary
