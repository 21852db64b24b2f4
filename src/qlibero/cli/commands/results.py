"""Commands that read what runs left: verdicts, tables, reports."""

from __future__ import annotations

import argparse
import logging
import os

from qlibero.cli.outcomes import Document, Unwanted
from qlibero.console import count_text
from qlibero.errors import UserError

log = logging.getLogger(__name__)


def compare(args: argparse.Namespace) -> Document:
    from qlibero.reporting.terminal import print_comparison
    from qlibero.results.compare import Cells, as_document, compare_paths

    if bool(args.results) == bool(args.counts):
        raise UserError("compare: name run directories or result files, or --counts NAME=K/N NAME=K/N, and not both")
    if args.counts:
        from qlibero.results.published import compare_counts

        if args.reference or args.estimand or args.columns or args.label:
            raise UserError(
                "compare: --counts take the first as reference and know no estimand or column; leave those flags out"
            )
        cells: Cells = {"": compare_counts(args.counts, args.margin)}
    else:
        from qlibero.results.importers.columns import parse_columns

        columns = parse_columns(args.columns) if args.columns else None
        cells = compare_paths(args.results, args.reference, args.margin, args.estimand, columns, dict(args.label))
    print_comparison(cells)
    document = as_document(cells)
    found = set().union(*(cell.words() for cell in cells.values())) & set(args.fail_on)
    if found:
        raise Unwanted(f"--fail-on {','.join(args.fail_on)}: found {', '.join(sorted(found))}", document)
    return document


def export(args: argparse.Namespace) -> Document:
    from qlibero.results.export import export_episodes

    document = export_episodes(args.run_dirs, args.output, args.arm, args.task, args.card)
    log.info(f"{count_text(document['rows'], 'episode')}: {document['file']}")
    if document["card"]:
        log.info(f"dataset card: {document['card']}")
    return document


def explain_gap(args: argparse.Namespace) -> Document:
    from qlibero.console import table
    from qlibero.results.explain_gap import explain_gap as explained

    found = explained(args.run_dir, args.other, args.arm)
    rows = [
        {"": d.likely, "constant": d.constant, "here": d.here, "there": d.there, "known of it": d.known}
        for d in found.differences
    ]
    rate = f", {found.other_rate[0]}/{found.other_rate[1]} there" if found.other_rate else ""
    table(rows, title=f"{found.arm} ({found.rate[0]}/{found.rate[1]}{rate}) against {found.other}, likeliest first")
    if found.unknown:
        log.info(f"not known of one side: {', '.join(found.unknown)}")
    log.info(f"equal: {', '.join(found.equal) or 'nothing that both say'}")
    return found.to_json()


def report(args: argparse.Namespace) -> Document:
    from qlibero.reporting.html.document import write_report

    document = write_report(args.run_dirs, args.output, args.reference, args.margin, args.max_mb, dict(args.label))
    left = f", {document['videos_left_out']} left out for its size" if document["videos_left_out"] else ""
    log.info(
        f"report: {document['report']} ({document['bytes'] / 1e6:.1f} MB, "
        f"{count_text(document['videos'], 'video pair')}{left})"
    )
    return document


def open_report(args: argparse.Namespace) -> Document:
    import webbrowser
    from contextlib import suppress

    from qlibero.reporting.html.live import LiveReport, require_directories, serve

    require_directories(args.run_dirs)
    document: Document = {}

    def ready(url: str) -> None:
        document["url"] = url
        log.info(f"{url} shows {', '.join(map(str, args.run_dirs))} as it grows, to this machine only; Ctrl-C ends it")
        if any(
            map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
        ):  # else it might start one in the terminal
            webbrowser.open(url)

    with suppress(KeyboardInterrupt):
        serve(LiveReport(args.run_dirs, args.reference, args.margin, dict(args.label)), ready)
    return document


def dashboard(args: argparse.Namespace) -> Document:
    from qlibero.reporting import wandb_workspace
    from qlibero.results.selection import select

    runs = select(args.run_dirs)
    tasks, axes = wandb_workspace.metrics_of(runs)
    shown: dict[str, list[str] | None] = {run.name: None for run in runs}
    if any(run.chosen for run in runs):  # arms that are named are shown beside all arms of whole runs
        for name in shown:
            shown[name] = [arm.arm for run in runs if run.name == name for arm in run.arms.values()]
    made = wandb_workspace.workspace(args.project, args.entity or "", shown, tasks, axes)
    document = {"workspace": made.name, "project": args.project, "entity": args.entity, "saved": not args.offline}
    if args.offline:
        return {**document, "spec": wandb_workspace.spec(made)}
    return {**document, "workspace": wandb_workspace.push(made)}
