"""What each subcommand does: call a room, print for people, return the document that becomes the JSON line.

Rooms are imported inside the functions, because `qlibero --help` must answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlibero.errors import UserError, WorkFailed

Document = dict[str, Any]


class Incomplete(WorkFailed):
    """The command did what it could and has a result to show, but the work is not all done."""

    def __init__(self, message: str, document: Document):
        super().__init__(message)
        self.document = document


def run(args: argparse.Namespace) -> Document:
    from qlibero.config.load import load_experiment
    from qlibero.experiment import run_experiment
    from qlibero.progress import RunProgress

    experiment = load_experiment(args.config, args.set)
    with RunProgress(experiment) as progress:
        document = run_experiment(
            experiment, args.out, on_start=progress.start, on_episode=progress.episode, say=progress.say
        )
    from qlibero.reporting.terminal import print_run   # SciPy takes a second to import; the simulators start without it

    print_run(document["run_dir"])
    if not document["complete"]:
        raise Incomplete("some episodes ended in an error; the same command tries them again", document)
    return document


def compare(args: argparse.Namespace) -> Document:
    from qlibero.reporting.terminal import print_comparison

    if any(path.is_file() for path in args.results):
        from qlibero.results.imports import compare_foreign

        document = compare_foreign(args.results, args.reference, args.margin)
    else:
        from qlibero.results.compare import compare_runs

        document = compare_runs(args.results, args.reference or "baseline", args.margin)
    print_comparison(document)
    return document


def export(args: argparse.Namespace) -> Document:
    from qlibero.results.export import export_episodes

    document = export_episodes(args.run_dirs, args.output)
    explain(f"{document['rows']} episodes: {document['file']}")
    return document


def plan(args: argparse.Namespace) -> Document:
    from qlibero.config.sweep import load_sweep
    from qlibero.launch import cells
    from qlibero.launch.plan import plan as make_plan

    document = make_plan(cells.make_manifest(load_sweep(args.config, args.set), args.out), explain, args.calibrate)
    cells_shown = [{**cell, "seconds_each": [f"{arm} {s:g}" for arm, s in (cell["seconds_each"] or {}).items()]} for cell in document["cells"]]
    _table(cells_shown, title=f"{document['sweep']}: {document['done']} of {document['episodes']} episodes are in the ledger")
    if document["engines"]:
        _table([{"engine": name, **cost} for name, cost in document["engines"].items()], title="what is missing, on each engine")
    elif document["without_cost"]:
        explain("no episode like these has been run yet, so no time can be told; --calibrate runs one of each (and keeps it)")
    return document


def sweep(args: argparse.Namespace) -> Document:
    from qlibero.config.sweep import load_sweep
    from qlibero.launch.sweep import run_sweep

    document = run_sweep(load_sweep(args.config, args.set), args.engine, args.out, args.dry_run, explain)
    if document["finished"] and not document["complete"] and not args.dry_run:
        raise Incomplete("not everything is done; the same command runs what is missing", document)
    return document


def run_shard(args: argparse.Namespace) -> Document:
    from qlibero.launch import cells
    from qlibero.progress import RunProgress

    if args.merge:
        return cells.merge(args.manifest, explain)
    manifest = cells.read_manifest(args.manifest)
    with RunProgress(manifest.experiment_of(args.index)) as progress:
        document = cells.run_shard(
            manifest, args.index, on_start=progress.start, on_episode=progress.episode, say=progress.say
        )
    if not document["complete"]:
        raise Incomplete("some episodes ended in an error; the same command tries them again", document)
    return document


def dashboard(args: argparse.Namespace) -> Document:
    from qlibero.reporting import wandb_workspace
    from qlibero.reporting.cells import read_runs

    runs, skipped = read_runs(args.run_dirs)
    for path in skipped:
        explain(f"skipped {path}: no run, it has no episodes")
    tasks = sorted({record.task for run in runs for arm in run.arms.values() for record in arm.records})
    made = wandb_workspace.workspace(args.project, args.entity or "", [run.name for run in runs], tasks)
    document = {"workspace": made.name, "project": args.project, "entity": args.entity, "saved": not args.offline}
    if args.offline:
        return {**document, "spec": wandb_workspace.spec(made)}
    return {**document, "workspace": wandb_workspace.push(made)}


def status(args: argparse.Namespace) -> Document:
    from qlibero.launch import status as watch

    document = watch.follow(args.dir, lambda found: explain(watch.headline(found))) if args.follow else watch.status(args.dir)
    _table(document["cells"], title=watch.headline(document))
    return document


def report(args: argparse.Namespace) -> Document:
    from qlibero.reporting.html import write_report

    document = write_report(args.run_dirs, args.output, args.reference, args.margin, args.max_mb)
    for path in document["skipped"]:
        explain(f"skipped {path}: no run, it has no episodes")
    left = f", {document['videos_left_out']} left out for its size" if document["videos_left_out"] else ""
    explain(f"report: {document['report']} ({document['bytes'] / 1e6:.1f} MB, {document['videos']} pairs of videos{left})")
    return document


def quantize(args: argparse.Namespace) -> Document:
    from qlibero.config.load import load_experiment
    from qlibero.quant.prepare import quantize as make_artifacts
    from qlibero.quant.prepare import readable

    document = make_artifacts(load_experiment(args.config, args.set), args.out, _counter("input groups"))
    _table(readable(document), title="artifacts")
    return document


def inspect(args: argparse.Namespace) -> Document:
    from qlibero.quant.inspect import inspect_artifact, readable

    document = inspect_artifact(args.artifact, args.diff, args.sort)
    _table(readable(document["layers"]), title=f"{document['artifact']['settings']}: {args.artifact}")
    _table(readable(document["hint"]), title="the noisiest layers: what their return to full precision would cost")
    if "diff" in document:
        _table(readable(document["diff"]["layers"]), title=f"change in {args.diff}")
    if args.measure:
        from qlibero.config.load import load_experiment
        from qlibero.quant.prepare import measured_sensitivity

        document["sensitivity"] = measured_sensitivity(load_experiment(args.measure), args.artifact)
        _table(readable(document["sensitivity"]), title="each layer quantized alone: what it does to the actions")
    return document


def kernels_check(args: argparse.Namespace) -> Document:
    from qlibero import catalogue
    from qlibero.kernels import court

    policy, layers = _layers(args)
    names = args.backend or [name for name in catalogue.kernel_names() if catalogue.supports(name, layers[0].shape)]
    verdicts = [verdict for name in names for verdict in court.check(layers, name, remember=not args.forget)]
    document = {"device": layers[0].shape.device, "shapes": policy, "verdicts": [verdict.to_json() for verdict in verdicts]}
    rows = court.table(verdicts)
    title = f"court: {policy} shapes on {layers[0].shape.device}"
    _table([_tried(name, [row for row in rows if row["backend"] == name]) for name in names], title=title)
    if refused := [row for row in rows if row["verdict"] != "pass"]:
        _table(refused, title="not passed")
    court.enforce(verdicts)
    return document


def kernels_bench(args: argparse.Namespace) -> Document:
    from dataclasses import asdict

    from qlibero.kernels.stopwatch import bench

    policy, layers = _layers(args)
    timings = bench(layers, backends=args.backend)
    rows = [{"layer": t.layer, "shape": f"{t.n}×{t.k}", "tokens": t.tokens, "backend": t.backend, "µs": f"{t.us:.1f}",
             "speed-up": f"{t.speedup:.2f}×", "of limit": f"{t.of_limit:.0%}"} for t in timings]  # fmt: skip
    _table(rows, title=f"stopwatch: {policy} shapes on {layers[0].shape.device}, against the unquantized product and the hardware's limit")
    return {"device": layers[0].shape.device, "shapes": policy, "timings": [asdict(t) for t in timings]}


def _layers(args: argparse.Namespace) -> tuple[str, list[Any]]:
    """Which policy's layers to try, as `kernels check` and `kernels bench` were asked."""
    from qlibero import catalogue
    from qlibero.kernels.shapes import compact_layers, pi05_layers

    device = args.device or ("cuda" if catalogue.has_cuda() else "cpu")
    policy = args.shapes or ("pi05" if device == "cuda" else "compact")
    make = {"pi05": pi05_layers, "compact": compact_layers}[policy]
    return policy, make(args.weight_bits, args.activation_bits, device, args.group_size)


