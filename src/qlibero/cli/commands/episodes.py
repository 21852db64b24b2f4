"""Commands that run episodes, here or on a cluster, and say how far they are."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qlibero.cli.outcomes import Document, Incomplete, Refused
from qlibero.console import count_text, table

if TYPE_CHECKING:
    from qlibero.results.arm_equality import Arithmetic

MAX_NAMED = 8  # files

log = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> Document:
    from qlibero.cli.progress import RunProgress
    from qlibero.config.load import load_experiment
    from qlibero.launch.here import run_here

    experiment = load_experiment(args.config, args.set)
    with RunProgress(experiment) as progress:

        def verdict(run_dir: Path) -> None:
            from qlibero.reporting.terminal import print_run  # SciPy takes a second; the simulators start without it

            progress.stop()
            print_run(run_dir)

        found = run_here(
            experiment,
            args.out,
            on_start=progress.start,
            on_episode=progress.episode,
            on_result=verdict,
        )
    return _checked(found.to_json(), found.complete, [found.arithmetic])


def _checked(document: Document, complete: bool, found: Iterable[Arithmetic]) -> Document:
    """The document; raises Refused with it when an arm's kernels were found to compute something else, Incomplete."""
    from qlibero.results.arm_equality import refusal

    if said := "\n".join(filter(None, (refusal(one.problems) for one in found))):
        raise Refused(said, document)
    if not complete:
        raise Incomplete("some episodes ended in an error; the same command tries them again", document)
    return document


def videos(args: argparse.Namespace) -> Document:
    from qlibero.cli.progress import PhaseProgress
    from qlibero.run.record_videos import record_videos

    with PhaseProgress():
        document = record_videos(args.run_dir, args.episodes, args.task, args.init, args.arm)
    if document["there"]:
        log.info(f"there already: {_named(document['there'])}")
    if document["videos"]:
        log.info(f"{count_text(len(document['videos']), 'video')} made: {_named(document['videos'])}")
    if document["missing"]:
        raise Incomplete(
            f"not made, their actions were not kept or the simulator died: {_named(document['missing'])}", document
        )
    return document


def _named(paths: list[str]) -> str:
    """The first paths."""
    return ", ".join(paths[:MAX_NAMED]) + f" and {len(paths) - MAX_NAMED:,} more" * (len(paths) > MAX_NAMED)


def plan(args: argparse.Namespace) -> Document:
    from qlibero.config.sweep import load_sweep
    from qlibero.launch import cells
    from qlibero.launch.plan import plan as make_plan
    from qlibero.launch.plan_tables import readable

    found = make_plan(cells.make_manifest(load_sweep(args.config, args.set), args.out), args.calibrate)
    for title, rows in readable(found):
        table(rows, title)
    if found.without_cost:
        log.info(
            "no episode like these has been run yet, so no time can be told; "
            "--calibrate runs one of each (and keeps it)"
        )
    return found.to_json()


def sweep(args: argparse.Namespace) -> Document:
    from qlibero.config.sweep import load_sweep
    from qlibero.launch.sweep import run_sweep

    found = run_sweep(load_sweep(args.config, args.set), args.engine, args.out, args.dry_run)
    document = found.to_json()
    if not args.dry_run:
        _checked(document, True, (cell.arithmetic for cell in found.state.cells.values()))
    if found.finished and not found.state.complete and not args.dry_run:
        raise Incomplete("not everything is done; the same command runs what is missing", document)
    if found.merge_status and not found.finished:
        raise Incomplete("the shards are queued, the merge job after them is not: see above", document)
    if found.merge_status:
        raise Incomplete(
            "every episode is there, but the merge after them failed; the same command does it again", document
        )
    return document


def run_shard(args: argparse.Namespace) -> Document:
    from qlibero.cli.progress import RunProgress
    from qlibero.launch import cells

    manifest = cells.read_manifest(args.manifest)
    if args.merge:
        merged = cells.merge(manifest)
        return _checked(merged.to_json(), True, (cell.arithmetic for cell in merged.cells.values()))
    with RunProgress(manifest.experiment_of(args.index)) as progress:
        found = cells.run_shard(manifest, args.index, progress.start, progress.episode)
    return _checked(found.to_json(), found.complete, [found.arithmetic])


def status(args: argparse.Namespace) -> Document:
    from qlibero.launch import status as watch

    found = (
        watch.follow(args.dir, lambda found: log.info(watch.headline(found)), args.task, args.arm)
        if args.follow
        else watch.status(args.dir, args.task, args.arm)
    )
    table([cell.row() for cell in found.cells], title=watch.headline(found))
    for line in watch.mixes(found):
        log.info(line)
    if args.follow and not found.complete:
        raise Incomplete(
            "nothing has been under way for two minutes; `qlibero sweep` (or `run`) again runs what is missing",
            found.to_json(),
        )
    return found.to_json()
