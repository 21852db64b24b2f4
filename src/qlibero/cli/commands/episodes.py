"""Commands that run episodes, here or on a cluster, and say how far they are."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from pathlib import Path

from qlibero.cli.outcomes import Document, Incomplete, Refused
from qlibero.console import count_text, table

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

        document = run_here(
            experiment,
            args.out,
            on_start=progress.start,
            on_episode=progress.episode,
            on_result=verdict,
        )
    _one_arithmetic(document, [document])
    if not document["complete"]:
        raise Incomplete("some episodes ended in an error; the same command tries them again", document)
    return document


def _one_arithmetic(document: Document, cells: Iterable[Document]) -> None:
    """Raises Refused, with the whole document, when an arm's kernels were found to compute something else."""
    from qlibero.results.arm_equality import refusal

    if said := "\n".join(filter(None, (refusal(cell["arithmetic"]) for cell in cells))):
        raise Refused(said, document)


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

    document = make_plan(cells.make_manifest(load_sweep(args.config, args.set), args.out), args.calibrate)
    for title, rows in readable(document):
        table(rows, title)
    if document["without_cost"]:
        log.info(
            "no episode like these has been run yet, so no time can be told; "
            "--calibrate runs one of each (and keeps it)"
        )
    return document


def sweep(args: argparse.Namespace) -> Document:
    from qlibero.config.sweep import load_sweep
    from qlibero.launch.sweep import run_sweep

    document = run_sweep(load_sweep(args.config, args.set), args.engine, args.out, args.dry_run)
    if document["finished"] and not document["complete"] and not args.dry_run:
        raise Incomplete("not everything is done; the same command runs what is missing", document)
    if document["merge_status"] and not document["finished"]:
        raise Incomplete("the shards are queued, the merge job after them is not: see above", document)
    if document["merge_status"]:
        raise Incomplete(
            "every episode is there, but the merge after them failed; the same command does it again", document
        )
    return document


def run_shard(args: argparse.Namespace) -> Document:
    from qlibero.cli.progress import RunProgress
    from qlibero.launch import cells

    manifest = cells.read_manifest(args.manifest)
    if args.merge:
        document = cells.merge(manifest)
        _one_arithmetic(document, document["cells"].values())
        return document
    with RunProgress(manifest.experiment_of(args.index)) as progress:
        document = cells.run_shard(manifest, args.index, progress.start, progress.episode)
    _one_arithmetic(document, [document])
    if not document["complete"]:
        raise Incomplete("some episodes ended in an error; the same command tries them again", document)
    return document


def status(args: argparse.Namespace) -> Document:
    from qlibero.launch import status as watch

    document = (
        watch.follow(args.dir, lambda found: log.info(watch.headline(found)), args.task, args.arm)
        if args.follow
        else watch.status(args.dir, args.task, args.arm)
    )
    cells = [{key: value for key, value in cell.items() if key != "machines"} for cell in document["cells"]]
    table(cells, title=watch.headline(document))
    for line in watch.mixes(document):
        log.info(line)
    if args.follow and not document["complete"]:
        raise Incomplete(
            "nothing has been under way for two minutes; `qlibero sweep` (or `run`) again runs what is missing",
            document,
        )
    return document