def _tried(name: str, rows: list[Document]) -> Document:
    passed = [row for row in rows if row["verdict"] == "pass"]
    return {"backend": name, "shapes": len(rows), "passed": len(passed), "seconds": round(sum(row["seconds"] for row in rows), 1),
            "why": rows[0]["reason"] if rows else ""}  # fmt: skip


def checkpoint_verify(args: argparse.Namespace) -> Document:
    from qlibero.policies.pi05.verify import verify_checkpoint

    document = verify_checkpoint(args.checkpoint)
    _table([{"about": key, "found": _brief(value)} for key, value in document.items()], title=str(args.checkpoint))
    if not document["ok"]:
        raise Incomplete(f"{args.checkpoint}: {len(document['problems'])} problems, see above", document)
    return document


def _brief(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_brief(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value[:6])) + (f" and {len(value) - 6} more" if len(value) > 6 else "") or "none"
    return value


def serve(args: argparse.Namespace) -> Document:
    from qlibero.config.load import load_experiment

    experiment = load_experiment(args.config, args.set)
    arms = {arm.name: arm for arm in experiment.arms()}
    if args.arm not in arms:
        raise UserError(f"--arm {args.arm}: {args.config} has the arms {', '.join(arms)}")
    token = os.environ.get(args.token_env) if args.token_env else None
    if args.token_env and not token:
        raise UserError(f"--token-env {args.token_env}: no such variable in the environment")

    from qlibero.arms import load_arms
    from qlibero.policies.server import ServerSettings
    from qlibero.policies.server import serve as listen

    policies, meta = load_arms(experiment, [arms[args.arm]], explain)
    settings = ServerSettings(args.host, args.port, token, args.ready_file, seed=experiment.seed)
    listen(policies[args.arm], settings, lambda port: explain(f"serving {args.arm} on ws://{args.host}:{port}; Ctrl-C ends it"))
    return {"served": args.arm, "policy": meta[args.arm]["policy"]}


