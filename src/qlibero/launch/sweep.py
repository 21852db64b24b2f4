"""`qlibero sweep`: from a sweep file to an engine. Asked again, it submits only what is missing and not under way."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlibero.config.sweep import Sweep
from qlibero.console import count_text
from qlibero.documents import JsonObject
from qlibero.launch import cells
from qlibero.launch.engine import Submission, Submitted, engines, load_engine
from qlibero.launch.impossible import refuse_impossible

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Swept:
    """What a sweep has, and what was submitted of it now: shards by number; `under_way`: how many were before.

    `finished`: nothing is queued or running any more. `dry_run`: what would have been submitted, as text.
    """

    state: cells.SweepState
    engine: str
    submitted: tuple[int, ...]
    under_way: int
    failed: tuple[int, ...]
    merge_status: int | None
    jobs: tuple[str, ...]
    finished: bool
    dry_run: str | None

    def to_json(self) -> JsonObject:
        """Shards are written as Slurm writes them, "0,2-11"."""
        return {
            **self.state.to_json(),
            "engine": self.engine,
            "submitted": _counted(self.submitted),
            "under_way": self.under_way,
            "failed": _counted(self.failed),
            "merge_status": self.merge_status,
            "jobs": list(self.jobs),
            "finished": self.finished,
            **({} if self.dry_run is None else {"dry_run": self.dry_run}),
        }


def run_sweep(sweep: Sweep, engine: str | None, out: Path | None, dry_run: bool) -> Swept:
    """Submit what the ledgers lack.

    `engine` None takes the sweep's own `launch.engine`. With `dry_run` nothing is written or started.
    """
    manifest = cells.make_manifest(sweep, out)
    launch = manifest.launch
    name = engine or launch.engine
    missing = manifest.missing()
    under_way = _under_way(manifest) if missing else {}
    indices = tuple(i for i in missing if manifest.shards[i] not in under_way)
    if under_way:
        log.info(
            f"{len(missing) - len(indices)} of {count_text(len(missing), 'missing shard')} already queued "
            "or running: left alone"
        )
    submitted = Submitted(finished=True)
    text = ""
    if indices:
        refuse_impossible(manifest, name)
        directory = cells.next_submission(manifest) if dry_run else cells.write_manifest(manifest)
        submission = Submission(manifest.name, directory, indices, launch)
        chosen = load_engine(name)
        if dry_run:
            text = chosen.describe(submission)
            log.info(text)
        else:
            log.info(f"{len(indices)} of {count_text(len(manifest.shards), 'shard')}, engine {name}, {directory}")
            submitted = chosen.submit(submission)
    elif not missing and not dry_run and _merge_was_lost(manifest):
        log.info("every episode is there, but the merge after them was not finished: doing it here")
        cells.merge(manifest)
    return Swept(
        cells.sweep_state(manifest),
        name,
        indices,
        len(missing) - len(indices),
        submitted.failed,
        submitted.merge_status,
        submitted.jobs,
        submitted.finished and not under_way,
        text if dry_run else None,
    )


def _counted(indices: Sequence[int]) -> JsonObject:
    return {"count": len(indices), "shards": cells.spans(indices)}


def _merge_was_lost(manifest: cells.Manifest) -> bool:
    """Killed after the last episode, a merge would never come back by itself: no missing shard would bring it."""
    submitted = any((manifest.directory / cells.OURS).glob("submission-*/manifest.json"))
    return (
        submitted
        and not cells.merged(manifest)
        and not any(engine.merge_is_queued(manifest.directory) for engine in engines(_own(manifest)).values())
    )


def _under_way(manifest: cells.Manifest) -> dict[cells.Shard, str]:
    """Shards that an earlier submission still has in a queue."""
    found: dict[cells.Shard, str] = {}
    for engine in engines(_own(manifest)).values():
        found |= engine.live_shards(manifest.directory)
    return found


def _own(manifest: cells.Manifest) -> str:
    return manifest.cells[0].experiment.launch.engine
