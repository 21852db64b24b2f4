"""Commands about what is here: this machine, configurations, and what there is to choose from."""

from __future__ import annotations

import argparse
import logging
import sys

from qlibero.cli.outcomes import Document, Incomplete
from qlibero.console import count_text, table
from qlibero.errors import UserError

log = logging.getLogger(__name__)


def doctor(args: argparse.Namespace) -> Document:
    from qlibero.cli.doctor import diagnose

    findings = [finding.to_json() for finding in diagnose()]
    if not args.json:
        table([{k: v for k, v in finding.items() if k != "cure"} for finding in findings], title="doctor")
    document = {"ok": all(f["status"] != "fail" for f in findings), "findings": findings}
    if not document["ok"]:
        raise Incomplete("something here will not work; each finding names the command that mends it", document)
    return document


def lint(args: argparse.Namespace) -> Document:
    from qlibero.sim import bddl

    found = bddl.lint_all(args.tasks, bddl.installed())
    complaints = [complaint for of in found.values() for complaint in of]
    for complaint in complaints:
        log.info(complaint)
    document = {"files": len(found), "complaints": complaints}
    if complaints:
        raise Incomplete(
            f"{count_text(len(complaints), 'complaint')} about {count_text(len(found), 'file')}, see above", document
        )
    log.info(f"{count_text(len(found), 'file')}, nothing to complain about")
    return document


def config_show(args: argparse.Namespace) -> Document:
    from qlibero.config.dump import dump_resolved, editor_schema
    from qlibero.config.load import load_experiment

    if args.schema:
        return editor_schema()
    if args.config is None:
        raise UserError("config show: name a CONFIG, or ask for --schema")
    experiment = load_experiment(args.config, args.set, check_files=False)
    print(dump_resolved(experiment), end="", file=sys.stderr)
    return experiment.model_dump(mode="json")


def ls(args: argparse.Namespace) -> Document:
    from qlibero.cli import catalogue

    rows = catalogue.of_kind(args.what) if args.what in catalogue.KINDS_ONLY else getattr(catalogue, args.what)()
    table(rows, title=args.what)
    for row in rows:
        if "validation" in row:
            row["court"] = row["validation"]  # the key's name before
    return {args.what: rows}