def doctor(args: argparse.Namespace) -> Document:
    from qlibero.doctor import diagnose

    findings = [finding.to_json() for finding in diagnose()]
    if not args.json:
        _table(findings, title="doctor")
    document = {"ok": all(f["status"] != "fail" for f in findings), "findings": findings}
    if not document["ok"]:
        raise Incomplete("something here will not work; each finding names the command that mends it", document)
    return document


def config_show(args: argparse.Namespace) -> Document:
    from qlibero.config.load import dump_resolved, editor_schema, load_experiment

    if args.schema:
        return editor_schema()
    if args.config is None:
        raise UserError("config show: name a CONFIG, or ask for --schema")
    experiment = load_experiment(args.config, args.set, check_files=False)
    print(dump_resolved(experiment), end="", file=sys.stderr)
    return experiment.model_dump(mode="json")


def ls(args: argparse.Namespace) -> Document:
    from qlibero import catalogue

    rows = getattr(catalogue, args.what)()
    _table(rows, title=args.what)
    return {args.what: rows}


# --------------------------------------------------------------------------------------------------- printing
def _table(rows: list[Document], title: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    from qlibero.progress import console

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold", no_wrap=column in (columns[0], "file"))
    for row in rows:
        table.add_row(*(escape(_cell(row.get(column))) for column in columns))  # [cu13] is no markup
    console().print(table)


def _counter(what: str) -> Callable[[int, int], None]:
    def count(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total} {what}", end="" if done < total else "\n", file=sys.stderr, flush=True)

    return count


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else ", ".join(map(str, value)) if isinstance(value, list | tuple) else f"{value:,}" if isinstance(value, int) else str(value)


def explain(message: str) -> None:
    print("\n".join(f"qlibero: {line}" if i == 0 else line for i, line in enumerate(message.splitlines())), file=sys.stderr)
