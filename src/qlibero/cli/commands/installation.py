"""Commands about what is here: this machine, configurations, and what there is to choose from."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import asdict

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
    from qlibero.sim import bddl, libero, suites

    asked = [name for name in map(str, args.tasks) if name in suites.SUITES]
    if args.settle and not asked:
        raise UserError("--settle: name a suite that `qlibero ls suites` lists; files have no initial states")
    tasks = [(name, task) for name in asked for task in range(suites.SUITES[name].tasks)]
    goals = [libero.task_files(*task)["goal"] for task in tasks]
    found = bddl.lint_all([*(path for path in args.tasks if str(path) not in asked), *goals], bddl.installed())
    complaints = [complaint for of in found.values() for complaint in of]
    complaints += [
        f"{suites.words_at(*task)}: {task[0]} task {task[1]} {f}" for task in tasks for f in suites.flaws(*task)
    ]
    for complaint in complaints:
        log.info(complaint)
    thrown = _settled(tasks) if args.settle else []
    document = {"files": len(found), "complaints": complaints, **({"thrown": thrown} if args.settle else {})}
    if complaints or thrown:
        count = count_text(len(complaints) + len(thrown), "complaint")
        raise Incomplete(f"{count} about {count_text(len(found), 'file')}, see above", document)
    log.info(f"{count_text(len(found), 'file')}, nothing to complain about")
    return document


def _settled(tasks: list[tuple[str, int]]) -> list[Document]:
    """What settling does to the initial states of tasks, where it does anything."""
    from qlibero.sim.settling import settle

    rows: list[Document] = []
    for suite, task in tasks:
        for one in settle(suite, task):
            rows.append({"suite": suite, "task": task, **asdict(one)})
            what = f"{one.thing} is thrown {one.sideways:.2f} m" if one.thing else "nothing is thrown"
            what += ", and what the goal names is lost" * one.lost + ", and the goal holds as it stands" * one.solved
            log.info(f"{suite} task {task} initial state {one.init}: {what}")
    return rows


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
